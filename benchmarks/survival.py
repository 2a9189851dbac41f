"""Checks that a disturbed training ends like an undisturbed one, bit for bit.

    python -m benchmarks.survival --json survival.json
    python -m benchmarks.survival --signals 3 --config.train.duration="40 steps"

The benchmark first trains a tiny detector on data in COCO's format with the real train.py to the
end. Then it repeats the command for each kind of signal (SIGKILL, SIGTERM, SIGINT): it sends
`--signals` signals, starts the command again after each, and lets the last start run to the end. If
a run ends before all signals are sent, another run begins. The moments are random (`--seed`) and of
six kinds:

- start: while the process imports, reads its data and plans;
- packing: while it packs the data, after its packed form was removed;
- compiling: while it initializes or restores the state and compiles;
- step: at a random time after the first step of the process;
- evaluation: between the metrics that precede an evaluation and its result;
- save: while a checkpoint is written, as long as Orbax's temporary directory exists.

Three further disturbances follow, `--others` times each:

- twice: a second training starts in the same work directory; it must be refused;
- beside: `--eval_only --step latest` runs repeatedly beside the training;
- full disk: the work directory is on a small file system that fills up; then it gets space and the
  same command continues. This needs `unshare` and the right to mount a tmpfs.

The last checkpoint of each run (all arrays of parameters, optimizer state and moving average, read
by Orbax alone, and the state of the host) and its `metrics.jsonl` without times must equal those of
the undisturbed run bit for bit. The exit status after SIGTERM and SIGINT must be 0. The exit status
of this command is 1 if anything differs. SIGTERM and SIGINT are sent only after the program has
installed its handlers, which follows its imports.

Linux only. The detector has a moving average, dropout, augmentation and the instability of
matching, so that a run has every kind of state; its values can be overridden.
"""

import functools
import json
import random
import shutil
import signal
import statistics
import subprocess
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
from ml_collections import ConfigDict, config_flags

from benchmarks import common
from benchmarks.trainings import (
    PATIENCE,
    Training,
    checkpoints,
    environment,
    last_line,
    small_config,
    unfinished,
    write_coco_data,
    write_config,
)
from dn_detr_jax.commands.command_line import run_main

FLAGS = flags.FLAGS
KINDS = "SIGKILL", "SIGTERM", "SIGINT"
MOMENTS = "start", "packing", "compiling", "step", "evaluation", "save"
_PACKED = "packed"  # folder of the packed data, beside the config's file


def survival_config() -> ConfigDict:
    """Returns the tiny detector on data in COCO's format, which the first start packs."""
    config = small_config()
    config.data.update(name="coco", labels="contiguous")
    return config


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flags.DEFINE_config_dict("config", survival_config())
    flags.DEFINE_integer("signals", 20, "Number of signals of each kind.", lower_bound=0)
    flags.DEFINE_multi_enum("kind", list(KINDS), KINDS, "Signals to send.")
    flags.DEFINE_integer("others", 3, "Number of each other disturbance.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the moments.")
    flags.DEFINE_string("folder", "", "For data, runs and logs; empty: a temporary one.")
    flags.DEFINE_string("json", "", "Write the rows to this file, too.")


class Durations:
    """Durations of the phases of an undisturbed run, in seconds."""

    def __init__(self, training: Training):
        """Watches a run from its start to its end."""
        workdir = training.workdir
        began = time.monotonic()
        training.wait_until(lambda: phase(training) == "packing")
        self.start = time.monotonic() - began
        training.wait_until(lambda: phase(training) == "compiling")
        self.packing = time.monotonic() - began - self.start
        training.wait_until(training.trains)
        self.compiling = time.monotonic() - began - self.start - self.packing
        training.wait_until(lambda: unfinished(workdir))
        begin = time.monotonic()
        training.wait_until(lambda: not unfinished(workdir))
        self.save = time.monotonic() - begin
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
        """Returns the columns of the table."""
        return {f"{name}_s": round(value, 3) for name, value in vars(self).items()}


def phase(training: Training) -> str:
    """Returns the phase of a process, one of `MOMENTS`, from its output and its files."""
    if training.trains():
        if unfinished(training.workdir):
            return "save"
        return "evaluation" if evaluates(training.workdir) else "step"
    output = training.output()
    if "first epoch: " in output:
        return "compiling"
    lines = output.splitlines()
    return "packing" if lines and " packing " in lines[-1] else "start"


