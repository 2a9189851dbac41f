"""Writes the parameters of a work directory as a state dict of the official PyTorch code.

    python -m dn_detr_jax export-torch runs/r50 --out r50.pth [--step latest]

`r50.pth` is what `torch.save({"model": state_dict}, ...)` gives and the official code resumes from;
the suffixes `.safetensors` and `.npz` give the state dict alone. Import followed by export returns
every tensor bit by bit.
"""

from pathlib import Path

import jax

from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.interop.convert import params_to_torch
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names


def export(workdir: str | Path, step: str | int = "latest") -> dict:
    """The official state dict of a checkpoint.

    Args:
      workdir: of a training or an import.
      step: "latest", "best" or a step.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
      ConfigError: a variant without official weights.
      ConversionError: a model that the official code does not have.
    """
    config, _ = read_run_config(workdir)
    names = torch_names(config.model)
    shapes = abstract_params(build_model(config.model))
    return params_to_torch(jax.device_get(read_params(workdir, shapes, step).params), names)
