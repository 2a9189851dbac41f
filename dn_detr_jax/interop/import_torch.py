"""Official PyTorch checkpoints as work directories."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.config import validate
from dn_detr_jax.data.coco_classes import assumed_categories
from dn_detr_jax.errors import (
    ConfigError,
    ConversionError,
)
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.architecture import check_config, official_config
from dn_detr_jax.interop.class_heads import head_paths, reset_heads
from dn_detr_jax.interop.convert import ConversionReport, flat, params_from_torch
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names


def convert(
    state: Mapping[str, np.ndarray], config: ConfigDict, args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], ConversionReport]:
    """Parameters of the config's model from an official state dict.

    Args:
      state: tensors by official name.
      config: whole configuration; with `init.reset_heads` the heads come from its seed.
      args: command line of the PyTorch training, which tells DC5 and the number of heads.

    Returns:
      A nested dictionary of float32 arrays, and where every tensor went.

    Raises:
      ConversionError: a checkpoint of another model, with the config that would fit.
    """
    found = official_config(state, args or {}, config.model)
    check_config(found, config, reset_heads=config.init.reset_heads)
    source = copy.deepcopy(config.model)  # with the number of classes of the checkpoint
    source.num_classes = found["model.num_classes"]
    shapes = flat(abstract_params(build_model(source)))
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    names = torch_names(config.model)
    params, report = params_from_torch(state, shapes, names)
    if report.unfilled:
        raise ConversionError(f"nothing in the source for {', '.join(report.unfilled)}")
    if config.init.reset_heads:
        fresh = _fresh_heads(build_model(config.model), config.seed)
        classes = source.num_classes, config.model.num_classes
        params = reset_heads(params, params | fresh, classes)
        replaced, _ = names.tensors({path: shapes[path] for path in fresh})
        report = dataclasses.replace(
            report,
            filled=tuple(path for path in report.filled if path not in fresh),
            unused=(*report.unused, *(tensor.name for tensor in replaced)),
        )
    return traverse_util.unflatten_dict(params, sep="/"), report


def _fresh_heads(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Initial values of the head's parameters, by path."""

    @jax.jit  # computes nothing but what is returned
    def init(key):
        params = model.init(key, jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64))["params"]
        params = flat(params)
        return {path: params[path] for path in head_paths(params)}

    return jax.device_get(init(jax.random.key(seed)))


def import_file(
    source: str | Path, config: ConfigDict, out: str | Path, entry: str | None = None
) -> ConversionReport:
    """Writes the checkpoint of a file into a new work directory.

    Args:
      source: `.pth`, `.pth.tar`, `.safetensors` or `.npz`.
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
    file = torch_files.read(source, entry)
    if not config.model.num_classes:
        config = copy.deepcopy(config)
        found = official_config(file.state, file.args, config.model)
        config.model.num_classes = found["model.num_classes"]
    params, report = convert(file.state, config, file.args)
    report = dataclasses.replace(report, stripped=file.stripped)
    categories = assumed_categories(config.model.num_classes)
    with Checkpoints(out, config, categories=categories) as checkpoints:
        checkpoints.save(0, {"params": params})
    print(f"{file.description()}: {report.summary()}")
    if not file.args and not config.model.backbone.dilation:
        print(
            "The file does not say whether it is a DC5 model: if it is, import it with "
            "--config.model.backbone.dilation=True"
        )
    print(f"Wrote {Path(out) / 'checkpoints' / '0'}")
    return report
