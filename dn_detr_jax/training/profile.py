"""An XProf trace of some early steps, with `config.train.profile`.

The trace lies in `profile/` of the work directory; `xprof --logdir WORKDIR/profile` shows it, and
so does TensorBoard with XProf's plugin. Every step is annotated with its number. Profiling changes
no result.
"""

import contextlib
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

import jax

from dn_detr_jax.training.setup import Plan

logger = getLogger(__name__)

_FIRST_STEPS = 10  # of a process: not profiled, because caches and prefetched batches fill


class Profile:
    """Traces a range of steps; a context manager."""

    def __init__(self, folder: Path | None, steps: range):
        """Prepares a trace.

        Args:
          folder: for the trace; None: nothing is traced.
          steps: to trace, counted from 1.
        """
        self._folder, self._steps = folder, steps if folder is not None else range(0)
        self._is_tracing = False

    @classmethod
    def of(cls, plan: Plan, start: int, workdir: Path | None) -> "Profile":
        """Prepares the trace of a run that continues after `start` steps.

        It covers `plan.profile` steps after the first 10 of this process, or the last ones if
        there are fewer left.
        """
        steps = min(plan.profile, plan.total - start)
        first = start + 1 + min(_FIRST_STEPS, plan.total - start - steps)
        return cls(workdir and workdir / "profile", range(first, first + steps))

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Annotates a step; starts the trace before the first step of the range."""
        if self._folder and self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end_of_step(self, step: int, result: jax.Array) -> None:
        """Ends the trace after the last step of the range, once the devices have done it."""
        if self._steps and step == self._steps[-1]:
            result.block_until_ready()
            self._stop()
            logger.info("steps %d to %d profiled in %s", self._steps[0], step, self._folder)

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
