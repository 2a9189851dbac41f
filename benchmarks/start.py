"""Measures how long a command takes until it does what it is for.

    python -m benchmarks.start -- --config=configs/digits.py --config.data.dir=data
    python -m benchmarks.start --clone=../before -- --config=configs/digits.py

The benchmark starts train.py with the flags after `--`, each time in a new work directory, and
waits until the first step is trained and logged. All starts share an empty cache of compiled
programs, so that the second start finds what the first one has stored, and modules as bytecode.
Then the work directory is used by `python -m dn_detr_jax predict` for one image of noise, twice.

Seconds are counted from the command, in wall-clock time and in time of all CPU cores together.
CPU time of other processes does not count, so that it is the steadier figure on a busy machine.
`compiled` lists the programs of a start and its seconds for each, by its own log. Linux only.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import common
from benchmarks.trainings import PATIENCE, last_line
from dn_detr_jax.commands.command_line import run_main

FLAGS = flags.FLAGS
_HERTZ = os.sysconf("SC_CLK_TCK")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_integer("starts", 2, "Starts of train.py, one after the other.", lower_bound=1)
    flags.DEFINE_string("clone", str(common.ROOT), "Clone of this repository to measure.")
    flags.DEFINE_string("python", sys.executable, "Interpreter to measure with.")
    flags.DEFINE_string("json", "", "Write the rows to this file, too.")


def cpu_seconds(pid: int) -> float:
    """Returns the CPU seconds of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _HERTZ  # utime, stime


def compiled(log: str) -> list[str]:
    """Returns the programs that a log says were compiled, such as "train for 80 x 112 in 20.1 s".

    Examples:
      >>> compiled("10:03:29 compiled eval for 8 x 8 in 2.0 s, from the cache\\nother")
      ['eval for 8 x 8 in 2.0 s, from the cache']
    """
    return re.findall(r"compiled (.*)", log)


def start_training(workdir: Path, arguments: Sequence[str], env: dict[str, str]) -> dict[str, Any]:
    """Starts train.py, waits for its first step, and stops it.

    Raises:
      RuntimeError: it ends before its first step, or takes too long.
    """
    log = workdir.with_suffix(".log")
    command = [FLAGS.python, "train.py", f"--workdir={workdir}", *arguments]
    command += ["--config.train.log_every=1 steps"]  # after the --config among the arguments
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=FLAGS.clone, env=env, stdout=file, stderr=file)
    try:
        while not last_line(workdir):
            if process.poll() is not None or time.monotonic() > began + PATIENCE:
                lines = log.read_text().strip().splitlines() or ["no output"]
                raise RuntimeError(f"no step was trained: {lines[-1]}")
            time.sleep(0.01)
        seconds = time.monotonic() - began
        cpu = cpu_seconds(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    programs = compiled(log.read_text())
    return {"wall_s": round(seconds, 1), "cpu_s": round(cpu, 1), "compiled": programs}


def predict(image: Path, workdir: Path, out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Detects the objects of an image by the command.

    Raises:
      RuntimeError: the command fails.
    """
    command = [FLAGS.python, "-m", "dn_detr_jax", "predict", str(image)]
    command += [f"--workdir={workdir}", f"--out={out}"]
    began, before = time.monotonic(), os.times()
    done = subprocess.run(
        command, cwd=FLAGS.clone, env=env, capture_output=True, text=True, check=False
    )
    seconds, after = time.monotonic() - began, os.times()
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    programs = compiled(done.stderr)
    return {"wall_s": round(seconds, 1), "cpu_s": round(cpu, 1), "compiled": programs}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    report = common.Report("start")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        env = os.environ | common.FULL_TRACEBACKS | cache
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every start compiles all modules
        for number in range(1, FLAGS.starts + 1):
            row = start_training(workdir := folder / f"run_{number}", argv[1:], env)
            report.add({"command": "train", "start": number, **row})
        image = folder / "noise.png"
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        Image.fromarray(pixels).save(image)
        for number in (1, 2):
            row = predict(image, workdir, folder / f"out_{number}", env)
            report.add({"command": "predict", "start": number, **row})
    report.show()


if __name__ == "__main__":
    define_flags()
    run_main(main, ("TRAIN_FLAG...",))
