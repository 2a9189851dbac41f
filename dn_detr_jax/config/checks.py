"""Rules across several keys of the config.

A check takes all values by key, each of them right by its own rule, and raises `ConfigError`. The
reference of all keys shows the first line of its docstring.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dn_detr_jax.errors import ConfigError

Values = Mapping[str, Any]
Check = Callable[[Values], None]

_MOST_COPIES = 2**20  # of an image's objects: rows of the mask in the paper's layout


def require(values: Values, key: str, holds: bool, expected: str) -> None:
    """Raises `ConfigError` about a key unless `holds`."""
    if not holds:
        raise ConfigError(key, values[key], expected)


def check_fused_attention(values: Values) -> None:
    """`compile.attention` "cudnn" needs `model.dtype` "bfloat16"."""
    require(
        values,
        "compile.attention",
        values["compile.attention"] != "cudnn" or values["model.dtype"] == "bfloat16",
        '"xla" for model.dtype = "float32": cuDNN\'s attention takes "bfloat16"',
    )


def check_copies(values: Values) -> None:
    """`dn.groups` x `data.max_objects` is at most 2**20."""
    most = values["data.max_objects"]
    copies = values["dn.groups"] * most
    require(
        values,
        "dn.groups",
        copies <= _MOST_COPIES,
        f"fewer: times data.max_objects = {most} they make {copies} queries for an image, of at "
        f"most {_MOST_COPIES}",
    )


def check_contrastive_slots(values: Values) -> None:
    """`dn.contrastive` needs `dn.slots` of at least 2, for a positive and a negative."""
    enough = values["dn.slots"] >= 2 or not values["dn.contrastive"]
    require(values, "dn.slots", enough, "an integer >= 2")


def check_noise_by_group(values: Values) -> None:
    """`dn.label_noise_by_group` and `dn.box_noise_by_group` have at most `dn.groups` values."""
    groups = values["dn.groups"]
    for key in "dn.label_noise_by_group", "dn.box_noise_by_group":
        fits = not groups or len(values[key]) <= groups
        require(values, key, fits, f"at most dn.groups = {groups} values")


def check_label_denoising(values: Values) -> None:
    """`dn.contrastive` needs `dn.label_denoising`: negatives have a class loss alone."""
    require(
        values,
        "dn.label_denoising",
        values["dn.label_denoising"] or not values["dn.contrastive"],
        "True for dn.contrastive: negatives have a class loss alone",
    )


def check_attend_padding(values: Values) -> None:
    """`dn.attend_padding` needs `dn.layout` "paper": packed groups have no empty slots."""
    require(
        values,
        "dn.attend_padding",
        not values["dn.attend_padding"] or values["dn.layout"] == "paper",
        "False, or dn.layout=paper: packed groups have no empty slots to attend to",
    )


def check_mix(values: Values) -> None:
    """`data.mix.shares` has a share for each of `data.mix.dirs`, together less than 1."""
    shares, folders = values["data.mix.shares"], values["data.mix.dirs"]
    fits = len(shares) == len(folders) and sum(shares) < 1
    expected = f"{len(folders)} shares, one for each of data.mix.dirs, together less than 1"
    require(values, "data.mix.shares", fits, expected)


def check_weights(values: Values) -> None:
    """One of `matcher.cost_*` and one of `loss.weight_*` is above 0."""
    for prefix in "matcher.cost_", "loss.weight_":
        keys = [f"{prefix}{part}" for part in ("class", "bbox", "giou")]
        positive = any(values[key] for key in keys)
        require(values, keys[0], positive, f"one of {keys} must be above 0")


def check_batches(values: Values) -> None:
    """`train.batch_size` and `eval.batch_size` are multiples of `mesh.data`."""
    devices = values["mesh.data"]
    for key in "train.batch_size", "eval.batch_size":
        fits = devices == -1 or values[key] % devices == 0
        require(values, key, fits, f"a multiple of mesh.data = {devices}")


def check_accumulation(values: Values) -> None:
    """`train.accumulate_steps` divides the images per device."""
    rows = values["train.batch_size"] // max(values["mesh.data"], 1)
    fits = rows % values["train.accumulate_steps"] == 0
    expected = f"a divisor of the images per device: train.batch_size / devices = {rows}"
    require(values, "train.accumulate_steps", fits, expected)


def check_stop(values: Values) -> None:
    """`train.stop_after` counts evaluations: `train.eval_every` must not be empty."""
    fits = not values["train.stop_after"] or bool(values["train.eval_every"])
    require(values, "train.stop_after", fits, '0 for train.eval_every = "": it counts evaluations')


def check_milestones(values: Values) -> None:
    """`optimizer.schedule` "multi_step" needs `optimizer.milestones`."""
    require(
        values,
        "optimizer.milestones",
        values["optimizer.schedule"] != "multi_step" or bool(values["optimizer.milestones"]),
        'at least one duration for optimizer.schedule=multi_step, for example ("40 epochs",)',
    )


def check_start(values: Values) -> None:
    """At most one of `init.backbone` and `init.checkpoint` is given."""
    require(
        values,
        "init.backbone",
        not (values["init.backbone"] and values["init.checkpoint"]),
        "empty, since init.checkpoint has a backbone; give one of the two",
    )


SHARED_CHECKS: tuple[Check, ...] = (
    check_fused_attention,
    check_copies,
    check_contrastive_slots,
    check_noise_by_group,
    check_label_denoising,
    check_attend_padding,
    check_mix,
    check_weights,
    check_batches,
    check_accumulation,
    check_stop,
    check_milestones,
    check_start,
)
