"""The evidence that a report is made of: a run opened, evaluated, and applied to some images.

Nothing is written into the work directory.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import steps_in
from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.config import base_config
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.inspection import tracing
from dn_detr_jax.inspection.stability import Stability, measure
from dn_detr_jax.inspection.tracing import LayerOutputs, Trace
from dn_detr_jax.models.registry import abstract_params, num_matching_queries
from dn_detr_jax.sharding import replicated, with_sharding
from dn_detr_jax.training.programs import Programs
from dn_detr_jax.training.setup import Setup, set_up
from dn_detr_jax.training.step import denoising_queries
from dn_detr_jax.training.writers import read_metrics

logger = logging.getLogger(__name__)
_BATCH = ("image", "size", "labels", "boxes", "valid", "image_id")


@dataclasses.dataclass(frozen=True)
class View:
    """An image as the detector gets it.

    Attributes:
      pixels: uint8 [h, w, 3] RGB, without padding.
      canvas: height and width with padding.
      labels: int [n], of its objects.
      boxes: float [n, 4] cxcywh, normalized.
      trace: of the detector; None for an image that is only shown.
      row: of the image in the trace's batch.
      dn: denoising queries of the image, [1, S] each; None without denoising.
    """

    pixels: np.ndarray
    canvas: tuple[int, int]
    labels: np.ndarray
    boxes: np.ndarray
    trace: Trace | None = None
    row: int = 0
    dn: Denoising | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is being inspected.

    Attributes:
      name: for headings.
      workdir: of the run.
      setup: config, model and validation split.
      programs: its compiled detection.
      params: of the checkpoint.
      step: of the checkpoint.
      evaluation: of the checkpoint, with `matches`.
    """

    name: str
    workdir: Path
    setup: Setup
    programs: Programs
    params: Any
    step: int
    evaluation: Evaluation

    @property
    def image_ids(self) -> np.ndarray:
        """Of the validation split."""
        assert self.setup.validation is not None
        return self.setup.validation.image_ids

    @property
    def class_names(self) -> list[str]:
        """By position in the evaluation's figures."""
        return list(self.evaluation.per_class)


def open_run(name: str, workdir: Path, step: str | int, data_dir: str | None = None) -> Run:
    """Reads a run, compiles its detection for one device, and evaluates it.

    Args:
      name: for headings.
      workdir: of a training or an import.
      step: "best", "latest" or a number.
      data_dir: folder of the data, if it is not where the config says.

    Raises:
      CheckpointError, ConfigError, DataError: something is missing or does not fit.
    """
    if not (workdir / "config.json").is_file():
        what = "it has no config.json" if workdir.is_dir() else "there is no such directory"
        raise CheckpointError(f"{workdir}: no work directory of a run: {what}")
    config, categories = read_run_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    # Others may have made the run: its options of the compiler and its cache are not used, and this
    # machine may have other devices.
    config.compile = base_config().compile
    config.mesh.data = 1
    if "remat" in config.model:
        config.model.remat = ()
    config.data.skip_bad = True
    setup = set_up(config, None, categories or None, str(workdir))
    programs = Programs(setup)
    shapes = with_sharding(abstract_params(setup.model), replicated(setup.mesh))
    found = read_params(workdir, shapes, step, setup.config)
    assert setup.validation is not None  # of an evaluation
    evaluator = Evaluator(setup.validation, setup.config, programs.detect, setup.mesh)
    logger.info("%s: evaluating step %d", name, found.step)
    evaluation = evaluator(found.params, compare=False)
    return Run(name, workdir, setup, programs, found.params, found.step, evaluation)


def check_same_images(runs: Sequence[Run]) -> None:
    """Raises DataError unless all runs are evaluated on the same images and classes."""
    first = runs[0]
    for run in runs[1:]:
        if not np.array_equal(np.sort(first.image_ids), np.sort(run.image_ids)):
            raise DataError(
                f"{first.workdir} and {run.workdir} are evaluated on different images: runs are "
                "compared on one validation split"
            )
        if first.class_names != run.class_names:
            raise DataError(f"{first.workdir} and {run.workdir} have different classes")