class Signals:
    """Sends signals to trainings at random moments, and records them.

    Attributes:
      name: of the signal.
      events: one for each sent signal.
      runs: work directories of the finished runs.
    """

    def __init__(self, name: str, config_file: Path, undisturbed: Durations):
        """Prepares runs beside the file of their config; sends no signal."""
        self.name, self.events, self.runs = name, [], []
        self._number = signal.Signals[name]
        self._config_file, self._durations = config_file, undisturbed
        self._random = random.Random(f"{FLAGS.seed} {name}")

    def run(self) -> None:
        """Sends all signals, and lets the last start of each run finish.

        Raises:
          RuntimeError: a run ended with an error.
        """
        moments = [MOMENTS[i % len(MOMENTS)] for i in range(FLAGS.signals)]
        self._random.shuffle(moments)
        while moments:
            workdir = self._config_file.parent / f"{self.name.lower()}_{len(self.runs)}"
            training = self._start(workdir, moments)
            while moments and self._reaches(moments[-1], training):
                self._send(moments.pop(), training)
                training = self._start(workdir, moments)
            training.end_well()
            self.runs.append(workdir)

    def _start(self, workdir: Path, moments: list[str]) -> Training:
        if moments and moments[-1] == "packing":
            shutil.rmtree(self._config_file.parent / _PACKED, ignore_errors=True)
        return Training(self._config_file, workdir)

    def _reaches(self, moment: str, training: Training) -> bool:
        """Waits for a moment of a kind; returns False if the training ends before."""
        durations, workdir = self._durations, training.workdir
        # The handler of SIGTERM is installed last.
        if not training.wait_until(lambda: training.handles(signal.SIGTERM)):
            return False
        if moment == "start":
            return self._pause(training, 0.9 * durations.start)
        if moment == "packing":
            there = training.wait_until(lambda: phase(training) != "start")
            return there and self._pause(training, 0.9 * durations.packing)
        if moment == "compiling":
            there = training.wait_until(lambda: phase(training) not in ("start", "packing"))
            return there and self._pause(training, 0.9 * durations.compiling)
        if not training.wait_until(training.trains):
            return False
        # A few steps later, so that processes do not all repeat the same steps.
        goal = last_line(workdir)["step"] + self._random.randint(0, 4)
        training.wait_until(lambda: last_line(workdir)["step"] >= goal)
        if moment == "step":
            return self._pause(training, 10 * durations.step)
        there = training.wait_until(lambda: phase(training) == moment)
        return there and self._pause(training, 0.7 * getattr(durations, moment))

    def _pause(self, training: Training, longest: float) -> bool:
        until = time.monotonic() + self._random.uniform(0, longest)
        return training.wait_until(lambda: time.monotonic() >= until)

    def _send(self, moment: str, training: Training) -> None:
        workdir = training.workdir
        found, sent = phase(training), time.monotonic()
        training.process.send_signal(self._number)
        status, seconds = training.end(), time.monotonic() - sent
        if self._number == signal.SIGKILL:
            found = phase(training)  # unchanged since the signal
        event = {
            "signal": self.name,
            "aimed_at": moment,
            "moment": found,
            "run": workdir.name,
            "logged": last_line(workdir).get("step", 0),
            "saved": max(checkpoints(workdir), default=0),
            "status": status,
            "seconds": round(seconds, 2),
        }
        self.events.append(event)
        print(", ".join(f"{k} {v}" for k, v in event.items()), file=sys.stderr, flush=True)


