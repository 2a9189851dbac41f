"""Parameters to start a training from: a pretrained backbone, or a whole trained detector."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.errors import ConfigError, ConversionError, WeightsError
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.convert import (
    HEAD_PATHS,
    backbone_from_torch,
    flat,
    reset_heads,
)
from dn_detr_jax.models.registry import abstract_params, build_model

PyTree = Any
logger = logging.getLogger(__name__)


def load_initial(params: PyTree, config: ConfigDict) -> PyTree:
    """Replaces freshly initialised parameters by what `config.init` names.

    Args:
      params: nested dictionary of arrays.
      config: whole configuration. `init.backbone` is a file of ResNet weights in torchvision's or
        timm's names; `init.checkpoint` is a work directory, of a training or an import, of which
        the best checkpoint is taken, or the latest if none has been evaluated. With
        `init.reset_heads` the class head and the label embedding stay fresh, except the embedding
        that stands for no class.

    Returns:
      Parameters of the same shapes and shardings; `params` itself if `config.init` names nothing.

    Raises:
      ConfigError: a file or directory that is not there or does not fit, with what would fit.
      CheckpointError: a damaged checkpoint.
    """
    fresh = flat(params)
    if config.init.checkpoint:
        loaded = _from_checkpoint(fresh, config)
    elif config.init.backbone:
        loaded = _from_backbone(fresh, config)
    else:
        return params
    placed = {path: _placed(loaded[path], value.sharding) for path, value in fresh.items()}
    return traverse_util.unflatten_dict(placed, sep="/")


def _placed(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """`array` on the devices; unlike `jax.device_put` it sends nothing to other processes."""
    return jax.make_array_from_callback(
        np.shape(array), sharding, lambda index: np.asarray(array)[index]
    )


def _from_backbone(fresh: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    path = config.init.backbone
    try:
        file = torch_files.read(path)
        loaded, report = backbone_from_torch(file.state, {p: v.shape for p, v in fresh.items()})
    except (OSError, WeightsError, ConversionError) as error:
        raise ConfigError("init.backbone", path, str(error)) from error
    report = dataclasses.replace(report, stripped=file.stripped + report.stripped)
    logger.info("backbone from %s: %s", file.description(), report.summary())
    return fresh | loaded


def _from_checkpoint(fresh: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    path = config.init.checkpoint
    if not (Path(path) / "config.json").is_file():
        raise ConfigError("init.checkpoint", path, "no work directory: it has no config.json")
    source, _ = read_run_config(path)
    shapes = abstract_params(build_model(source.model))
    wrong = [
        f"{name} is {list(theirs)} there, {list(ours)} here"
        for name, theirs, ours in _differences(flat(shapes), fresh)
        if not (config.init.reset_heads and name in HEAD_PATHS)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        heads = {line.split(" ")[0] for line in wrong} <= set(HEAD_PATHS)
        hint = "; init.reset_heads=True keeps all but the classes" if heads else ""
        reason = f"another model: {'; '.join(wrong[:3])}{more}{hint}"
        raise ConfigError("init.checkpoint", path, reason)
    found = read_params(path, shapes)
    restored = flat(jax.device_get(found.params))
    logger.info("parameters from %s, step %s", path, found.step)
    if config.init.reset_heads:
        return reset_heads(restored, jax.device_get(fresh))
    return restored


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, tuple, tuple]]:
    def shape(params: dict[str, Any], name: str) -> tuple[int, ...] | str:
        return tuple(np.shape(params[name])) if name in params else "nothing"

    names = sorted(theirs.keys() | ours.keys())
    both = [(name, shape(theirs, name), shape(ours, name)) for name in names]
    return [(name, a, b) for name, a, b in both if a != b]