def errors_by_image(run: Run) -> dict[int, int]:
    """Counts missed objects and wrong detections of every image, at the run's threshold."""
    matches = run.evaluation.matches
    assert matches is not None  # on the first process
    # NaN, if nothing is right, shows nothing.
    shown = (matches.scores >= run.evaluation.metrics["threshold"]) & ~matches.ignored
    wrong = matches.images[shown & ~matches.correct]
    taken = np.zeros(len(matches.object_labels), bool)
    taken[matches.found[shown & matches.correct]] = True
    missed = matches.object_images[~taken & ~matches.object_ignored]
    ids, counts = np.unique(np.concatenate([wrong, missed]), return_counts=True)
    return dict.fromkeys(run.image_ids.tolist(), 0) | dict(
        zip(ids.tolist(), counts.tolist(), strict=True)
    )


def view_images(run: Run, shown: Sequence[int], traced: Sequence[int]) -> dict[int, View]:
    """Reads images, and traces the detector through some of them.

    Args:
      run: whose detector and validation split are used.
      shown: image ids.
      traced: ids of those to trace.

    Returns:
      By image id; images that can't be read are missing.
    """
    setup = run.setup
    views: dict[int, View] = {}
    if traced:
        outputs = LayerOutputs(setup.model, setup.config, details=True)
        for batch in _batches(run, traced, len(traced)):
            trace = tracing.read_trace(outputs(run.params, batch), batch["valid"])
            for row in np.flatnonzero(batch["image_id"] >= 0).tolist():
                dn = _denoising(batch, row, setup.config)
                views[int(batch["image_id"][row])] = _view(batch, row, trace, dn)
    others = [image_id for image_id in shown if image_id not in views]
    for batch in _batches(run, others, max(len(others), 1)):
        for row in np.flatnonzero(batch["image_id"] >= 0).tolist():
            views[int(batch["image_id"][row])] = _view(batch, row)
    return views


def measure_stability(run: Run, shown: Sequence[int], most: int) -> Stability:
    """Applies every checkpoint that the run has kept to some images.

    Args:
      run: with its checkpoints.
      shown: ids of images whose queries are kept.
      most: number of images; more only if more are shown.
    """
    setup = run.setup
    outputs = LayerOutputs(setup.model, setup.config, details=False)
    ids = [*shown, *(i for i in run.image_ids.tolist() if i not in shown)][: max(most, len(shown))]
    cached = list(_batches(run, ids, min(setup.config.eval.batch_size, len(ids))))
    readable = {int(i) for batch in cached for i in batch["image_id"]}

    def match(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        return tracing.match(np.asarray(outputs(params, batch)["cost"]), batch["valid"])

    num_queries = num_matching_queries(setup.config.model)
    kept = [image_id for image_id in shown if image_id in readable]
    return measure(_checkpoints(run), lambda: cached, match, num_queries, kept)


def evaluated_steps(run: Run) -> list[int]:
    """The steps at which the training evaluated, from its metrics."""
    return sorted({line["step"] for line in read_metrics(run.workdir) if "eval/AP" in line})


def _checkpoints(run: Run) -> Iterator[tuple[int, Any]]:
    """Yields the kept checkpoints, ascending; one that is removed meanwhile is left out."""
    shapes = with_sharding(abstract_params(run.setup.model), replicated(run.setup.mesh))
    for step in sorted(steps_in(run.workdir / "checkpoints")):
        try:
            yield step, read_params(run.workdir, shapes, step, run.setup.config).params
        except CheckpointError as error:
            logger.warning("left out: %s", error)


def _batches(run: Run, ids: Sequence[int], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Reads images of the validation split."""
    if not ids:
        return
    config = copy.deepcopy(run.setup.config)
    config.eval.batch_size = batch_size
    position = {image_id: i for i, image_id in enumerate(run.image_ids.tolist())}
    subset = np.array([position[image_id] for image_id in ids])
    assert run.setup.validation is not None
    for batch in eval_batches(run.setup.validation, config, subset=subset):
        yield {name: batch[name] for name in _BATCH}


def _view(
    batch: dict[str, np.ndarray], row: int, trace: Trace | None = None, dn: Denoising | None = None
) -> View:
    height, width = batch["size"][row]
    real = batch["valid"][row]
    return View(
        pixels=batch["image"][row, :height, :width],
        canvas=batch["image"].shape[1:3],
        labels=batch["labels"][row, real],
        boxes=batch["boxes"][row, real],
        trace=trace,
        row=row,
        dn=dn,
    )


def _denoising(batch: dict[str, np.ndarray], row: int, config: ConfigDict) -> Denoising | None:
    """Draws the denoising queries that a training would give to an image."""
    one = {name: jnp.asarray(values[row : row + 1]) for name, values in batch.items()}
    dn = denoising_queries(one, jax.random.key(config.seed), config)
    return None if dn is None else jax.device_get(dn)
