"""Shared parts of the benchmarks: made-up batches, workers, timing by rounds, tables and JSON.

A worker process measures one setting (a canvas, a batch size, a dtype, a framework). There are
three reasons: the peak of the device's memory is that of one setting, frameworks do not compete for
the device, and a setting that runs out of memory or time becomes a row with the reason. A worker
answers each line on its standard input with a line of JSON; everything that libraries print goes
to standard error. This module imports no framework.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.errors import ConfigError
from dn_detr_jax.preflight.accelerators import CHIPS

ROOT = Path(__file__).parent.parent
# For processes whose last line tells why they failed: otherwise it is a note of JAX.
FULL_TRACEBACKS = {"JAX_TRACEBACK_FILTERING": "off"}
FLAGS = flags.FLAGS
MODULES = "jax", "jaxlib", "flax", "torch", "transformers", "scipy", "numpy"


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak of one device in flop/s for a dtype of the compute; None if it is unknown.

    For float32 it is the peak of jax's default matrix products: TensorFloat-32 on NVIDIA, half the
    rate of bfloat16, and bfloat16 on TPU.
    """
    chip = CHIPS.get(device_kind)
    if chip is None:
        return None
    halved = dtype == "float32" and device_kind.startswith("NVIDIA")
    return chip.peak_flops / (2 if halved else 1)


