"""Parameters to start a training from: a pretrained backbone, or a whole trained detector."""

import copy
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.categories import match_labels
from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import CheckpointError, ConfigError, ConversionError, WeightsError
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.class_heads import head_paths, objectness_head, reorder_heads, reset_heads
from dn_detr_jax.interop.convert import backbone_from_torch, flat
from dn_detr_jax.interop.hub import weights_path
from dn_detr_jax.interop.import_torch import convert
from dn_detr_jax.models.registry import abstract_params, build_model

PyTree = Any
logger = logging.getLogger(__name__)


def load_initial(params: PyTree, config: ConfigDict, categories: Sequence[Category] = ()) -> PyTree:
    """Replaces freshly initialized parameters by what `config.init` names.

    Args:
      params: nested dictionary of arrays.
      config: whole configuration. `init.backbone` is a file of a backbone's weights in
        torchvision's or timm's names; `init.checkpoint` is a work directory of a training or an
        import, whose best checkpoint is taken, or the latest if none has been evaluated; or it is
        a file of PyTorch weights. Both may be names for `hub.fetch`. With
        `init.reset_heads` the class head and the label embedding stay fresh, except the embedding
        that stands for no class. Without it, they are matched by class name: their rows are put
        into the order of `categories`.
      categories: of the training data by label; none if they are not known.

    Returns:
      Parameters of the same shapes and shardings; `params` itself if `config.init` names nothing.

    Raises:
      ConfigError: a file or directory that is missing or does not fit, with what would fit.
      CheckpointError: a damaged checkpoint.
    """
    fresh = flat(params)
    if config.init.checkpoint:
        loaded = _from_checkpoint(fresh, config, categories)
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
    name = config.init.backbone
    try:
        file = torch_files.read(weights_path(name, "init.backbone"))
        shapes = {path: value.shape for path, value in fresh.items()}
        loaded, report = backbone_from_torch(file.state, shapes)
    except (OSError, WeightsError, ConversionError) as error:
        raise ConfigError("init.backbone", name, str(error)) from error
    report = dataclasses.replace(report, stripped=file.stripped + report.stripped)
    logger.info("backbone from %s: %s", file.description(), report.summary())
    return fresh | loaded


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A trained detector: `config.model`, parameters by path and classes."""

    model: ConfigDict
    params: dict[str, Any]
    categories: Sequence[Category]


def _from_checkpoint(
    fresh: dict[str, Any], config: ConfigDict, categories: Sequence[Category]
) -> dict[str, Any]:
    name = config.init.checkpoint
    try:
        path = weights_path(name, "init.checkpoint")
        found = _from_file(path, config) if path.is_file() else None
    except (WeightsError, ConversionError) as error:
        raise ConfigError("init.checkpoint", name, str(error)) from error
    return _fitted(found or _from_workdir(path), fresh, config, categories)


def _from_file(path: Path, config: ConfigDict) -> _Trained:
    """The detector in a file of PyTorch weights, with its own classes."""
    own = copy.deepcopy(config)
    own.init.reset_heads, own.model.num_classes = False, 0
    file = torch_files.read(path)
    found = convert(file.state, own, file.args, file.classes)
    logger.info("parameters from %s: %s", file.description(), found.report.summary())
    return _Trained(found.config.model, flat(found.params), found.categories)


def _from_workdir(path: Path) -> _Trained:
    if not (path / "config.json").is_file():
        reason = "no file, and no work directory: it has no config.json"
        raise ConfigError("init.checkpoint", str(path), reason)
    source, categories = read_run_config(path)
    found = read_params(path, abstract_params(build_model(source.model)))
    logger.info("parameters from %s, step %s", path, found.step)
    return _Trained(source.model, flat(jax.device_get(found.params)), categories)


def _fitted(
    trained: _Trained, fresh: dict[str, Any], config: ConfigDict, categories: Sequence[Category]
) -> dict[str, Any]:
    """The parameters of a trained detector for the model and the classes of a config."""
    name = config.init.checkpoint
    reset = config.init.reset_heads
    rows = None if reset else _rows_by_class(trained.categories, categories, name)
    heads = head_paths(fresh)
    free = heads if reset or rows is not None else ()
    wrong = [
        f"{path} is {theirs} there, {ours} here"
        for path, theirs, ours in _differences(trained.params, fresh)
        if path not in free
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        only_heads = {line.split(" ")[0] for line in wrong} <= set(heads)
        hint = "; init.reset_heads=True keeps all but the classes" if only_heads else ""
        reason = f"another model: {'; '.join(wrong[:3])}{more}{hint}"
        raise ConfigError("init.checkpoint", name, reason)
    classes = trained.model.num_classes, config.model.num_classes
    objectness = objectness_head(config.model)
    if reset:
        return reset_heads(trained.params, jax.device_get(fresh), classes, objectness)
    if rows is not None:
        logger.warning("%s numbers its classes differently: they are matched by name", name)
        return reorder_heads(trained.params, jax.device_get(fresh), classes, rows, objectness)
    return trained.params


def _rows_by_class(
    known: Sequence[Category], categories: Sequence[Category], path: str
) -> list[int | None] | None:
    """For each label here, the label there of the same class name, or None for an unused label.

    Returns:
      None if the labels are the same or one side does not know its classes.
    """
    if not categories:
        return None
    try:
        labels = match_labels(known, categories, path, "the training data")
    except CheckpointError as error:
        reason = f"{error}; init.reset_heads=True keeps all but the classes"
        raise ConfigError("init.checkpoint", path, reason) from None
    if labels == tuple(range(len(categories))):
        return None
    unused = iter([label for label, category in enumerate(known) if not category.name])
    return [
        label if category.name else next(unused, None)
        for label, category in zip(labels, categories, strict=True)
    ]


def _differences(
    theirs: dict[str, Any], ours: dict[str, Any]
) -> list[tuple[str, Sequence[int] | str, Sequence[int] | str]]:
    def shape(params: dict[str, Any], name: str) -> Sequence[int] | str:
        return list(np.shape(params[name])) if name in params else "nothing"

    names = sorted(theirs.keys() | ours.keys())
    both = [(name, shape(theirs, name), shape(ours, name)) for name in names]
    return [(name, a, b) for name, a, b in both if a != b]
