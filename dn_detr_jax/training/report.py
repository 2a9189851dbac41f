"""The results of a run: the COCO table on the terminal, and figures and records as files.

A training draws its figures into `pictures/` of its work directory. An evaluation changes no file
of the run, which may be training meanwhile: it writes `evaluations/step_N.json` and its figures
into `evaluations/step_N/`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.params import RestoredParams, read_params
from dn_detr_jax.checkpoints.run_config import read_categories
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import train_batches
from dn_detr_jax.distributed.consistency import agreed_config, check_agreement
from dn_detr_jax.errors import Error, one_line
from dn_detr_jax.evaluation import figures
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.files import write_json_atomically
from dn_detr_jax.models.registry import abstract_params
from dn_detr_jax.sharding import replicated, with_sharding
from dn_detr_jax.training.programs import Programs
from dn_detr_jax.training.setup import Setup, resolve, set_up
from dn_detr_jax.training.step import denoising_queries
from dn_detr_jax.training.writers import MetricWriter, read_metrics
from dn_detr_jax.visualize.boxes import render_detections
from dn_detr_jax.visualize.plots import render_curves

PyTree = Any
logger = logging.getLogger(__name__)


def evaluate(config: ConfigDict, workdir: Path, step: str | int = "best") -> Evaluation:
    """Evaluates a checkpoint, prints the COCO table, and writes result and figures.

    It needs no training data, and no space or permission to write: the table comes first, and files
    that can't be written are a warning.

    Args:
      config: whole configuration, validated; must fit the parameters of the checkpoint.
      workdir: of the run, which may be training.
      step: "latest", "best" (the latest if none has an AP, as after an import), "best_raw" (see
        `read_params`) or a number of steps.

    Raises:
      ConfigError, CheckpointError: something does not fit, before anything is compiled.
    """
    workdir = Path(workdir)
    check_agreement(agreed_config(config))
    setup = set_up(config, None, read_categories(workdir), str(workdir))
    shapes = with_sharding(abstract_params(setup.model), replicated(setup.mesh))
    found = read_params(workdir, shapes, step, setup.config)
    check_agreement({"the checkpoint to evaluate": found.step})
    detect = Programs(setup).detect
    assert setup.validation is not None  # of an evaluation
    evaluation = Evaluator(setup.validation, setup.config, detect, setup.mesh)(found.params)
    print_result(evaluation, workdir / "checkpoints" / str(found.step), found.is_average)
    with _optional("the evaluation is not recorded"):
        _write_record(workdir, setup.config, found, evaluation)
    _save_evaluation_figures(setup, detect, found, workdir, evaluation)
    return evaluation


def print_result(evaluation: Evaluation | None, checkpoint: Path, average: bool) -> None:
    """Prints the COCO table and the checkpoint's folder, on the first process.

    Args:
      evaluation: result; None if there is none.
      checkpoint: folder of the step.
      average: whether the moving average of the parameters is meant.
    """
    if jax.process_index() == 0:
        if evaluation is not None:
            print(f"\n{evaluation.table()}\n")
        if average:
            print("parameters  the moving average of train.ema_decay")
        print(f"checkpoint  {checkpoint}", flush=True)


def save_run_figures(
    setup: Setup,
    detect: Callable,
    params: PyTree,
    workdir: Path,
    evaluation: Evaluation | None = None,
) -> None:
    """Draws detections, denoising and curves of a training into its work directory.

    All processes take part in the detection; the first one draws. Figures that can't be drawn or
    written are a warning.

    Args:
      setup: of the training.
      detect: `Programs.detect`.
      params: to detect with.
      workdir: of the training.
      evaluation: of these parameters, for the lowest score that is drawn; None: that is 0.5.
    """
    if not setup.config.eval.pictures:
        _print_folder(None)
        return
    folder = Path(workdir) / "pictures"
    with _optional("the figures are not complete"):
        drawn = _detections(setup, detect, params, evaluation)
        if jax.process_index() != 0:
            return
        if setup.config.dn.groups:
            drawn |= denoising_figures(setup.config)
        drawn |= _curves(workdir)
        figures.save(drawn, folder)
        last_step = max((line["step"] for line in read_metrics(workdir)), default=0)
        with MetricWriter(workdir, start_step=last_step, config=setup.config) as writer:
            writer.images(last_step, drawn)
        _print_folder(folder)


def _save_evaluation_figures(
    setup: Setup, detect: Callable, found: RestoredParams, workdir: Path, evaluation: Evaluation
) -> None:
    if not setup.config.eval.pictures:
        _print_folder(None)
        return
    folder = workdir / "evaluations" / f"step_{found.step}"
    with _optional("the figures are not complete"):
        drawn = _detections(setup, detect, found.params, evaluation)
        if jax.process_index() != 0:
            return
        figures.save(drawn | _curves(workdir), folder)
        _print_folder(folder)
        if setup.config.dn.groups:
            logger.warning("no figures of denoising: they show training images, see the training's")


def _print_folder(folder: Path | None) -> None:
    if jax.process_index() == 0:
        print(f"pictures    {folder or 'none: eval.pictures is 0'}", flush=True)


@contextlib.contextmanager
def _optional(consequence: str) -> Iterator[None]:
    """Turns an expected error into a warning: the result has been printed."""
    try:
        yield
    except (Error, OSError) as error:
        logger.warning("%s: %s", consequence, one_line(error))


def _write_record(
    workdir: Path, config: ConfigDict, found: RestoredParams, evaluation: Evaluation
) -> None:
    """Writes the result of an evaluation as `evaluations/step_N.json`, as a whole or not at all."""
    if jax.process_index() != 0:
        return

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    data = config.data
    record = {
        "step": found.step,
        "time": round(time.time(), 3),
        "parameters": "ema" if found.is_average else "params",
        "data": {"name": data.name, "dir": data.dir, **data.validation.to_dict()},
        "metrics": finite(evaluation.metrics),
        "per_class": finite(evaluation.per_class),
        "class_figures": {
            figure: finite(by_class) for figure, by_class in evaluation.class_figures.items()
        },
        "confusion": evaluation.confusion.tolist(),
    }
    write_json_atomically(workdir / "evaluations" / f"step_{found.step}.json", record)


def _detections(
    setup: Setup, detect: Callable, params: PyTree, evaluation: Evaluation | None
) -> dict[str, np.ndarray]:
    """Draws detections; {} on all processes but the first, and without validation data.

    Those with scores from the threshold with the best F1 on are drawn, as by `predict`.
    """
    if setup.validation is None:
        return {}
    shown = figures.detected(params, detect, setup.validation, setup.config, setup.mesh)
    if jax.process_index() != 0:
        return {}
    best = evaluation.metrics.get("threshold", math.nan) if evaluation else math.nan
    lowest = best if math.isfinite(best) else 0.5
    return {"detections": render_detections(shown, setup.class_names, lowest)}


def denoising_figures(config: ConfigDict) -> dict[str, np.ndarray]:
    """Draws the denoising queries of an image of the first training batch.

    Args:
      config: whole configuration, with at least one denoising group.

    Returns:
      RGB images by name, see `figures.denoising_groups`.
    """
    dataset = open_dataset(config.data, "train", images="packed")
    config = resolve(config, dataset)
    batch = next(train_batches(dataset, config, 0, 1, process_count=jax.process_count()))
    del batch["dropped_objects"], batch["bad_images"]
    image = figures.typical_image(batch)
    on_device = jax.tree.map(jnp.asarray, image)
    dn = denoising_queries(on_device, jax.random.key(config.seed), config)
    assert dn is not None  # config.dn.groups is not 0
    names = [category.name for category in dataset.categories]
    return figures.denoising_groups(image, dn, config, names)


def _curves(workdir: Path) -> dict[str, np.ndarray]:
    """Draws the curves of the run, if it has any metrics."""
    metrics = Path(workdir) / "metrics.jsonl"
    return {"curves": render_curves({Path(workdir).name: metrics})} if metrics.exists() else {}