def define_flags(
    batch_size: Sequence[str] = (), dtype: Sequence[str] = (), config: str = "coco_r50"
) -> None:
    """Defines the flags of every benchmark; the defaults of three of them are arguments."""
    path = str(ROOT / "configs" / f"{config}.py")
    config_flags.DEFINE_config_file("config", path, "The experiment, a file in configs/.")
    flags.DEFINE_list("canvas", [], "HEIGHTxWIDTH, several by commas; default: the config's first.")
    flags.DEFINE_list("batch_size", list(batch_size), "Images per step, several by commas.")
    flags.DEFINE_list("dtype", list(dtype), "float32, bfloat16, or both by a comma.")
    flags.DEFINE_float("objects", 7.3, "Mean number of objects of an image; COCO has 7.3.")
    flags.DEFINE_integer("rounds", 5, "Timed rounds, after an untimed one.", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "Steps of a round.", lower_bound=1)
    flags.DEFINE_float("timeout", 300, "Seconds for one setting, compilation included.")
    flags.DEFINE_float("time_limit", 570, "Seconds for the command; later settings are not run.")
    flags.DEFINE_string("json", "", "Write the rows to this file, too.")
    flags.DEFINE_string("worker", "", "For the benchmarks' own use: the setting to measure.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a worker measures.

    Attributes:
      canvas: (height, width).
      batch_size: over all devices.
      dtype: of the compute.
      contender: the implementation to run, in benchmarks with several.
    """

    canvas: tuple[int, int]
    batch_size: int
    dtype: str
    contender: str = "dn_detr_jax"

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """Reads a setting from a worker's flag."""
        values = json.loads(text)
        return cls(**values | {"canvas": tuple(values["canvas"])})

    def as_json(self) -> str:
        """Returns the text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    def columns(self) -> dict[str, Any]:
        """Returns the first columns of the table."""
        canvas = "{}x{}".format(*self.canvas)
        return {"canvas": canvas, "batch_size": self.batch_size, "dtype": self.dtype}


def settings_of_flags(
    config: ConfigDict, contenders: Sequence[str] = (), batch_sizes: Sequence[str] | None = None
) -> list[Setting]:
    """Returns every combination of the flags; the config gives the values of empty flags.

    Args:
      config: whole configuration.
      contenders: each is combined with all other flags; empty: one without a name.
      batch_sizes: replace those of the flag.

    Raises:
      ConfigError: a canvas or a batch size is malformed.
    """
    canvases = [_canvas(text) for text in FLAGS.canvas] or [tuple(config.data.canvases[0])]
    texts = FLAGS.batch_size if batch_sizes is None else batch_sizes
    sizes = [positive("--batch_size", text) for text in texts]
    return [
        Setting(canvas, batch_size, dtype, contender)
        for canvas in canvases
        for batch_size in sizes or [config.train.batch_size]
        for dtype in FLAGS.dtype or [config.model.dtype]
        for contender in contenders or [Setting.contender]
    ]


def _canvas(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2:
        raise ConfigError("--canvas", text, "HEIGHTxWIDTH, for example 800x1344")
    return positive("--canvas", sides[0]), positive("--canvas", sides[1])


def positive(flag: str, text: str) -> int:
    """Returns a positive integer from a flag's text; ConfigError for any other text."""
    if not text.isdecimal() or not int(text):
        raise ConfigError(flag, text, "a positive integer")
    return int(text)


def apply_setting(config: ConfigDict, setting: Setting) -> None:
    """Puts a setting into the config."""
    config.data.canvases = (setting.canvas,)
    config.model.dtype = setting.dtype
    config.train.batch_size = config.eval.batch_size = setting.batch_size


def made_up_batch(
    config: ConfigDict, objects: float | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns a batch of noise images that fill nine tenths of the canvas, with random boxes.

    Args:
      config: whole configuration; its first canvas, `train.batch_size` and `data.max_objects`
        are used.
      objects: mean number of objects per image. The numbers have a geometric distribution and
        are limited to `data.max_objects`. None: the flag `--objects`.
      seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    (height, width), slots = config.data.canvases[0], config.data.max_objects
    batch = config.train.batch_size
    centers, sides = rng.uniform(0.3, 0.7, (2, batch, slots, 2))
    mean = FLAGS.objects if objects is None else objects
    counts = rng.geometric(1 / (mean + 1), (batch, 1)) - 1
    return {
        "image": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "size": np.tile(np.array([height * 9 // 10, width], np.int32), (batch, 1)),
        "labels": rng.integers(0, config.model.num_classes, (batch, slots), dtype=np.int32),
        "boxes": np.concatenate([centers, sides / 4], axis=-1).astype(np.float32),
        "valid": np.arange(slots) < counts,
        "image_id": np.arange(batch, dtype=np.int32),
    }


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call that returns when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def costs(call: Callable[[], Any], times: int = 1) -> dict[str, float]:
    """Returns `seconds` and `cpu_seconds`, those of all threads, of one of so many calls."""
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(times):
        call()
    figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {name: value / times for name, value in figures.items()}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Returns median, fastest and slowest, rounded to 10 microseconds."""
    figures = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(value, 5) for name, value in figures.items()}


class WorkerError(Exception):
    """A worker gave no answer; the message is for its row."""


class Worker:
    """A process that measures one setting.

    Attributes:
      ready: the first answer.
    """

    def __init__(self, command: Sequence[str], deadline: float):
        """Starts the process and waits for the first answer.

        Args:
          command: program and arguments.
          deadline: value of `time.monotonic` at which waiting for the answer ends.

        Raises:
          WorkerError: the worker failed, or took too long.
        """
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        environment = os.environ | FULL_TRACEBACKS | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            self.ready = self._answer(deadline)
        except BaseException:
            self.close()
            raise

    def ask(self, deadline: float) -> dict[str, Any]:
        """Returns one more answer; arguments and errors as for the constructor."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._answer(deadline)

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def stop():
            late.set()
            self._process.kill()

        timer = threading.Timer(max(deadline - time.monotonic(), 0), stop)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if late.is_set():
            raise WorkerError("out of time")
        if not line:
            self._process.wait()
            raise WorkerError(self._reason())
        return json.loads(line)

    def _reason(self) -> str:
        """Returns why the process ended, from its status and the last lines that it printed."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        text = "\n".join(lines).lower()
        if "resource_exhausted" in text or "out of memory" in text or "outofmemory" in text:
            return "out of memory"
        if self._process.returncode == -9:
            return "killed, perhaps for its memory"
        return lines[-1] if lines else f"ended with status {self._process.returncode}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def answer(first: Callable[[], dict[str, Any]], more: Callable[[], dict[str, Any]] | None) -> None:
    """Runs a worker: answers the start, then each line of the standard input.

    Args:
      first: gives the answer to the start.
      more: gives the answer to each line of the standard input; None: the worker ends.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(values):
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    send(first())
    for _ in sys.stdin if more is not None else ():
        send(more())


def measured_alone(benchmark: str, setting: Setting, report: "Report") -> dict[str, Any]:
    """Returns the only answer of a worker, or the reason of its failure as column `failed`."""
    if not report.in_time():
        return {"failed": f"not run: over {FLAGS.time_limit:.0f} s"}
    try:
        worker = Worker(worker_command(benchmark, setting), report.deadline())
    except WorkerError as error:
        return {"failed": str(error)}
    worker.close()
    return worker.ready


def define_contender_flags(contenders: Sequence[str]) -> None:
    """Defines the flags of a benchmark with several contenders."""
    flags.DEFINE_list("contenders", list(contenders), f"Some of {', '.join(contenders)}.")
    flags.DEFINE_bool(
        "interleave",
        None,
        "Run all contenders at once, in turns; by default on a CPU only.",
    )


def check_contenders(known: Sequence[str]) -> None:
    """Raises ConfigError for an unknown name in the flag."""
    for name in FLAGS.contenders:
        if name not in known:
            raise ConfigError("--contenders", name, f"one of {', '.join(known)}")


def take_turns(
    benchmark: str, settings: Sequence[Setting], report: "Report"
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Starts a worker for every setting, and asks each for `--rounds` answers.

    On a CPU, or with `--interleave`, all workers run at once and answer in turns; otherwise one
    runs at a time.

    Yields:
      Settings, each with the answers of its worker, `ready` and `rounds`, or with `failed`.
    """
    waiting, alive = list(settings), {}
    results: dict[Setting, dict[str, Any]] = {setting: {"rounds": []} for setting in settings}
    together = FLAGS.interleave
    while waiting:
        while waiting and (together or not alive):
            setting = waiting.pop(0)
            if not report.in_time():
                results[setting]["failed"] = f"not run: over {FLAGS.time_limit:.0f} s"
                yield setting, results[setting]
                continue
            try:
                worker = Worker(worker_command(benchmark, setting), report.deadline())
            except WorkerError as error:
                results[setting]["failed"] = str(error)
                yield setting, results[setting]
                continue
            alive[setting], results[setting]["ready"] = worker, worker.ready
            if together is None:
                together = worker.ready["device"]["platform"] == "cpu"
        _ask_in_turn(alive, results, report)
        for setting, worker in alive.items():
            worker.close()
            yield setting, results[setting]
        alive = {}


def _ask_in_turn(alive: dict, results: dict, report: "Report") -> None:
    """Asks all running workers in rounds; a worker that fails is not asked again."""
    for _ in range(FLAGS.rounds):
        for setting, worker in alive.items():
            result = results[setting]
            if "failed" in result:
                continue
            try:
                result["rounds"].append(worker.ask(report.deadline()))
            except WorkerError as error:
                result["failed"] = str(error)


def worker_command(benchmark: str, setting: Setting) -> list[str]:
    """Returns the command of this program for one setting."""
    module = f"benchmarks.{benchmark}"
    return [sys.executable, "-m", module, *sys.argv[1:], "--worker", setting.as_json()]


class Report:
    """The rows of a benchmark, printed as they come, then as a table, and written as JSON."""

    def __init__(self, benchmark: str):
        """Starts an empty report."""
        self._head: dict[str, Any] = {
            "benchmark": benchmark,
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks." + benchmark, *sys.argv[1:]]),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "versions": _versions(),
        }
        self._rows: list[dict[str, Any]] = []
        self._start = time.monotonic()

    def deadline(self) -> float:
        """Returns the deadline of a setting that starts now, as `time.monotonic`."""
        return min(time.monotonic() + FLAGS.timeout, self._start + FLAGS.time_limit)

    def in_time(self) -> bool:
        """Returns whether the command has time left."""
        return time.monotonic() < self._start + FLAGS.time_limit

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file, so that a killed command keeps its rows."""
        device = row.pop("device", None)
        if device is not None:
            self._head["device"] = device
        self._rows.append(row)
        words = (f"{name} {_cell(value)}" for name, value in row.items() if not _nested(value))
        print(", ".join(words), file=sys.stderr, flush=True)
        if FLAGS.json:
            Path(FLAGS.json).write_text(json.dumps(self._head | {"rows": self._rows}, indent=2))

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows; they may be changed before `show`."""
        return self._rows

    def show(self, split_by: str = "") -> None:
        """Prints command, machine and the table, or one table for each value of a column."""
        for name, value in self._head.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {version}" for key, version in value.items())
            print(f"{name}: {value}")
        for value in dict.fromkeys(row.get(split_by) for row in self._rows):
            rows = [row for row in self._rows if row.get(split_by) == value]
            print(f"\n{table(rows)}")
        if FLAGS.json:
            Path(FLAGS.json).write_text(json.dumps(self._head | {"rows": self._rows}, indent=2))


def _versions() -> dict[str, str]:
    found = {}
    for module in MODULES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[module] = metadata.version(module)
    return found


def _nested(value: Any) -> bool:
    return isinstance(value, list | dict) and "median" not in value


def _cell(value: Any) -> str:
    """Returns a value as text; summaries as median (fastest to slowest)."""
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns rows as a Markdown table; columns with nested values are left out."""
    rows = list(rows)
    names = dict.fromkeys(key for row in rows for key, value in row.items() if not _nested(value))
    lines = [list(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
