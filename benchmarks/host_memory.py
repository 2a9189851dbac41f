"""Measures whether the memory of the host grows during a training.

    python -m benchmarks.host_memory --json memory.json
    python -m benchmarks.host_memory --config.data.workers=2

The benchmark trains a tiny detector with the real train.py for 2,000 steps, with its loader,
logging, evaluations and checkpoints. It samples the memory of the process and its children about
`--samples` times, when steps are logged. It records two kinds of memory: all of it (proportional
set size, which counts shared pages in part), and the anonymous part without mapped files, which
contains leaks.

A row has the largest memory in each quarter of the steps, and the slope over the second half in MB
per 1,000 steps. The slope is a least-squares fit to the means of ten equal parts of that half; its
standard error follows from their deviations from the line. The means average over steps that follow
an evaluation and steps that do not. Linux only.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks import common
from benchmarks.processes import family, megabytes
from benchmarks.trainings import Training, last_line, small_config, write_config
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config.durations import parse_duration
from dn_detr_jax.errors import ConfigError

FLAGS = flags.FLAGS
PARTS = 10


def long_config() -> ConfigDict:
    """Returns the config of the tiny detector, for 2,000 steps."""
    config = small_config()
    config.train.update(
        duration="2000 steps",
        log_every="5 steps",
        eval_every="100 steps",
        checkpoint_every="50 steps",
    )
    return config


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flags.DEFINE_config_dict("config", long_config())
    flags.DEFINE_integer("samples", 400, "Number of samples, at most.", lower_bound=4 * PARTS)
    flags.DEFINE_string("folder", "", "For data, run and log; empty: a temporary one.")
    flags.DEFINE_string("json", "", "Write the rows to this file, too.")


def checked_steps(config: ConfigDict) -> int:
    """Returns the steps of a training whose second half logs one for each part of the fit.

    Raises:
      ConfigError: it logs fewer, or a duration is not in steps.
    """
    total, every = (_steps(config, key) for key in ("duration", "log_every"))
    if total < 2 * PARTS * every:
        raise ConfigError("train.duration", total, f"{2 * PARTS} times train.log_every or more")
    return total


def _steps(config: ConfigDict, key: str) -> int:
    number, unit = parse_duration(config.train[key], f"train.{key}")
    if unit != "steps":
        raise ConfigError(f"train.{key}", config.train[key], "in steps")
    return int(number)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Memory after a step, in MB."""

    step: int
    all: float
    anonymous: float


def watch(training: Training, total: int) -> list[Sample]:
    """Returns samples of a training, from its first step to its last."""
    samples: list[Sample] = []
    every = total / FLAGS.samples
    due = 0.0

    def is_due() -> bool:
        time.sleep(0.01)
        return last_line(training.workdir).get("step", -1) >= due

    while training.wait_until(is_due):
        step = last_line(training.workdir)["step"]
        if step >= total:  # the report that follows is not part of the training
            break
        pids = family(training.process.pid)
        samples.append(Sample(step, megabytes(pids), megabytes(pids, "Pss_Anon")))
        due = step + every
    training.end_well()
    return samples


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Returns the slope of a line through the means of equal parts, and its standard error.

    Args:
      steps: [n], ascending.
      values: [n].
    """
    parts = np.array_split(np.arange(len(steps)), PARTS)
    x = np.array([steps[part].mean() for part in parts])
    y = np.array([values[part].mean() for part in parts])
    centered = x - x.mean()
    rise = float(centered @ y / (centered @ centered))
    rest = y - y.mean() - rise * centered
    return rise, float(np.sqrt(rest @ rest / (PARTS - 2) / (centered @ centered)))


def memory_rows(samples: Sequence[Sample], total: int) -> list[dict[str, Any]]:
    """Returns a row for each kind of memory."""
    steps = np.array([sample.step for sample in samples])
    half = steps >= total / 2
    rows = []
    for kind in ("all", "anonymous"):
        values = np.array([getattr(sample, kind) for sample in samples])
        rise, error = slope(steps[half], values[half])
        quarters = [values[steps * 4 // total == i].max() for i in range(4)]
        rows.append(
            {
                "memory": kind,
                "steps": total,
                "samples": len(samples),
                **{f"quarter_{i + 1}_mb": round(q, 1) for i, q in enumerate(quarters)},
                "mb_per_1000_steps": round(1000 * rise, 2),
                "standard_error": round(1000 * error, 2),
                "series": [[s, round(v, 2)] for s, v in zip(steps.tolist(), values, strict=True)],
            }
        )
    return rows


def measure(folder: Path, total: int) -> None:
    """Runs the training of `total` steps in a folder, and prints the report."""
    report = common.Report("host_memory")
    training = Training(write_config(FLAGS.config, folder), folder / "run")
    start = time.monotonic()
    samples = watch(training, total)
    minutes = round((time.monotonic() - start) / 60, 1)
    for row in memory_rows(samples, total):
        report.add(row | {"workers": FLAGS.config.data.workers, "minutes": minutes})
    report.show()


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    total = checked_steps(FLAGS.config)
    if FLAGS.folder:
        folder = Path(FLAGS.folder).absolute()
        folder.mkdir(parents=True)
        measure(folder, total)
    else:
        with tempfile.TemporaryDirectory() as name:
            measure(Path(name), total)


if __name__ == "__main__":
    define_flags()
    run_main(main)
