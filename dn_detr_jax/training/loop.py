"""The training loop, read from top to bottom.

The order of operations is the contract that makes runs resumable: a checkpoint holds the state
after a number of steps, and everything else (data, noise, schedule) follows from the number.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import Checkpoints, holds_only_parameters
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.data.datasets import Dataset, open_dataset
from dn_detr_jax.data.loader import train_batches, train_plan
from dn_detr_jax.distributed.consistency import agreed_config, check_agreement, check_shared, gather
from dn_detr_jax.errors import ConfigError, TrainingError
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.interop.initial import load_initial
from dn_detr_jax.matching import host_timer
from dn_detr_jax.models.registry import abstract_params, parameter_table, trainable
from dn_detr_jax.sharding import put_batch, replicated, with_sharding
from dn_detr_jax.training.nonfinite import Watch
from dn_detr_jax.training.optimizer import describe, make_optimizer
from dn_detr_jax.training.report import draw, report
from dn_detr_jax.training.setup import Plan, Setup, compile_programs, set_up
from dn_detr_jax.training.state import (
    TrainState,
    abstract_state,
    evaluation_params,
    init_state,
    start_from,
)
from dn_detr_jax.training.step import jit_train_step
from dn_detr_jax.training.writers import MetricWriter, Progress

PyTree = Any
logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path) -> Evaluation | None:
    """Trains, or continues a training, and ends with the evaluation of the best checkpoint.

    Args:
      config: whole configuration.
      workdir: for checkpoints, metrics and pictures; a run that is there is continued.

    Returns:
      The evaluation, or None if SIGTERM ended the training early: its state is saved then.

    Raises:
      ConfigError, CheckpointError: something does not fit, before anything is compiled.
      DistributedError: processes with other configs or data, or without a common work directory.
      TrainingError: loss, gradients or matching costs are not finite, and `config.on_nonfinite`
        says stop, or skip but not that often. The checkpoints are from before.
      EvaluationError: detections are not finite, although the parameters are.
    """
    validate(config)
    if holds_only_parameters(workdir):
        raise ConfigError(
            "--workdir",
            str(workdir),
            "imported parameters lie there, and no training that could continue: start one from "
            f"them in another directory, with --config.init.checkpoint={workdir}",
        )
    check_agreement(agreed_config(config))
    check_shared(workdir)
    training = open_dataset(config.data, "train")
    setup = set_up(config, training)
    config = setup.config
    plan = Plan.of(config, len(training))
    params_shapes = abstract_params(setup.model)
    is_trained = trainable(params_shapes, config.model)
    train_mask = traverse_util.unflatten_dict(is_trained, sep="/")
    optimizer, schedule = make_optimizer(
        config, params_shapes, plan.per_epoch, plan.total, is_trained
    )
    checkpoints = Checkpoints(
        workdir,
        config,
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        categories=setup.validation.categories,
    )
    with checkpoints:
        _announce(setup, training, plan, params_shapes, is_trained, Path(workdir))
        step_function, metric_names = jit_train_step(
            model=setup.model,
            optimizer=optimizer,
            trainable=train_mask,
            config=config,
            mesh=setup.mesh,
        )
        check_agreement({"the latest checkpoint": checkpoints.latest_step()})
        shapes = abstract_state(setup.model, optimizer, config, setup.mesh)
        host_state: dict[str, Any] = {}
        if checkpoints.latest_step() is None:
            state = init_state(setup.model, optimizer, config, setup.mesh)
            if config.init.checkpoint or config.init.backbone:
                state = start_from(state, load_initial(state.params, config))
        else:
            state, host_state = checkpoints.restore(shapes)
            logger.info("continuing from step %d", int(state.step))
        start = int(state.step)
        batches = train_batches(
            training,
            config,
            start,
            plan.total - start,
            jax.process_index(),
            jax.process_count(),
        )
        to_compile = step_function if start < plan.total else None
        programs, detect = compile_programs(setup, to_compile, shapes)
        evaluator = Evaluator(setup.validation, config, detect, setup.mesh)
        if host_state.get("instability") and evaluator.meter is not None:
            evaluator.meter.load_state_dict(host_state["instability"])

        def image_ids(step: int) -> np.ndarray:
            return training.image_ids[train_plan(training, config).batch(step - 1).indices]

        watch = Watch(config, metric_names, image_ids, host_state.get("skipped_steps", 0))
        run = _Run(setup, plan, programs, watch, schedule, evaluator, checkpoints, Path(workdir))
        finished = run.train(batches, state)
        if not finished:
            return None
        return _finish(setup, run, detect, with_sharding(params_shapes, replicated(setup.mesh)))


def _finish(setup: Setup, run: "_Run", detect: Callable, shapes: PyTree) -> Evaluation:
    """Reports on the best checkpoint, evaluating it again only where it is not the last one."""
    best = run.checkpoints.best_step()
    step = best if best is not None else run.checkpoints.latest_step()
    params = run.checkpoints.restore_params(shapes, step)
    if run.last_evaluation is None or run.last_evaluation[0] != step:
        evaluator = Evaluator(setup.validation, setup.config, detect, setup.mesh)
        run.last_evaluation = (step, evaluator(params))
    folder = draw(setup, detect, params, run.workdir)
    average = run.checkpoints.has_average(step)
    report(run.last_evaluation[1], run.checkpoints.directory / str(step), folder, average)
    return run.last_evaluation[1]


def _announce(
    setup: Setup,
    training: Dataset,
    plan: Plan,
    params: PyTree,
    is_trained: dict[str, bool],
    workdir: Path,
) -> None:
    """Logs what is about to be trained, on what, for how long; lists the parameters in a file."""
    table = parameter_table(params, is_trained)
    rates = describe(params, setup.config, is_trained)
    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(f"{table}\n\n{rates}\n", encoding="utf-8")
    logger.info("%s, see %s\n%s", table.splitlines()[-1], workdir / "parameters.txt", rates)
    per_image = training.annotations.counts
    over = int((per_image > setup.config.data.max_objects).sum())
    logger.info(
        "%s: %d training pictures, %d validation pictures, %d classes; up to %d objects in a "
        "picture, %d pictures have more than data.max_objects=%d",
        training.name,
        len(training),
        len(setup.validation),
        len(training.categories),
        per_image.max(initial=0),
        over,
        setup.config.data.max_objects,
    )
    logger.info(
        "%d steps of %d pictures (%.1f epochs) on %d %s devices",
        plan.total,
        setup.config.train.batch_size,
        plan.total / plan.per_epoch,
        setup.mesh.size,
        jax.devices()[0].platform,
    )
    epoch = train_plan(training, setup.config).epoch(0)
    logger.info(
        "first epoch: %.1f%% of the pixels are padding; to complete batches %d pictures are "
        "augmented anew, %d are made smaller",
        100 * epoch.padding,
        epoch.redrawn,
        epoch.shrunken,
    )


class _StopSignal:
    """Turns SIGTERM into a flag that the loop reads between steps.

    With several processes JAX has a handler of its own, which tells the other processes.
    """

    def __init__(self):
        self.received = False
        self._previous = None

    def __enter__(self) -> "_StopSignal":
        # Only the main thread may install handlers; elsewhere (notebooks) there is none.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


class _Run:
    """A training under way: the loop over steps, and what it does every so often."""

    def __init__(
        self,
        setup: Setup,
        plan: Plan,
        programs: dict[tuple[int, int], Callable],
        watch: Watch,
        schedule: optax.Schedule,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        workdir: Path,
    ):
        self.setup, self.plan, self.programs = setup, plan, programs
        self.watch, self.schedule = watch, schedule
        self.evaluator, self.checkpoints, self.workdir = evaluator, checkpoints, workdir
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self._window = _Window()

    def train(self, batches: Iterator[dict], state: TrainState) -> bool:
        """Trains to the end of the plan; False if SIGTERM came before."""
        start, first = int(state.step), jax.process_index() == 0
        with (
            MetricWriter(self.workdir, first, start) as self._writer,
            _StopSignal() as stop,
        ):
            self._progress = Progress(self.plan.total, start, first)
            if start == 0:
                self._writer.text("config", str(self.setup.config))
            try:
                finished = self._steps(batches, state, start, stop)
                self.checkpoints.wait()  # outside, SIGTERM waits for nothing
                return finished
            finally:
                batches.close()
                self._progress.close()

    def _steps(
        self, batches: Iterator[dict], state: TrainState, start: int, stop: _StopSignal
    ) -> bool:
        plan, window = self.plan, self._window
        window.restart()
        for step in range(start + 1, plan.total + 1):
            waited = time.monotonic()
            batch = next(batches)
            window.waiting += time.monotonic() - waited
            window.dropped += batch.pop("dropped_objects")
            window.bad_images += batch.pop("bad_images")
            program = self.programs[batch["image"].shape[1:3]]
            state, metrics = program(state, put_batch(batch, self.setup.mesh))
            window.add(metrics)
            self._progress.update(step)

            last = step == plan.total
            if step % plan.log_every == 0 or last:
                self._log(step)
            evaluates = step % plan.eval_every == 0 or last
            evaluation = self._evaluate(step, state) if evaluates else None
            stopped = self._stops(stop.received, step)
            if evaluates or stopped or step % plan.checkpoint_every == 0:
                self._save(step, state, evaluation)
            if stopped and not last:
                self.checkpoints.wait()
                self._progress.message(f"SIGTERM: saved step {step}; the same command continues")
                return False
        return True

    def _stops(self, received: bool, step: int) -> bool:
        """Whether to stop after this step, the same on all processes."""
        if jax.process_count() == 1:
            return received
        # When one of them gets the signal, they agree on a step that none has reached yet.
        return multihost_utils.reached_preemption_sync_point(step)

    def _log(self, step: int) -> None:
        """Writes the means since the last log; the only place that waits for the device."""
        values = self._checked(step)
        if values is None:
            return
        window, config = self._window, self.setup.config
        seconds = window.seconds()
        # Each process knows of its own rows; the slowest one decides.
        here = [window.waiting, host_timer.take(), window.dropped, window.bad_images]
        everywhere = gather(np.array(here))
        waiting, matching, _, _ = everywhere.max(axis=0)
        _, _, dropped, bad_images = everywhere.sum(axis=0)
        rate = config.train.batch_size * window.count / seconds
        record = {f"train/{name}": value for name, value in values.items()}
        if config.on_nonfinite == "skip":
            record["train/skipped_steps"] = self.watch.skipped
        record |= {
            # The optimizer counts its updates, not the steps.
            "train/learning_rate": self.schedule(max(step - 1 - self.watch.skipped, 0)),
            "train/epoch": step / self.plan.per_epoch,
            "time/images_per_second": rate,
            "time/data_wait_share": waiting / seconds,
            "time/data_wait_seconds": waiting,
            "time/matching_seconds": matching,
            "time/seconds": seconds,
            "data/dropped_objects": int(dropped),
            "data/bad_images": int(bad_images),
        }
        for pattern, factor in config.optimizer.lr_multipliers:
            name = pattern.strip("^$/")
            record[f"train/learning_rate_{name}"] = factor * record["train/learning_rate"]
        self._writer.scalars(step, record)
        self._progress.log(step, values.get("loss", math.nan), rate)
        window.restart()

    def _checked(self, step: int) -> dict[str, float] | None:
        """Means of the metrics since the last call, after a check that all are finite."""
        if not self._window.metrics:
            return None
        rows = np.stack(jax.device_get(self._window.metrics))  # [steps, K]
        self._window.metrics.clear()
        try:
            return self.watch.means(step - len(rows) + 1, rows, self._progress.message)
        except TrainingError as error:
            saved = self.checkpoints.latest_step()
            raise TrainingError(
                f"{error}. {'Nothing is saved' if saved is None else f'Step {saved} is saved'}; a "
                "lower optimizer.learning_rate or a longer optimizer.warmup usually helps"
            ) from None

    def _evaluate(self, step: int, state: TrainState) -> Evaluation:
        self._log(step)  # what is not finite must neither be evaluated nor saved
        start = time.monotonic()
        evaluation = self.evaluator(evaluation_params(state, self.setup.mesh))
        seconds = time.monotonic() - start
        record = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
        record |= {f"eval_class/{name}": value for name, value in evaluation.per_class.items()}
        self._writer.scalars(step, record | {"time/eval_seconds": seconds})
        instability = evaluation.metrics.get("instability")
        self._progress.message(
            f"step {step}{'' if state.ema is None else ' (moving average)'}: "
            f"AP {evaluation.metrics['AP']:.3f}, AP50 {evaluation.metrics['AP50']:.3f}"
            + (f", instability {instability:.2f}" if instability is not None else "")
            + f" ({seconds:.1f} s)"
        )
        self._progress.pause(seconds)
        self.last_evaluation = (step, evaluation)
        self._window.restart()
        return evaluation

    def _save(self, step: int, state: TrainState, evaluation: Evaluation | None) -> None:
        self._log(step)
        host_state: dict[str, Any] = {"skipped_steps": self.watch.skipped}
        if self.evaluator.meter is not None:
            host_state["instability"] = self.evaluator.meter.state_dict()
        self.checkpoints.save(
            step, state, host_state, evaluation.metrics if evaluation is not None else None
        )


class _Window:
    """Figures since the last log."""

    def __init__(self):
        self.metrics: list[jax.Array] = []
        self.restart()

    def restart(self) -> None:
        """Starts anew; metrics that were not read yet stay."""
        self.count, self.waiting, self.dropped, self.bad_images = 0, 0.0, 0, 0
        self._start = time.monotonic()

    def add(self, metrics: jax.Array) -> None:
        self.metrics.append(metrics)
        self.count += 1

    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)
