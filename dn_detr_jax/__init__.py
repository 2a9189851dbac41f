"""DN-DETR (query denoising on DAB-DETR) in JAX and Flax, for TPU, GPU and CPU.

`train(config, workdir, **overrides)` and `evaluate(config, workdir)` do what `train.py` does;
`load(workdir)` returns a `Predictor`, whose `predict` finds the objects in images.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ml_collections import ConfigDict

    from dn_detr_jax.evaluation.evaluator import Evaluation
    from dn_detr_jax.inference.detections import Detections as Detections
    from dn_detr_jax.inference.predictor import Predictor as Predictor
    from dn_detr_jax.inference.predictor import load as load

__version__ = "0.1.0"

_OF_PREDICTOR = ("Detections", "Predictor", "load")


# Imports wait for the first use: parts of this package run without the libraries of the others.


def train(
    config: "ConfigDict | str | os.PathLike", workdir: str | os.PathLike, **overrides: Any
) -> "Evaluation | None":
    """Trains a detector, or resumes the training in a work directory.

    Args:
      config: whole configuration, the path of a config file, or the name of an experiment in
        `configs/`.
      workdir: for checkpoints, metrics and drawn images.
      **overrides: other values of config keys, sections as dictionaries:
        `train("digits", "runs/digits", seed=1, train={"duration": "2 epochs"})`. Dotted keys are
        possible too: `**{"train.duration": "2 epochs"}`.

    Returns:
      The evaluation of the best checkpoint, or None if a signal ended the training early.

    Raises:
      dn_detr_jax.errors.Error: see `dn_detr_jax.training.loop.train`.
    """
    config, folder = _checked(config, workdir, overrides)
    from dn_detr_jax.training import loop

    return loop.train(config, folder)


def evaluate(
    config: "ConfigDict | str | os.PathLike",
    workdir: str | os.PathLike,
    step: str | int = "best",
    **overrides: Any,
) -> "Evaluation":
    """Evaluates a checkpoint of a work directory and prints the COCO table.

    Args:
      config: as for `train`; must fit the parameters of the checkpoint.
      workdir: of a training or an import.
      step: "best" (the latest if none was evaluated, as after an import), "latest" or a number.
      **overrides: as for `train`.

    Raises:
      dn_detr_jax.errors.Error: see `dn_detr_jax.training.report.evaluate`.
    """
    config, folder = _checked(config, workdir, overrides)
    from dn_detr_jax.training import report

    return report.evaluate(config, folder, step)


def _checked(
    config: "ConfigDict | str | os.PathLike", workdir: str | os.PathLike, overrides: dict[str, Any]
) -> "tuple[ConfigDict, Path]":
    """Returns the config with its overrides, valid, and the path of the work directory."""
    from dn_detr_jax.config import expand_user, load_config, overridden, validate

    if isinstance(config, str | os.PathLike):
        config = load_config(os.fspath(config))
    config = overridden(config, overrides)
    validate(config)
    return config, expand_user(os.fspath(workdir), "--workdir")


def __getattr__(name: str) -> Any:
    if name in _OF_PREDICTOR:
        from dn_detr_jax.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_PREDICTOR])