def evaluates(workdir: Path) -> bool:
    """Returns whether the metrics before an evaluation exist, and its result does not."""
    line = last_line(workdir)
    every = int(FLAGS.config.train.eval_every.split()[0])
    return line.get("step", 1) % every == 0 and "eval/AP" not in line


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`; an incomplete line raises ValueError."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def contents(workdir: Path) -> dict[str, bytes]:
    """Returns what is compared of a run: arrays of the last checkpoint, host state, metrics."""
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
    """Returns the names of the parts that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def signals_row(signals: Signals, expected: dict[str, bytes]) -> dict[str, Any]:
    """Returns the row of a kind of signal."""
    caught = Counter(event["moment"] for event in signals.events)
    return {
        "run": f"under {signals.name}",
        "signals": len(signals.events),
        **{moment: caught[moment] for moment in MOMENTS},
        "statuses": ", ".join(map(str, sorted({event["status"] for event in signals.events}))),
        "slowest_exit_s": max(event["seconds"] for event in signals.events),
        **comparison(signals.runs, expected),
        "events": signals.events,
    }


def comparison(runs: Sequence[Path], expected: dict[str, bytes]) -> dict[str, Any]:
    """Returns columns with the number of parts that differ from the undisturbed run."""
    differing = [
        f"{run.name}: {name}" for run in runs for name in differences(expected, contents(run))
    ]
    return {
        "runs": len(runs),
        "compared": len(expected),
        "different": len(differing),
        "differing": differing,
    }


def train_twice(config_file: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Starts a second training in the work directory of another; returns the row."""
    runs, refused = [], 0
    for number in range(FLAGS.others):
        workdir = config_file.parent / f"twice_{number}"
        first = Training(config_file, workdir)
        first.wait_until(first.trains if number % 2 else (workdir / "lock").exists)
        second = Training(config_file, workdir, log=".second.log")
        in_use = f"in use by process {first.process.pid} on "
        refused += second.end() == 1 and in_use in second.tail()
        first.end_well()
        runs.append(workdir)
    return {"run": "twice", "refused": refused, **comparison(runs, expected)}


def evaluate_beside(config_file: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Evaluates the latest checkpoint repeatedly beside a training; returns the row."""
    runs, evaluated, tables = [], 0, 0
    for number in range(FLAGS.others):
        workdir = config_file.parent / f"beside_{number}"
        training = Training(config_file, workdir)
        while training.wait_until(functools.partial(checkpoints, workdir)):
            flags_ = "--eval_only", "--step=latest"
            evaluation = Training(config_file, workdir, *flags_, log=".evaluation.log")
            tables += evaluation.end() == 0 and "AP    @[ IoU=0.50:0.95" in evaluation.output()
            evaluated += 1
        training.end_well()
        runs.append(workdir)
    row = {"run": "beside", "evaluations": evaluated, "tables": tables}
    return row | comparison(runs, expected)


_ON_SMALL_DISK = """
mount -t tmpfs -o size=$1 none "$2" || exit 77
shift; disk=$1; copy=$2; shift 2
"$@"; status=$?
echo "status $status, saved: $(ls "$disk"/run/checkpoints | tr '\\n' ' ')"
mount -o remount,size=1g "$disk"
"$@" || exit 78
cp -r "$disk"/run "$copy"
exit $status
"""


def fill_disks(config_file: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Trains on file systems of random sizes, then again with space; returns the row."""
    folder = config_file.parent
    undisturbed = [p.stat().st_size for p in (folder / "undisturbed").rglob("*") if p.is_file()]
    generator = random.Random(f"{FLAGS.seed} full disk")
    runs, full, told = [], 0, 0
    for number in range(FLAGS.others):
        disk, copy = folder / f"disk_{number}", folder / f"full_{number}"
        log = folder / f"full_{number}.log"
        disk.mkdir()
        size = int(generator.uniform(0.1, 0.9) * sum(undisturbed))
        command = ["unshare", "-rm", "sh", "-c", _ON_SMALL_DISK, "sh", str(size), str(disk)]
        command += [str(copy), sys.executable, str(common.ROOT / "train.py")]
        command += [f"--config={config_file}", f"--workdir={disk / 'run'}"]
        with log.open("w") as file:
            status = subprocess.run(
                command, stdout=file, stderr=file, env=environment(), timeout=PATIENCE, check=False
            ).returncode
        if status == 77:
            return {"run": "full disk", "skipped": "a tmpfs can't be mounted here", "different": 0}
        first = log.read_text(errors="replace").split("\nstatus ")[0].splitlines()[-1]
        full += status == 1
        told += first.startswith("error: ") and "no space left on" in first.lower()
        if status == 78 or not copy.exists():
            return {"run": "full disk", "different": 1, "differing": [f"{log}: not continued"]}
        runs.append(copy)
    return {"run": "full disk", "full": full, "told": told, **comparison(runs, expected)}


def is_good(row: dict[str, Any]) -> bool:
    """Returns whether the runs of a row ended as they must."""
    if row["different"]:
        return False
    if row["run"] in ("under SIGTERM", "under SIGINT"):
        return row["statuses"] == "0"
    asked = {"twice": "refused", "full disk": "told"}.get(row["run"])
    expected = {"twice": row.get("runs"), "full disk": row.get("full")}.get(row["run"])
    if row["run"] == "beside":
        asked, expected = "tables", row["evaluations"]
    return asked is None or row.get(asked) == expected


def measure(folder: Path) -> bool:
    """Makes all runs in a folder; returns whether all ended as they must."""
    config = FLAGS.config
    config.data.packed_dir = str(folder / _PACKED)
    config_file = write_config(config, folder)
    write_coco_data(folder / "data")
    report = common.Report("survival")
    # The first run fills the cache of compiled programs: its durations are not typical.
    Training(config_file, folder / "first").end_well()
    shutil.rmtree(folder / _PACKED)
    durations = Durations(Training(config_file, folder / "undisturbed"))
    expected = contents(folder / "undisturbed")
    unequal = len(differences(expected, contents(folder / "first")))
    row = {"run": "undisturbed, twice"} | durations.as_row()
    report.add(row | {"compared": len(expected), "different": unequal})
    if FLAGS.others:
        for disturb in (train_twice, evaluate_beside, fill_disks):
            report.add(disturb(config_file, expected))
    for name in FLAGS.kind if FLAGS.signals else ():
        signals = Signals(name, config_file, durations)
        signals.run()
        report.add(signals_row(signals, expected))
    report.show(split_by="run")
    for row in report.rows():
        for name in row.get("differing", [])[:5]:
            print(f"differs from the undisturbed run: {name}")
    return all(is_good(row) for row in report.rows())


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # this process only reads
    logging.set_verbosity(logging.WARNING)
    if FLAGS.folder:
        folder = Path(FLAGS.folder).absolute()
        folder.mkdir(parents=True)  # existing runs would be continued
        good = measure(folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            good = measure(Path(name))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    define_flags()
    run_main(main)
