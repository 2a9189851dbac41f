"""The logs of a run: `metrics.jsonl`, the loggers of the config, and progress on the terminal.

`metrics.jsonl` in the work directory has one JSON object per line, `{"step": 50, "time": ..., ...}`
with the time in seconds since 1970; a value that is not finite is `null`. A resumed run continues
the file as if it had never been interrupted. `training.loggers` has TensorBoard and the others.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dn_detr_jax.files import named, read_json_lines, write_text_atomically
from dn_detr_jax.training.loggers import Loggers

_METRICS = "metrics.jsonl"


class MetricWriter:
    """Writes scalars, images and texts of a run; a context manager."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        enabled: bool = True,
        start_step: int = 0,
        config: ConfigDict | None = None,
    ):
        """Opens the files for appending.

        Args:
          workdir: the run's directory, made if necessary.
          enabled: False on all processes but the first: nothing is written.
          start_step: the step that the run starts or resumes from; lines of later steps, from an
            interrupted run, are removed.
          config: of the run; its `train.loggers` are used. None: TensorBoard.
        """
        self._file: TextIO | None = None
        self._loggers: Loggers | None = None
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / _METRICS
        _remove_after(workdir, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._loggers = Loggers(workdir, start_step, config)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line, and hands the numbers to the loggers.

        Args:
          step: steps done so far.
          values: numbers by name, also as arrays without dimensions. Waits for them if they
            are still being computed.

        Raises:
          OSError: with the file's name, such as for a full disk.
        """
        if self._file is None or self._loggers is None:
            return
        now = time.time()
        numbers = {name: _number(value) for name, value in values.items()}
        finite = {name: x for name, x in numbers.items() if math.isfinite(x)}
        line: dict[str, Any] = {"step": int(step), "time": round(now, 3)}
        line |= {name: finite.get(name) for name in numbers}
        with named(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._loggers.scalars(int(step), finite, now)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Hands images, uint8 [H, W, 3], by name to the loggers."""
        if self._loggers is not None:
            self._loggers.images(int(step), images)

    def text(self, name: str, text: str) -> None:
        """Hands a text, for example the config, to the loggers."""
        if self._loggers is not None:
            self._loggers.text(name, text)

    def close(self) -> None:
        """Flushes and closes; may be called twice.

        Raises:
          OSError: as `scalars`.
        """
        file, loggers = self._file, self._loggers
        self._file = self._loggers = None
        if loggers is not None:
            loggers.close()
        if file is not None:
            with named(self._path):
                file.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # The error that ended the run must not be replaced by one of closing the files.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a work directory's `metrics.jsonl` in their order; [] without the file.

    A last line that a killed run did not complete is left out.
    """
    lines = read_json_lines(Path(workdir) / _METRICS)
    return [line for line in lines if isinstance(line.get("step"), int)]


def _remove_after(workdir: Path, step: int) -> None:
    """Removes the lines of later steps from `metrics.jsonl`, atomically."""
    if (workdir / _METRICS).exists():
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        write_text_atomically(workdir / _METRICS, text)


def _number(value: Any) -> int | float:
    number = np.asarray(value).item()
    return int(number) if isinstance(number, bool) else number


class Progress:
    """Shows the progress of a training: a bar with the time left, or lines without a terminal.

    Every process may make one; those that are not `enabled` show nothing.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        """Starts the clock.

        Args:
          total_steps: steps of the whole training.
          start_step: steps done before.
          enabled: False: show nothing.
          stream: where to; None: stderr.
        """
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._total, self._start = total_steps, start_step
        self._began = time.monotonic()
        self._paused = 0.0
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
            )

    def update(self, step: int) -> None:
        """Moves the bar to `step`; does nothing without a bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, loss: float, images_per_second: float) -> None:
        """Shows the figures of a log event: beside the bar, or as a line of their own."""
        if self._bar is not None:
            self.update(step)
            self._bar.set_postfix_str(f"loss {loss:.4g}, {images_per_second:.1f} img/s")
        elif self._enabled:
            self.message(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:.4f}  "
                f"{images_per_second:.1f} img/s  {format_seconds(self._seconds_left(step))} left"
            )

    def message(self, text: str) -> None:
        """Shows a text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` spent on something else (an evaluation) out of the time left."""
        self._paused += seconds
        if self._bar is not None:
            self._bar.start_t += seconds

    def _seconds_left(self, step: int) -> float:
        done = step - self._start
        elapsed = time.monotonic() - self._began - self._paused
        return elapsed / done * (self._total - step) if done > 0 else math.nan

    def close(self) -> None:
        """Leaves the terminal clean; may be called twice."""
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """Returns a duration in its two largest units.

    Examples:
      >>> format_seconds(42.4), format_seconds(754), format_seconds(9000), format_seconds(200000)
      ('42s', '12m34s', '2h30m', '2d07h')
      >>> format_seconds(float("nan"))
      '?'
    """
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
