"""The end of a training, and the evaluation of a trained run: COCO table and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import train_batches
from dn_detr_jax.distributed.consistency import agreed_config, check_agreement
from dn_detr_jax.evaluation import figures
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.models.registry import abstract_params
from dn_detr_jax.sharding import replicated, with_sharding
from dn_detr_jax.training.setup import Setup, compile_programs, set_up
from dn_detr_jax.training.step import denoising_queries
from dn_detr_jax.training.writers import MetricWriter, read_metrics
from dn_detr_jax.visualize.visualize import render_curves, render_detections

PyTree = Any


def evaluate(config: ConfigDict, workdir: Path, step: str | int = "best") -> Evaluation:
    """Evaluates a checkpoint, prints the COCO table and draws the pictures.

    Args:
      config: whole configuration; must fit the parameters of the checkpoint.
      workdir: of the training run.
      step: "latest", "best" (the latest where none has an AP, as after an import) or a number of
        steps.

    Raises:
      ConfigError, CheckpointError: something does not fit, before anything is compiled.
    """
    check_agreement(agreed_config(config))
    setup = set_up(config)
    config = setup.config
    shapes = with_sharding(abstract_params(setup.model), replicated(setup.mesh))
    with Checkpoints(workdir, config, read_only=True) as checkpoints:
        if step == "best" and checkpoints.best_step() is None:
            step = "latest"
        number = checkpoints.find(step)
        params = checkpoints.restore_params(shapes, number)
        average = checkpoints.has_average(number)
    _, detect = compile_programs(setup)
    evaluation = Evaluator(setup.validation, config, detect, setup.mesh)(params)
    folder = draw(setup, detect, params, workdir)
    report(evaluation, Path(workdir) / "checkpoints" / str(number), folder, average)
    return evaluation


def report(evaluation: Evaluation, checkpoint: Path, folder: Path | None, average: bool) -> None:
    """Prints the COCO table, and where checkpoint and pictures are.

    Args:
      evaluation: what was found.
      checkpoint: folder of the step.
      folder: of the pictures, if there are any.
      average: whether the moving average of the parameters was evaluated.
    """
    if jax.process_index() == 0:
        print(f"\n{evaluation.table()}\n", flush=True)
        if average:
            print("parameters  the moving average of train.ema_decay")
        print(f"checkpoint  {checkpoint}")
        print(f"pictures    {folder or 'none: eval.pictures is 0'}", flush=True)


def draw(setup: Setup, detect: Callable, params: PyTree, workdir: Path) -> Path | None:
    """Draws detections, denoising and curves into the work directory.

    All processes take part in the detection; the first one draws.
    """
    config = setup.config
    if not config.eval.pictures:
        return None
    shown = figures.detected(params, detect, setup.validation, config, setup.mesh)
    if jax.process_index() != 0:
        return None
    drawn = {"detections": render_detections(shown, setup.class_names)}
    if config.dn.groups:
        dataset = open_dataset(config.data, "train")
        batch = next(train_batches(dataset, config, 0, 1, process_count=jax.process_count()))
        del batch["dropped_objects"], batch["bad_images"]
        picture = figures.typical_picture(batch)
        dn = denoising_queries(picture, jax.random.key(config.seed), config)
        drawn |= figures.denoising_groups(picture, dn, config, setup.class_names)
    metrics = Path(workdir) / "metrics.jsonl"
    if metrics.exists():
        drawn["curves"] = render_curves({Path(workdir).name: metrics})
    last_step = max((line["step"] for line in read_metrics(workdir)), default=0)
    with MetricWriter(workdir, start_step=last_step) as writer:
        writer.images(last_step, drawn)
    return figures.save(drawn, workdir)
