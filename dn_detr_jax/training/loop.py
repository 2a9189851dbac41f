"""The training loop, read from top to bottom.

The order of operations is the contract that makes runs resumable: a checkpoint holds the state
after a number of steps, and everything else (data, noise, schedule) follows from the number.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.manager import RAW_AP, Checkpoints
from dn_detr_jax.checkpoints.params import holds_only_parameters
from dn_detr_jax.data.datasets import Dataset, open_dataset
from dn_detr_jax.data.loader import Batch, images_in_epoch, train_batches, train_plan
from dn_detr_jax.distributed.consistency import (
    agreed_config,
    all_gather,
    check_agreement,
    check_shared,
)
from dn_detr_jax.errors import ConfigError, TrainingError
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.interop.initial import load_initial
from dn_detr_jax.matching import host_timer
from dn_detr_jax.models.registry import abstract_params, parameter_table, trainable
from dn_detr_jax.sharding import put_batch, replicated, with_sharding
from dn_detr_jax.training import report
from dn_detr_jax.training.loggers import check_installed
from dn_detr_jax.training.metrics import Window
from dn_detr_jax.training.nonfinite import NonFiniteGuard
from dn_detr_jax.training.optimizer import describe, make_optimizer, make_update_norm
from dn_detr_jax.training.patience import Patience
from dn_detr_jax.training.profile import Profile
from dn_detr_jax.training.programs import Programs
from dn_detr_jax.training.setup import (
    Plan,
    Setup,
    set_up,
    warn_of_leak,
    warn_of_too_many_objects,
)
from dn_detr_jax.training.state import (
    TrainState,
    abstract_state,
    evaluation_params,
    init_state,
    start_from,
)
from dn_detr_jax.training.step import jit_train_step
from dn_detr_jax.training.stop import StopRequest
from dn_detr_jax.training.writers import MetricWriter, Progress

PyTree = Any
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Optimization:
    """What is trained, and how.

    Attributes:
      params: shapes of the parameters.
      is_trained: whether a parameter is trained, by its path.
      optimizer: transformation of the gradients.
      schedule: learning rate by update.
      update_norm: from `make_update_norm`.
    """

    params: PyTree
    is_trained: dict[str, bool]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    update_norm: Callable[[PyTree, PyTree], jax.Array]

    @classmethod
    def of(cls, setup: Setup, plan: Plan) -> "_Optimization":
        """The optimization of a run; raises ConfigError for patterns that match nothing."""
        params = abstract_params(setup.model)
        is_trained = trainable(params, setup.config.model, setup.config.train.freeze)
        optimizer, schedule = make_optimizer(
            setup.config, params, plan.per_epoch, plan.total, is_trained
        )
        update_norm = make_update_norm(setup.config, params, schedule, is_trained)
        return cls(params, is_trained, optimizer, schedule, update_norm)


def train(config: ConfigDict, workdir: Path) -> Evaluation | None:
    """Trains, or continues a training, and ends with the evaluation of the best checkpoint.

    Without `train.eval_every` there is no evaluation, and the last checkpoint is the result.

    Args:
      config: whole configuration, validated.
      workdir: for checkpoints, metrics and figures; an existing run is continued.

    Returns:
      The evaluation; None if SIGTERM or Ctrl-C ended the training early, whose state is saved
      then, or if there is no evaluation.

    Raises:
      ConfigError, CheckpointError: the config, the data, the work directory or its run do not fit
        together, or another process trains in the work directory; before anything is compiled.
      DistributedError: processes with other configs or data, or without a common work directory.
      TrainingError: loss, gradients or matching costs are not finite, and `config.on_nonfinite`
        is "stop", or "skip" and too many steps were skipped. The checkpoints are from before.
      EvaluationError: detections are not finite, although the parameters are.
    """
    workdir = Path(workdir)
    if holds_only_parameters(workdir):
        raise ConfigError(
            "--workdir",
            str(workdir),
            "it holds imported parameters and no training to continue: start one from them in "
            f"another directory, with --config.init.checkpoint={workdir}",
        )
    check_installed(config.train.loggers)
    check_agreement(agreed_config(config))
    check_shared(workdir)
    training = open_dataset(config.data, "train")
    setup = set_up(config, training)
    plan = Plan.of(setup.config, images_in_epoch(training, setup.config))
    optimization = _Optimization.of(setup, plan)
    checkpoints = Checkpoints(
        workdir,
        setup.config,
        keep_latest=setup.config.checkpoint.keep_latest,
        keep_best=setup.config.checkpoint.keep_best,
        categories=setup.categories,
    )
    with checkpoints, contextlib.closing(_programs(setup, optimization)) as programs:
        _announce(setup, training, plan, optimization, workdir)
        run, batches, state = _start(setup, training, plan, optimization, checkpoints, programs)
        if not run.train(batches, state):
            return None
        return _finish(run, with_sharding(optimization.params, replicated(setup.mesh)))


def _programs(setup: Setup, optimization: _Optimization) -> Programs:
    """The programs of a training; none is compiled yet."""
    parts: dict[str, Any] = {"model": setup.model, "optimizer": optimization.optimizer}
    parts |= {"config": setup.config, "mesh": setup.mesh}
    trained = traverse_util.unflatten_dict(optimization.is_trained, sep="/")
    step = jit_train_step(**parts, trainable=trained)
    return Programs(setup, step, abstract_state(**parts), optimization.update_norm)


def _start(
    setup: Setup,
    training: Dataset,
    plan: Plan,
    optimization: _Optimization,
    checkpoints: Checkpoints,
    programs: Programs,
) -> tuple["_Run", Generator[Batch, None, None], TrainState]:
    """Restores or initializes the state, and compiles the step of the first batch."""
    config = setup.config
    latest = checkpoints.latest_step()
    check_agreement({"the latest checkpoint": latest})
    canvases = train_plan(training, config).next_canvases(latest or 0, plan.total)
    host_state: dict[str, Any] = {}
    if latest is not None:
        state, host_state = checkpoints.restore(programs.state)
        logger.info("continuing from step %d", int(state.step))
    elif config.init.checkpoint or config.init.backbone:
        state = init_state(setup.model, optimization.optimizer, config, setup.mesh)
        initial = load_initial(state.params, config, setup.categories)
        state = start_from(state, initial)
    else:  # nothing more can be wrong: the first step is compiled beside the initialization
        programs.compile_ahead(canvases)
        state = init_state(setup.model, optimization.optimizer, config, setup.mesh)
    start = int(state.step)
    batches = train_batches(
        training, config, start, plan.total - start, jax.process_index(), jax.process_count()
    )
    patience = Patience(config.train.stop_after, host_state.get("patience"))
    if canvases and not patience.is_over:
        programs.compile_ahead(canvases)
        programs.train_step(canvases[0])  # until then a signal ends the program at once
        if plan.profile:
            programs.finish(canvases)
    evaluator = None
    if setup.validation is not None:
        evaluator = Evaluator(setup.validation, config, programs.detect, setup.mesh)
        if host_state.get("instability") and evaluator.instability is not None:
            evaluator.instability.load_state_dict(host_state["instability"])

    def image_ids(step: int) -> np.ndarray:
        return training.image_ids[train_plan(training, config).batch(step - 1).indices]

    guard = NonFiniteGuard(config, image_ids, host_state.get("skipped_steps", 0))
    schedule = optimization.schedule
    run = _Run(setup, plan, programs, guard, schedule, patience, evaluator, checkpoints)
    return run, batches, state


def _finish(run: "_Run", shapes: PyTree) -> Evaluation | None:
    """Reports on the best checkpoint; evaluates it again only if it is not the last one.

    Without an evaluation the last checkpoint is reported.
    """
    validation, best = run.setup.validation, run.checkpoints.best_step()
    step = run.checkpoints.find("latest" if validation is None or best is None else best)
    params = run.checkpoints.restore_params(shapes, step)
    evaluation = None
    if validation is None:
        if best is not None:
            logger.warning("step %d, which has an AP, stays the best: name --step=latest", best)
    elif run.last_evaluation is None or run.last_evaluation[0] != step:
        evaluator = Evaluator(validation, run.setup.config, run.programs.detect, run.setup.mesh)
        evaluation = evaluator(params)
    else:
        evaluation = run.last_evaluation[1]
    average = run.checkpoints.has_average(step)
    report.print_result(evaluation, run.checkpoints.directory / str(step), average)
    workdir = run.checkpoints.workdir
    report.save_run_figures(run.setup, run.programs.detect, params, workdir, evaluation)
    return evaluation


def _announce(
    setup: Setup,
    training: Dataset,
    plan: Plan,
    optimization: _Optimization,
    workdir: Path,
) -> None:
    """Logs parameters, data and duration of the training; lists the parameters in a file."""
    table = parameter_table(optimization.params, optimization.is_trained)
    rates = describe(optimization.params, setup.config, optimization.is_trained)
    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(f"{table}\n\n{rates}\n", encoding="utf-8")
    logger.info("%s, see %s\n%s", table.splitlines()[-1], workdir / "parameters.txt", rates)
    per_image = training.annotations.counts
    over = int((per_image > setup.config.data.max_objects).sum())
    logger.info(
        "%s: %d training images, %s validation images, %d classes; up to %d objects in an "
        "image, %d images have more than data.max_objects=%d",
        training.name,
        len(training),
        "no" if setup.validation is None else len(setup.validation),
        len(training.categories),
        per_image.max(initial=0),
        over,
        setup.config.data.max_objects,
    )
    if setup.validation is None:
        logger.warning("no evaluation (train.eval_every): the last checkpoint is the result")
    warn_of_too_many_objects(setup.config, [training, setup.validation])
    warn_of_leak(setup.config)
    per_epoch = images_in_epoch(training, setup.config)
    if per_epoch != len(training) or training.mixed:
        logger.info("an epoch has %d images (data.sampling, data.mix)", per_epoch)
    logger.info(
        "%d steps of %d images (%.1f epochs) on %d %s devices",
        plan.total,
        setup.config.train.batch_size,
        plan.total / plan.per_epoch,
        setup.mesh.size,
        jax.devices()[0].platform,
    )
    epoch = train_plan(training, setup.config).epoch(0)
    logger.info(
        "first epoch: %.1f%% of the pixels are padding; to complete batches %d images are "
        "augmented anew, %d are made smaller",
        100 * epoch.padding,
        epoch.redrawn,
        epoch.shrunken,
    )


class _Run:
    """A training under way: the loop over steps, and its periodic work.

    Attributes:
      setup: config, devices, model and validation data.
      programs: the compiled steps and the detection of the evaluation.
      checkpoints: of the work directory.
      last_evaluation: step and result of the last evaluation of this process.
    """

    def __init__(
        self,
        setup: Setup,
        plan: Plan,
        programs: Programs,
        guard: NonFiniteGuard,
        schedule: optax.Schedule,
        patience: Patience,
        evaluator: Evaluator | None,
        checkpoints: Checkpoints,
    ):
        self.setup, self.programs, self.checkpoints = setup, programs, checkpoints
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self._plan, self._guard = plan, guard
        self._schedule = jax.jit(schedule)  # a program in place of one for each operation
        self._patience, self._evaluator = patience, evaluator
        self._window = Window()

    def train(self, batches: Generator[Batch, None, None], state: TrainState) -> bool:
        """Trains to the end of the plan or of the patience; False if a signal ended it before."""
        start, first = int(state.step), jax.process_index() == 0
        workdir = self.checkpoints.workdir
        with (
            MetricWriter(workdir, first, start, self.setup.config) as self._writer,
            StopRequest(several_processes=jax.process_count() > 1) as stop,
            Profile.of(self._plan, start, workdir if first else None) as profile,
        ):
            self._progress = Progress(self._plan.total, start, first)
            if start == 0:
                self._writer.text("config", str(self.setup.config))
            try:
                finished = self._steps(batches, state, stop, profile)
                self.checkpoints.wait()  # outside, a signal would end the process at once
                return finished
            finally:
                batches.close()
                self._progress.close()

    def _steps(
        self,
        batches: Generator[Batch, None, None],
        state: TrainState,
        stop: StopRequest,
        profile: Profile,
    ) -> bool:
        plan, window = self._plan, self._window
        window.restart()
        first = int(state.step) + 1
        for step in range(first, plan.total + 1):
            if self._patience.is_over:
                self._progress.message(f"ended after step {step - 1}: {self._patience}")
                break
            waited = time.monotonic()
            batch = next(batches)
            window.waiting += time.monotonic() - waited
            window.dropped += batch.pop("dropped_objects")
            window.bad_images += batch.pop("bad_images")
            program = self._train_step(batch["image"].shape[1:3], state)
            with profile.step(step):
                rows = put_batch(batch, self.setup.mesh)
                # The batch is the only transfer: another one would be made in every step.
                with jax.transfer_guard("disallow"):
                    state, metrics = program(state, rows)
            profile.end_of_step(step, metrics.values)
            window.add(metrics)
            self._progress.update(step)
            if step == first:
                jax.block_until_ready(state)
                self.programs.compile_others()

            last = step == plan.total
            if step % plan.log_every == 0 or last:
                self._log(step, state)
            evaluates = plan.eval_every and (step % plan.eval_every == 0 or last)
            metrics_of_step = self._evaluate(step, state) if evaluates else None
            stopped = self._stops(stop.received, step)
            if evaluates or last or stopped or step % plan.checkpoint_every == 0:
                self._save(step, state, metrics_of_step)
            if stopped:
                self.checkpoints.wait()
                self._progress.message(
                    f"{stop.name or 'SIGTERM'}: saved step {step}; the same command continues"
                )
                return False
        return True

    def _train_step(self, canvas: tuple[int, int], state: TrainState) -> Callable:
        """Returns the compiled step of a canvas; the time to wait for it is not the training's."""
        if not self.programs.is_ready(canvas):
            jax.block_until_ready(state)  # an accelerator's compiler times kernels
            start = time.monotonic()
            self.programs.train_step(canvas)
            seconds = time.monotonic() - start
            self._window.leave_out(seconds)
            self._progress.pause(seconds)
        return self.programs.train_step(canvas)

    def _stops(self, received: bool, step: int) -> bool:
        """Whether to stop after this step, the same on all processes."""
        if jax.process_count() == 1:
            return received
        # After a signal to one of them, they agree on a step that none has reached yet.
        return multihost_utils.reached_preemption_sync_point(step)

    def _log(self, step: int, state: TrainState) -> None:
        """Writes the means since the last log; waits for the device.

        The norm of the update is that of the last one.
        """
        values = self._checked(step)
        if values is None:
            return
        window, config = self._window, self.setup.config
        seconds = window.seconds()
        if values:  # else every update was skipped
            values["update_norm"] = float(self.programs.update_norm(state))
        # Each process counts its own rows; the slowest one determines the times.
        here = [window.waiting, host_timer.take(), window.dropped, window.bad_images]
        everywhere = all_gather(np.array(here))
        waiting, matching, _, _ = everywhere.max(axis=0)
        _, _, dropped, bad_images = everywhere.sum(axis=0)
        rate = config.train.batch_size * window.count / seconds
        record = {f"train/{name}": value for name, value in values.items()}
        if config.on_nonfinite == "skip":
            record["train/skipped_steps"] = self._guard.skipped
        record |= {
            # The optimizer counts its updates, not the steps.
            "train/learning_rate": self._schedule(max(step - 1 - self._guard.skipped, 0)),
            "train/epoch": step / self._plan.per_epoch,
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
        """Returns the means of the metrics since the last call; raises if one is not finite."""
        if not self._window.metrics:
            return None
        metrics = jax.device_get(self._window.metrics)
        self._window.metrics.clear()
        names, rows = metrics[0].names, np.stack([of_step.values for of_step in metrics])
        try:
            return self._guard.means(step - len(rows) + 1, names, rows, self._progress.message)
        except TrainingError as error:
            saved = self.checkpoints.latest_step()
            raise TrainingError(
                f"{error}. {'Nothing is saved' if saved is None else f'Step {saved} is saved'}; a "
                "lower optimizer.learning_rate or a longer optimizer.warmup usually helps"
            ) from None

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates and logs; returns the metrics that the checkpoint keeps."""
        assert self._evaluator is not None  # with train.eval_every
        self._log(step, state)  # raises for values that are not finite, before they are evaluated
        start = time.monotonic()
        evaluation = self._evaluator(evaluation_params(state, self.setup.mesh))
        both = state.ema is not None and self.setup.config.eval.raw
        raw = self._evaluator(state.params, compare=False).metrics if both else {}
        seconds = time.monotonic() - start
        self._patience.update(evaluation.metrics["AP"])
        record = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
        record |= {f"eval_class/{name}": value for name, value in evaluation.per_class.items()}
        for figure, by_class in evaluation.class_figures.items():
            record |= {f"eval_class_{figure}/{name}": value for name, value in by_class.items()}
        record |= {f"eval_raw/{name}": value for name, value in raw.items()}
        self._writer.scalars(step, record | {"time/eval_seconds": seconds})
        instability = evaluation.metrics.get("instability")
        self._progress.message(
            f"step {step}{'' if state.ema is None else ' (moving average)'}: "
            f"AP {evaluation.metrics['AP']:.3f}, AP50 {evaluation.metrics['AP50']:.3f}"
            + (f", without averaging AP {raw['AP']:.3f}" if both else "")
            + (f", instability {instability:.2f}" if instability is not None else "")
            + f" ({seconds:.1f} s)"
        )
        self._progress.pause(seconds)
        self.last_evaluation = (step, evaluation)
        self._window.restart()
        return evaluation.metrics | ({RAW_AP: raw["AP"]} if both else {})

    def _save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        self._log(step, state)
        host_state: dict[str, Any] = {
            "skipped_steps": self._guard.skipped,
            "patience": self._patience.state_dict(),
        }
        if self._evaluator is not None and self._evaluator.instability is not None:
            host_state["instability"] = self._evaluator.instability.state_dict()
        self.checkpoints.save(step, state, host_state, metrics)
