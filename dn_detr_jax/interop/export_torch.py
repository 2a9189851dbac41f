"""The parameters of a work directory as a state dict of PyTorch code."""

from pathlib import Path

import jax

from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.interop.convert import params_to_torch
from dn_detr_jax.interop.names.elsewhere import source_named
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names


def export(workdir: str | Path, step: str | int = "latest", source: str = "official") -> dict:
    """The state dict of a checkpoint.

    Args:
      workdir: of a training or an import.
      step: "latest", "best" or a step.
      source: whose names, one of `names.elsewhere.SOURCES` or "official".

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
      ConfigError: a variant without official weights.
      ConversionError: a model that the official code does not have.
    """
    config, _ = read_run_config(workdir)
    names = torch_names(config.model)
    target = source_named(source, config.model)
    shapes = abstract_params(build_model(config.model))
    params = jax.device_get(read_params(workdir, shapes, step).params)
    return target.from_official(params_to_torch(params, names))
