"""The variants of the detector by `config.model.name`, and what a variant decides.

`register` adds a variant from outside of the package; nothing else needs a change.
"""

import dataclasses
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax import criterion
from dn_detr_jax.config import dn_dab_detr as dab_keys
from dn_detr_jax.config import dn_deformable_detr as deformable_keys
from dn_detr_jax.config import dn_deformable_encoder_detr as deformable_encoder_keys
from dn_detr_jax.config import dn_detr_plain as plain_keys
from dn_detr_jax.config import dn_dino_detr as dino_keys
from dn_detr_jax.config import variants
from dn_detr_jax.config.checks import Check
from dn_detr_jax.config.key import Key
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.losses import ClassLoss, SigmoidFocalLoss
from dn_detr_jax.models import (
    build,
    dn_dab_detr,
    dn_deformable_detr,
    dn_deformable_encoder_detr,
    dn_detr_plain,
    dn_dino_detr,
)
from dn_detr_jax.models.initialization import initializer


def focal_loss(config: ConfigDict) -> SigmoidFocalLoss:
    """Makes the class loss of `config.loss`."""
    return SigmoidFocalLoss(config.focal_alpha, config.focal_gamma)


OutputParts = Callable[
    [
        criterion.Outputs,
        Denoising | None,
        criterion.Targets,
        criterion.Totals,
        criterion.LossSettings,
    ],
    list[criterion.OutputPart],
]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Everything that the package needs to know of a variant.

    Attributes:
      name: value of `config.model.name`.
      build: (`config.model`, `config.compile.attention`) -> the detector, a module called like
        `Detector`.
      num_queries: (`config.model`) -> number of matching queries N.
      keys: config keys of its own, with their defaults; they are unknown to other variants.
      checks: rules across keys.
      frozen: (`config.model`) -> regular expressions for the paths of parameters that are not
        trained.
      class_loss: (`config.loss`) -> loss, matching cost and scores of classes.
      output_parts: (outputs, dn, targets, totals, settings) -> the parts of the training loss, the
        matching queries first, see `criterion.output_parts`.
      torch_names: "module:attribute" of the `interop.torch_names.TorchNames` of its official
        state dict; it is imported when weights are converted. Empty: there is none.
    """

    name: str
    build: Callable[[ConfigDict, str], nn.Module]
    num_queries: Callable[[ConfigDict], int]
    keys: tuple[Key, ...] = ()
    checks: tuple[Check, ...] = ()
    frozen: Callable[[ConfigDict], list[str]] = lambda config: []
    class_loss: Callable[[ConfigDict], ClassLoss] = focal_loss
    output_parts: OutputParts = criterion.output_parts
    torch_names: str = ""


_variants: dict[str, Variant] = {}


def register(variant: Variant) -> None:
    """Makes a variant known by its name, and its keys to the config.

    Raises:
      ValueError: another variant has that name.
    """
    if _variants.get(variant.name, variant) != variant:
        raise ValueError(f"model {variant.name!r}: another variant has this name")
    variants.register(variant.name, variant.keys, variant.checks)
    _variants[variant.name] = variant


def _own(keys: ModuleType, builder: ModuleType, **more: Any) -> Variant:
    """Describes a variant of this package, by the module of its keys and that of its builder."""
    shared: dict[str, Any] = {
        "num_queries": build.num_queries,
        "frozen": build.frozen,
        "torch_names": f"dn_detr_jax.interop.names.{keys.NAME}:NAMES",
    }
    return Variant(keys.NAME, builder.build, keys=keys.KEYS, checks=keys.CHECKS, **shared | more)


register(_own(dab_keys, dn_dab_detr))
register(_own(deformable_keys, dn_deformable_detr))
register(_own(deformable_encoder_keys, dn_deformable_encoder_detr))
register(_own(plain_keys, dn_detr_plain, class_loss=dn_detr_plain.class_loss))
register(_own(dino_keys, dn_dino_detr, output_parts=criterion.parts_with_proposals))


def variant_of(config: ConfigDict) -> Variant:
    """Returns the variant of `config.model`.

    Raises:
      ConfigError: unknown name.
    """
    if config.name not in _variants:
        raise ConfigError("model.name", config.name, f"unknown; known: {', '.join(_variants)}")
    return _variants[config.name]


def build_model(config: ConfigDict, attention: str = "xla") -> nn.Module:
    """Builds a detector.

    Args:
      config: `config.model`.
      attention: `config.compile.attention`; it changes no parameters, and results by rounding only.

    Raises:
      ConfigError: unknown name.
    """
    return variant_of(config).build(config, attention)


def num_matching_queries(config: ConfigDict) -> int:
    """Returns the number of matching queries N of `config.model`."""
    return variant_of(config).num_queries(config)


def torch_names(config: ConfigDict) -> Any:
    """Imports the names of the official state dict of `config.model`, a `TorchNames`.

    Raises:
      ConfigError: the variant has none.
    """
    path = variant_of(config).torch_names
    if not path:
        raise ConfigError("model.name", config.name, "it has no official PyTorch weights")
    return pkgutil.resolve_name(path)


def all_torch_names() -> dict[str, Any]:
    """Imports the names of the official state dicts of all variants, by the variant's name."""
    return {
        name: pkgutil.resolve_name(variant.torch_names)
        for name, variant in _variants.items()
        if variant.torch_names
    }


def loss_settings(config: ConfigDict) -> criterion.LossSettings:
    """Returns the settings of matching and losses of a whole configuration."""
    return criterion.LossSettings(
        class_loss=variant_of(config.model).class_loss(config.loss),
        costs=config.matcher.to_dict(),
        weights={k: v for k, v in config.loss.items() if k.startswith("weight_")},
    )


def abstract_params(model: nn.Module) -> dict:
    """Returns the shapes and dtypes of the parameters, without computing anything."""
    return jax.eval_shape(initializer(model), jax.random.key(0))


def trainable(params: dict, config: ConfigDict, freeze: Sequence[str] = ()) -> dict[str, bool]:
    """Tells which parameters are trained, by their path.

    Args:
      params: nested dictionary of arrays or shapes.
      config: `config.model`.
      freeze: `config.train.freeze`, regular expressions.

    Returns:
      {"backbone/stem_conv/kernel": False, ...}: False for the frozen parameters of the variant, and
      for those whose path one of `freeze` matches.

    Raises:
      ConfigError: a pattern of `freeze` that matches no parameter, or together they match all.
    """
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in paths):
            reason = f"{pattern!r} matches no parameter; paths are like {paths[0]!r}"
            raise ConfigError("train.freeze", freeze, reason)
    frozen = [*variant_of(config).frozen(config), *freeze]
    found = {path: not any(re.search(p, path) for p in frozen) for path in paths}
    if freeze and not any(found.values()):
        raise ConfigError("train.freeze", freeze, "no parameter is left to be trained")
    return found


def parameter_table(params: dict, is_trainable: Mapping[str, bool]) -> str:
    """Formats a table of all parameters: path, shape, size, and whether they are trained."""
    flat = traverse_util.flatten_dict(params, sep="/")
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flat.items()}
    width = max(map(len, flat))
    lines = [
        f"{path:<{width}}  {'x'.join(map(str, leaf.shape)) or '1':>14}  {sizes[path]:>11,}"
        f"{'' if is_trainable[path] else '  frozen'}"
        for path, leaf in flat.items()
    ]
    trained = sum(size for path, size in sizes.items() if is_trainable[path])
    lines.append(f"{sum(sizes.values()):,} parameters, {trained:,} of them trained")
    return "\n".join(lines)
