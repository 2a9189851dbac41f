"""PyTorch checkpoints as work directories."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.config import flat_values, validate
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import (
    ConfigError,
    ConversionError,
)
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.architecture import as_flags, check_config, official_config
from dn_detr_jax.interop.class_heads import head_paths, objectness_head, reset_heads
from dn_detr_jax.interop.convert import ConversionReport, flat, params_from_torch
from dn_detr_jax.interop.hub import weights_path
from dn_detr_jax.interop.names.elsewhere import source_of
from dn_detr_jax.interop.state_dicts import unwrapped
from dn_detr_jax.models.draws import draw_together
from dn_detr_jax.models.initialization import initial_params
from dn_detr_jax.models.registry import (
    abstract_params,
    build_model,
    num_matching_queries,
    torch_names,
)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A checkpoint as parameters of this package.

    Attributes:
      params: nested dictionary of float32 arrays.
      config: whole configuration, with the keys that follow from the source.
      categories: the classes by label.
      report: where every tensor went.
      followed: the keys that were changed to follow the source, and their values.
    """

    params: dict[str, Any]
    config: ConfigDict
    categories: tuple[Category, ...]
    report: ConversionReport
    followed: dict[str, Any]


def convert(
    state: Mapping[str, np.ndarray],
    config: ConfigDict,
    args: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Imported:
    """Parameters of the config's model from a state dict.

    Args:
      state: tensors by the names of the official code or of another source.
      config: whole configuration; `model.num_classes` 0 is filled in, keys that follow from the
        source are set. With `init.reset_heads` the heads come from the config's seed.
      args: command line of the PyTorch training, which tells DC5 and the number of heads.
      classes: names of the source's labels; none if they are not known.

    Raises:
      ConversionError: a checkpoint of another model, with the config that would fit.
    """
    state, stripped = unwrapped(state)
    source = source_of(state)
    official, fresh = source.convert(state)
    found = official_config(official, args or {}, config.model) | dict(source.decides)
    theirs = found["model.num_classes"]
    followed = {}
    if not config.init.reset_heads:
        followed = _followed(source.settings(theirs), config)
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(followed)
    if not config.model.num_classes:
        config.model.num_classes = theirs
    check_config(found, config, reset_heads=config.init.reset_heads)
    categories = source.categories(config.model.num_classes)
    if classes and not config.init.reset_heads:
        if len(classes) != theirs:
            raise ConversionError(f"{len(classes)} names of classes, but the model has {theirs}")
        categories = tuple(Category(label, name) for label, name in enumerate(classes))
    params, report = _params(official, config, theirs)
    return Imported(
        params=traverse_util.unflatten_dict(params, sep="/"),
        config=config,
        categories=categories,
        report=dataclasses.replace(report, stripped=stripped, source=source.name, fresh=fresh),
        followed=followed,
    )


def _followed(settings: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    """Those of a source's settings that change a config, within what its model allows."""
    settings = dict(settings)
    if "eval.num_select" in settings:
        classes = settings.get("model.num_classes", config.model.num_classes)
        most = num_matching_queries(config.model) * classes
        settings["eval.num_select"] = min(settings["eval.num_select"], most or math.inf)
    own = flat_values(config)
    return {key: value for key, value in settings.items() if own[key] != value}


def _params(
    state: Mapping[str, np.ndarray], config: ConfigDict, classes: int
) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """Parameters by path from an official state dict with so many classes."""
    source = copy.deepcopy(config.model)
    source.num_classes = classes
    shapes = flat(abstract_params(build_model(source)))
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    names = torch_names(config.model)
    params, report = params_from_torch(state, shapes, names)
    if report.unfilled:
        raise ConversionError(f"nothing in the source for {', '.join(report.unfilled)}")
    if config.init.reset_heads:
        fresh = _fresh_heads(build_model(config.model), config.seed)
        counts = classes, config.model.num_classes
        params = reset_heads(params, params | fresh, counts, objectness_head(config.model))
        replaced, _ = names.tensors({path: shapes[path] for path in fresh})
        report = dataclasses.replace(
            report,
            filled=tuple(path for path in report.filled if path not in fresh),
            unused=(*report.unused, *(tensor.name for tensor in replaced)),
        )
    return params, report


def _fresh_heads(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Initial values of the head's parameters, by path."""

    @jax.jit
    @draw_together  # computes nothing but what is returned
    def init(key):
        params = flat(initial_params(model, key))
        return {path: params[path] for path in head_paths(params)}

    return jax.device_get(init(jax.random.key(seed)))


def import_file(
    source: str | Path, config: ConfigDict, out: str | Path, entry: str | None = None
) -> ConversionReport:
    """Writes the checkpoint of a file into a new work directory.

    Args:
      source: `.pth`, `.pth.tar`, `.safetensors` or `.npz`, or a name for `hub.fetch`.
      config: whole configuration, stored with the checkpoint; `model.num_classes` 0 is filled in.
      out: work directory without checkpoints.
      entry: dotted path of the state dict in the file, such as "ema.module"; None: the usual ones.

    Returns:
      Where every tensor went.

    Raises:
      ConfigError, ConversionError, WeightsError, CheckpointError: with nothing written.
    """
    validate(config)
    if (Path(out) / "checkpoints").exists():
        raise ConfigError("--out", str(out), "a directory without checkpoints: none is replaced")
    file = torch_files.read(weights_path(str(source), ""), entry)
    found = convert(file.state, config, file.args, file.classes)
    validate(found.config)
    report = dataclasses.replace(found.report, stripped=file.stripped)
    with Checkpoints(out, found.config, categories=found.categories) as checkpoints:
        checkpoints.save(0, {"params": found.params})
    print(f"{file.description()}: {report.summary()}")
    if found.followed:
        print(f"The config follows {report.source}: {as_flags(found.followed)}")
    if not file.args and not found.config.model.backbone.get("dilation", True):
        print(
            "The file does not say whether it is a DC5 model: if it is, import it with "
            "--config.model.backbone.dilation=True"
        )
    print(f"Wrote {Path(out) / 'checkpoints' / '0'}")
    return report
