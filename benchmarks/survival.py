"""Does a training that is killed again and again end like one that nobody disturbed?

    python -m benchmarks.survival --json survival.json
    python -m benchmarks.survival --signals 3 --config.train.duration="40 steps"

Trains a tiny detector with the real train.py once to the end. Then for SIGKILL, and again for
SIGTERM, the same command is sent `--signals` signals, restarted after each, and left alone for the
last stretch; if a run ends before it got all its signals, another one begins. The moments are
random (`--seed`) and of four kinds:

- start: before the first step of the process, while it imports, prepares, restores and compiles;
- checkpoint: while a checkpoint is written, that is while Orbax's temporary directory is there;
- evaluation: between the metrics that precede an evaluation and its result;
- steps: at any time after the first step of the process.

Of each run the last checkpoint (parameters, optimizer state, moving average: all arrays, read by
Orbax alone; and the state of the host) and `metrics.jsonl` without its times must equal those of
the undisturbed run bit for bit. After SIGTERM the exit status must be 0 each time. The exit status
of this command is 1 if anything differs. SIGTERM is sent from the moment that the program handles
it, which is when its flags are read; before that it is Python's, and ends it with status -15.

Linux only. The detector has moving average, dropout, augmentation and the instability of matching,
so that all that a run remembers is there; its values can be overridden.
"""

import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from ml_collections import config_flags

from benchmarks import common
from benchmarks.trainings import (
    Training,
    checkpoints,
    last_line,
    small_config,
    unfinished,
    write_config,
)
from dn_detr_jax.commands.command_line import run_main

FLAGS = flags.FLAGS
KINDS = "SIGKILL", "SIGTERM"
MOMENTS = "start", "checkpoint", "evaluation", "steps"


