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
from dn_detr_jax.interop.convert import (
    HEAD_PATHS,
    ConversionReport,
    check_config,
    flat,
    official_config,
    params_from_torch,
    reset_heads,
)
from dn_detr_jax.models.registry import abstract_params, build_model


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
    check_config(official_config(state, args or {}), config, reset_heads=config.init.reset_heads)
    model = build_model(config.model)
    shapes = {path: leaf.shape for path, leaf in flat(abstract_params(model)).items()}
    kept = HEAD_PATHS if config.init.reset_heads else ()
    wanted = {path: shape for path, shape in shapes.items() if path not in kept}
    params, report = params_from_torch(state, wanted)
    if report.unfilled:
        raise ConversionError(f"nothing in the source for {', '.join(report.unfilled)}")
    if kept:
        table = np.asarray(state["label_enc.weight"], np.float32)
        params = reset_heads(
            params | {"label_embedding": table}, params | _fresh_heads(model, config.seed)
        )
    return traverse_util.unflatten_dict(params, sep="/"), report


def _fresh_heads(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Initial values of the head's parameters, by path."""

    @jax.jit  # computes nothing but what is returned
    def init(key):
        params = model.init(key, jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64))["params"]
        return {path: value for path, value in flat(params).items() if path in HEAD_PATHS}

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
        config.model.num_classes = official_config(file.state, file.args)["model.num_classes"]
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
