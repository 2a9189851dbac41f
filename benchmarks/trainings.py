"""Runs trainings of a tiny detector with the real train.py as processes to observe.

This module defines no flags, so that several benchmarks can share it.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import common
from dn_detr_jax.config import base_config, validate

PATIENCE = 3600  # seconds for one start of train.py; machines may be busy


def small_config() -> ConfigDict:
    """Returns a detector that compiles in seconds and trains in a few seconds."""
    config = base_config()
    config.data.update(
        name="digits_tiny",
        canvases=((96, 96),),
        max_objects=6,
        eval_short_side=64,
        eval_max_long_side=96,
    )
    config.data.augment.update(
        short_sides=(56, 64), max_long_side=96, crop_resize=(64,), crop_size=(40, 56)
    )
    config.model.update(
        num_classes=10,
        hidden_dim=16,
        num_heads=2,
        ffn_dim=16,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=9,
        dropout=0.1,
    )
    config.model.backbone.update(
        depth=18, width=4, stages=1, norm="group_norm", stem="light", frozen_stages=-1
    )
    config.dn.groups = 2
    config.optimizer.update(learning_rate=1e-3, lr_multipliers=(), schedule="cosine", warmup="5%")
    config.train.update(
        duration="100 steps",
        batch_size=4,
        ema_decay=0.99,
        log_every="1 steps",
        eval_every="20 steps",
        checkpoint_every="5 steps",
    )
    config.eval.update(batch_size=8, num_select=20, instability_images=20, pictures=4)
    return config


def write_config(config: ConfigDict, folder: Path) -> Path:
    """Writes a config for train.py with data and compiled programs in a folder; returns its path.

    Raises:
      ConfigError: a value is not valid.
    """
    config.data.dir, config.compile.cache_dir = str(folder / "data"), str(folder / "cache")
    validate(config)
    path = folder / "config.py"
    values = f"ConfigDict({config.to_dict()!r})"
    path.write_text(f"from ml_collections import ConfigDict\nget_config = lambda: {values}\n")
    return path


class Training:
    """One start of train.py in a work directory.

    Attributes:
      workdir: of the run, which may have earlier starts.
      process: the running or ended process.
      began: value of `time.monotonic` at its start.
    """

    def __init__(self, config_file: Path, workdir: Path, *arguments: str, log: str = ".log"):
        """Starts the process; its output is appended to a file beside the work directory.

        Args:
          config_file: of `write_config`.
          workdir: of the run.
          arguments: further arguments of train.py.
          log: suffix of the output file.
        """
        self.workdir, self.began, self._began_at = workdir, time.monotonic(), time.time()
        self._log = workdir.with_suffix(log)
        command = [sys.executable, str(common.ROOT / "train.py")]
        command += [f"--config={config_file}", f"--workdir={workdir}", *arguments]
        with self._log.open("a") as file:
            self._log_start = file.tell()
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())

    def wait_until(self, happened: Callable[[], Any]) -> bool:
        """Waits until a call returns a true value; returns False if the process ends before.

        Raises:
          RuntimeError: the wait took too long; the process is killed.
        """
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > self.began + PATIENCE:
                self.process.kill()
                raise RuntimeError(f"{self._log}: not done after {PATIENCE} seconds")
            time.sleep(0.003)
        return self.process.poll() is None

    def handles(self, number: int) -> bool:
        """Returns whether the process has a handler for a signal."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            found = re.search(r"SigCgt:\s*(\w+)", status)
            return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)
        return False

    def trains(self) -> bool:
        """Returns whether this process has logged a step; lines of earlier processes are older."""
        return last_line(self.workdir).get("time", 0.0) > self._began_at

    def end(self) -> int:
        """Waits for the end; returns the exit status."""
        return self.process.wait(PATIENCE)

    def end_well(self) -> None:
        """Waits for the end; raises RuntimeError if the exit status is not 0."""
        if self.end():
            raise RuntimeError(f"{self.workdir}: ended with an error: {self.tail()}")

    def output(self) -> str:
        """Returns the output of this start."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode("utf-8", "replace")

    def tail(self) -> str:
        """Returns the last line of the output."""
        lines = self.output().strip().splitlines()
        return lines[-1] if lines else "no output"


def write_coco_data(folder: Path, images: int = 200, seed: int = 0) -> None:
    """Writes data in COCO's format: images of noise with rectangles of ten brightnesses.

    Args:
      folder: for `annotations`, `train` and `val`.
      images: of the training split; a tenth of them for validation.
      seed: of the images.
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": f"brightness {i}"} for i in range(10)]
    for split, count in (("train", images), ("val", images // 10)):
        (folder / split).mkdir(parents=True)
        listed, objects = [], []
        for number in range(1, count + 1):
            pixels = rng.integers(0, 60, (80, 96, 3), np.uint8)
            for _ in range(rng.integers(1, 4)):
                label, (w, h) = int(rng.integers(10)), rng.integers(10, 40, 2).tolist()
                x, y = int(rng.integers(96 - w)), int(rng.integers(80 - h))
                pixels[y : y + h, x : x + w] = 60 + 19 * label
                box = {"id": len(objects) + 1, "image_id": number, "category_id": label + 1}
                objects.append(box | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            name = f"{number:04d}.png"
            Image.fromarray(pixels).save(folder / split / name)
            listed.append({"id": number, "file_name": name, "width": 96, "height": 80})
        document = {"images": listed, "annotations": objects, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))


def environment() -> dict[str, str]:
    """Returns the environment of the trainings: the CPU, and quick compilation."""
    found = os.environ | common.FULL_TRACEBACKS
    if found.get("JAX_PLATFORMS") == "cpu":
        import jax

        from dn_detr_jax.training.compile_options import known_options

        quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        known = known_options(quick, jax.devices()[0])
        flags = " ".join(f"--{name}={str(value).lower()}" for name, value in known.items())
        found.setdefault("XLA_FLAGS", flags)
    return found


def last_line(workdir: Path) -> dict[str, Any]:
    """Returns the last complete line of `metrics.jsonl`, {} if there is none."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}


def checkpoints(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def unfinished(workdir: Path) -> bool:
    """Returns whether a checkpoint is being written, or was when the process ended."""
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))