def define_flags() -> None:
    """Defines them, when this is the program."""
    config_flags.DEFINE_config_dict("config", small_config())
    flags.DEFINE_integer("signals", 20, "How many signals of each kind.", lower_bound=1)
    flags.DEFINE_multi_enum("kind", list(KINDS), KINDS, "Which signals.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("folder", "", "For data, runs and logs; empty: a temporary one.")
    flags.DEFINE_string("json", "", "Write the rows to this file, too.")


class Durations:
    """How long things take in an undisturbed run, in seconds."""

    def __init__(self, training: Training):
        """Watches a run from its start to its end."""
        workdir = training.workdir
        training.wait_until(training.trains)
        self.start = time.monotonic() - training.began
        training.wait_until(lambda: unfinished(workdir))
        begin = time.monotonic()
        training.wait_until(lambda: not unfinished(workdir))
        self.checkpoint = time.monotonic() - begin
        training.end_well()
        self.total = time.monotonic() - training.began
        lines = metrics(workdir)
        self.evaluation = min(
            line["time/eval_seconds"] for line in lines if "time/eval_seconds" in line
        )
        self.step = statistics.median(
            line["time/seconds"] for line in lines if "time/seconds" in line
        )

    def as_row(self) -> dict[str, float]:
        """For the table."""
        return {f"{name}_s": round(value, 3) for name, value in vars(self).items()}


class Signals:
    """Sends signals to trainings at random moments, and keeps account.

    Attributes:
      name: of the signal.
      events: one for each signal that was sent.
      runs: work directories of the runs that came to their end.
    """

    def __init__(self, name: str, config_file: Path, undisturbed: Durations):
        """Sends nothing yet; the runs will lie beside the file of their config."""
        self.name, self.events, self.runs = name, [], []
        self._number = signal.Signals[name]
        self._config_file, self._durations = config_file, undisturbed
        self._random = random.Random(f"{FLAGS.seed} {name}")

    def run(self) -> None:
        """Sends all signals, and leaves every run alone for its last stretch.

        Raises:
          RuntimeError: a run ended with an error.
        """
        moments = [MOMENTS[i % len(MOMENTS)] for i in range(FLAGS.signals)]
        self._random.shuffle(moments)
        while moments:
            workdir = self._config_file.parent / f"{self.name.lower()}_{len(self.runs)}"
            training = Training(self._config_file, workdir)
            while moments and self._reaches(moments[-1], training):
                self._send(moments.pop(), training)
                training = Training(self._config_file, workdir)
            training.end_well()
            self.runs.append(workdir)

    def _reaches(self, moment: str, training: Training) -> bool:
        """Waits for a moment of that kind; False if the training has ended before."""
        durations, workdir = self._durations, training.workdir
        if moment == "start":
            handled = self._number != signal.SIGTERM
            ready = training.wait_until(lambda: handled or training.handles(self._number))
            return ready and self._pause(training, 0.9 * durations.start)
        if not training.wait_until(training.trains):
            return False
        durations.start = min(durations.start, time.monotonic() - training.began)
        # Some steps on, so that not every process does the same steps again.
        goal = last_line(workdir)["step"] + self._random.randint(0, 4)
        training.wait_until(lambda: last_line(workdir)["step"] >= goal)
        if moment == "checkpoint":
            there = training.wait_until(lambda: unfinished(workdir))
            return there and self._pause(training, durations.checkpoint)
        if moment == "evaluation":
            there = training.wait_until(lambda: evaluates(workdir))
            return there and self._pause(training, 0.7 * durations.evaluation)
        return self._pause(training, 10 * durations.step)

    def _pause(self, training: Training, longest: float) -> bool:
        until = time.monotonic() + self._random.uniform(0, longest)
        return training.wait_until(lambda: time.monotonic() >= until)

    def _send(self, moment: str, training: Training) -> None:
        workdir = training.workdir
        in_the_act = {
            "start": lambda: not training.trains(),
            "checkpoint": lambda: unfinished(workdir),
            "evaluation": lambda: evaluates(workdir),
            "steps": training.trains,
        }[moment]
        caught, sent = in_the_act(), time.monotonic()
        training.process.send_signal(self._number)
        status, seconds = training.end(), time.monotonic() - sent
        if self._number == signal.SIGKILL:
            caught = in_the_act()  # all lies there as it did at that moment
        event = {
            "signal": self.name,
            "moment": moment,
            "run": workdir.name,
            "in_the_act": caught,
            "logged": last_line(workdir).get("step", 0),
            "saved": max(checkpoints(workdir), default=0),
            "status": status,
            "seconds": round(seconds, 2),
        }
        self.events.append(event)
        print(", ".join(f"{k} {v}" for k, v in event.items()), file=sys.stderr, flush=True)


def evaluates(workdir: Path) -> bool:
    """Whether the metrics before an evaluation are there, and its result is not."""
    line = last_line(workdir)
    every = int(FLAGS.config.train.eval_every.split()[0])
    return line.get("step", 1) % every == 0 and "eval/AP" not in line


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; ValueError if one was cut short."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def contents(workdir: Path) -> dict[str, bytes]:
    """What two runs are compared by: arrays of the last checkpoint, host state, metrics."""
    folder = workdir / "checkpoints" / str(checkpoints(workdir)[-1])
    found = {"host": (folder / "host" / "metadata").read_bytes()}
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "ema", "state"):
            for keys, leaf in jax.tree.leaves_with_path(reader.restore(folder / item)):
                array = np.asarray(leaf)
                name = item + jax.tree_util.keystr(keys)
                found[name] = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
    for number, line in enumerate(metrics(workdir), start=1):
        kept = {k: v for k, v in line.items() if k != "time" and not k.startswith("time/")}
        found[f"metrics.jsonl, line {number}"] = json.dumps(kept, sort_keys=True).encode()
    return found


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def account(signals: Signals, expected: dict[str, bytes]) -> dict[str, Any]:
    """The row of a kind of signal."""
    sent = Counter(event["moment"] for event in signals.events)
    caught = Counter(event["moment"] for event in signals.events if event["in_the_act"])
    differing = [
        f"{run.name}: {name}"
        for run in signals.runs
        for name in differences(expected, contents(run))
    ]
    return {
        "run": f"under {signals.name}",
        "signals": len(signals.events),
        **{moment: f"{caught[moment]} of {sent[moment]}" for moment in MOMENTS},
        "statuses": ", ".join(map(str, sorted({event["status"] for event in signals.events}))),
        "slowest_exit_s": max(event["seconds"] for event in signals.events),
        "runs": len(signals.runs),
        "compared": len(expected),
        "different": len(differing),
        "differing": differing,
        "events": signals.events,
    }


def measure(folder: Path) -> bool:
    """All runs in a folder; whether all is as it should be."""
    config_file = write_config(FLAGS.config, folder)
    report = common.Report("survival")
    # The first run prepares the data and fills the cache of compiled programs: its durations are
    # not those of the others.
    Training(config_file, folder / "first").end_well()
    durations = Durations(Training(config_file, folder / "undisturbed"))
    expected = contents(folder / "undisturbed")
    unequal = len(differences(expected, contents(folder / "first")))
    row = {"run": "undisturbed, twice"} | durations.as_row()
    report.add(row | {"compared": len(expected), "different": unequal})
    for name in FLAGS.kind:
        signals = Signals(name, config_file, durations)
        signals.run()
        report.add(account(signals, expected))
    report.show(split_by="run")
    for row in report.rows():
        for name in row.get("differing", [])[:5]:
            print(f"differs from the undisturbed run: {name}")
    left_well = all(r["statuses"] == "0" for r in report.rows() if r["run"] == "under SIGTERM")
    return left_well and not any(row["different"] for row in report.rows())


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # this process only reads
    logging.set_verbosity(logging.WARNING)
    if FLAGS.folder:
        folder = Path(FLAGS.folder).absolute()
        folder.mkdir(parents=True)  # runs that were there would be continued
        good = measure(folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            good = measure(Path(name))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    define_flags()
    run_main(main)
