"""The config keys of DN-Deformable-DETR: those of DN-DAB-DETR that fit, and the feature levels."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dn_detr_jax.config import dn_dab_detr
from dn_detr_jax.config.backbones import number_of_stages
from dn_detr_jax.config.checks import Values, require
from dn_detr_jax.config.key import Key, architecture_key
from dn_detr_jax.config.rules import whole
from dn_detr_jax.config.variants import register

NAME = "dn_deformable_detr"


def with_defaults(keys: Iterable[Key], defaults: Mapping[str, object]) -> tuple[Key, ...]:
    """Returns keys, some of them with other defaults.

    Args:
      keys: rows.
      defaults: by path.
    """
    return tuple(
        dataclasses.replace(key, default=defaults.get(key.path, key.default)) for key in keys
    )


_OFFICIAL_GROUPS = 32


def _earlier_groups(values: Values) -> Any:
    """Runs without the key had four channels in each group, and 32 groups at most."""
    hidden = values.get("model.hidden_dim")
    return hidden // 4 if hidden in (32, 64, 96) else _OFFICIAL_GROUPS


# The same for every variant with several feature levels.
LEVEL_KEYS = (
    architecture_key(
        "backbone_levels", 3, "last stages of the backbone that become feature levels", whole(1)
    ),
    architecture_key(
        "extra_levels", 1, "further levels, each of half the resolution of the last one", whole(0)
    ),
    Key(
        "model.level_norm_groups",
        _OFFICIAL_GROUPS,
        "groups of the group norms of the feature levels; 32 stands for hidden_dim / 4 where it "
        "doesn't divide a hidden_dim below 128",
        whole(1),
        evaluation="same",
        earlier=_earlier_groups,
    ),
    Key(
        "model.sampling_part",
        0,
        "queries that the backward pass of deformable attention samples at once on a GPU; 0: all. "
        "With deterministic operations all at once take much memory; results stay the same",
        whole(0),
        resume="free",
    ),
)
POINT_KEYS = (
    architecture_key(
        "encoder_points", 4, "points that an encoder's head reads of each level", whole(1)
    ),
    architecture_key(
        "decoder_points", 4, "points that a decoder's head reads of each level", whole(1)
    ),
)
# What the transformer and its backbone have in common with those of DN-DAB-DETR.
_SHARED = (
    *("hidden_dim", "num_heads", "ffn_dim", "encoder_layers", "decoder_layers", "num_queries"),
    *("pe_temperature_h", "pe_temperature_w", "pe_temperature_box"),
    *("indicator", "dropout", "remat"),
)
TRANSFORMER_KEYS = with_defaults(
    (
        key
        for key in dn_dab_detr.KEYS
        if key.path.startswith("model.backbone.") or key.path.removeprefix("model.") in _SHARED
    ),
    {"model.pe_temperature_h": 10000.0, "model.pe_temperature_w": 10000.0},
)
KEYS = (*LEVEL_KEYS, *POINT_KEYS, *TRANSFORMER_KEYS)


def check_levels(values: Values) -> None:
    """`model.backbone_levels` is at most the number of stages of the backbone."""
    name, stages = number_of_stages(values)
    fits = values["model.backbone_levels"] <= stages
    require(values, "model.backbone_levels", fits, f"at most {name} = {stages}")


def check_level_norm(values: Values) -> None:
    """`model.level_norm_groups` divides `model.hidden_dim`, or is 32 and stands for a quarter."""
    hidden, groups = values["model.hidden_dim"], values["model.level_norm_groups"]
    if groups == _OFFICIAL_GROUPS:
        fits = hidden % (4 if hidden < 128 else 32) == 0
        expected = "a multiple of 4 below 128, of 32 from there on, for 32 groups in level norms"
        require(values, "model.hidden_dim", fits, expected)
    else:
        expected = f"a divisor of model.hidden_dim = {hidden}"
        require(values, "model.level_norm_groups", hidden % groups == 0, expected)


LEVEL_CHECKS = (check_levels, check_level_norm)
CHECKS = (
    *(check for check in dn_dab_detr.CHECKS if check is not dn_dab_detr.check_hidden_dim),
    *LEVEL_CHECKS,
)

register(NAME, KEYS, CHECKS)
