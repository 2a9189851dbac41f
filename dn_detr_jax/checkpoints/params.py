"""The parameters of a run's checkpoint, to evaluate, predict or start from."""

import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.checksums import verify_checksums, was_written
from dn_detr_jax.checkpoints.failures import first_line
from dn_detr_jax.checkpoints.manager import Checkpoints, steps_in
from dn_detr_jax.errors import CheckpointError

PyTree = Any
logger = logging.getLogger(__name__)

_ATTEMPTS = 5  # to read beside a training that removes checkpoints


@dataclasses.dataclass(frozen=True)
class RestoredParams:
    """Parameters of a checkpoint, to evaluate or predict with.

    Attributes:
      params: the moving average if the run keeps one, else the parameters.
      step: of the checkpoint.
      is_average: whether `params` is the moving average.
      threshold: score with the best F1 in the evaluation of these parameters during the training;
        None without one, as after an import.
    """

    params: PyTree
    step: int
    is_average: bool
    threshold: float | None = None


def read_params(
    workdir: str | os.PathLike,
    abstract_params: PyTree,
    step: str | int = "best",
    config: ConfigDict | None = None,
) -> RestoredParams:
    """Reads the parameters of a checkpoint, also while a training goes on in the work directory.

    If the training removes the checkpoint meanwhile, names such as "best" are looked up again.

    Args:
      workdir: of a training or an import.
      abstract_params: as for `Checkpoints.restore`.
      step: "best" (the latest if none has an AP, as after an import), "best_raw" (the parameters
        themselves where they, beside their moving average, had the best AP), "latest" or a step.
      config: compared with that of the directory as by a `read_only` `Checkpoints`.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it does not fit.
    """
    directory = Path(workdir) / "checkpoints"
    for attempt in range(1, _ATTEMPTS + 1):
        steps = steps_in(directory)
        try:
            return _read_params(workdir, abstract_params, step, config)
        except CheckpointError:
            if attempt == _ATTEMPTS or steps_in(directory) == steps:
                raise
    raise AssertionError("the last attempt returns or raises")


def _read_params(
    workdir: str | os.PathLike, abstract_params: PyTree, step: str | int, config: ConfigDict | None
) -> RestoredParams:
    with Checkpoints(workdir, config, read_only=True) as checkpoints:
        if step == "best" and checkpoints.best_step() is None:
            step = "latest"
        number = checkpoints.find(step)
        raw = step == "best_raw"
        params = checkpoints.restore_params(abstract_params, number, raw=raw)
        average = checkpoints.has_average(number)
        # The metrics are those of the average, if there is one.
        threshold = None if average and raw else _threshold(checkpoints.directory / str(number))
        return RestoredParams(params, number, average and not raw, threshold)


def _threshold(checkpoint: Path) -> float | None:
    """Reads the threshold with the best F1 from the metrics of a checkpoint."""
    try:
        if not was_written(checkpoint, "metrics"):
            return None
        verify_checksums(checkpoint, ["metrics"])
        metrics = json.loads((checkpoint / "metrics" / "metrics").read_text())
        threshold = float(metrics.get("threshold", math.nan))
    except Exception as error:  # any content; the parameters can be used without
        logger.warning("%s: can't be read (%s)", checkpoint / "metrics", first_line(error))
        return None
    return threshold if 0 <= threshold <= 1 else None


def holds_only_parameters(workdir: str | os.PathLike) -> bool:
    """Whether the latest checkpoint has no state of a training, as after an import."""
    folder = Path(workdir) / "checkpoints"
    steps = steps_in(folder)
    return bool(steps) and not (folder / str(steps[-1]) / "state").exists()
