"""Times the input of training on one core, then with the loader's threads and processes.

    python -m benchmarks.input_pipeline --data PATH_OF_COCO
    python -m benchmarks.input_pipeline --data PATH_OF_COCO --config.data.snap=0.1 --steps 100

The images and their augmentation are those of the first training steps of `--config`. The benchmark
prints a table for each of three measurements, then everything as one JSON object:

- One core: milliseconds per image for decoding, for flip, crop and resize, and for the whole batch,
  as the loader makes it with one thread. A baseline of the same transforms in Pillow and NumPy,
  which ends in a normalized float array, runs in turns with it. The loader's batches are uint8 and
  are normalized on the device, so the baseline is also given without its conversion. Figures are
  medians over the rounds in CPU time, which other programs disturb less, and in wall time.
- The loader: images per second, and per CPU second of all its processes, after the first batch.
- The loader's memory: the maximum over all processes together in each of three parts of `--steps`
  steps (proportional set size, which counts shared pages once), and the processes and shared memory
  that remain after it closes. Linux only.
"""

import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from benchmarks.processes import family, megabytes
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.data import images, transforms
from dn_detr_jax.data.datasets import Dataset, Example, open_dataset
from dn_detr_jax.data.loader import train_batches, train_plan

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "configs/coco_r50.py", "The experiment.")
flags.DEFINE_string("data", None, "Replaces data.dir of the config.")
flags.DEFINE_integer("rounds", 5, "Rounds on one core, each of both ways.", lower_bound=1)
flags.DEFINE_integer("round_steps", 4, "Training steps in a round.", lower_bound=1)
flags.DEFINE_integer("steps", 14, "Steps of each loader; thrice for memory.", lower_bound=1)

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


class Item(NamedTuple):
    """An image to prepare."""

    example: Example
    size: tuple[int, int]
    geometry: transforms.Geometry


class Seconds(NamedTuple):
    """A duration by two clocks."""

    cpu: float
    wall: float


def timed(work: Callable[[], Any]) -> Seconds:
    """Returns the duration of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


class Ordinary:
    """The published transforms in Pillow and NumPy, one image after the other, stage by stage."""

    stages = ("decode", "resize", "float")

    def __init__(self, items: Sequence[Item]):
        self._items = items

    def run(self) -> dict[str, Seconds]:
        """Prepares each image once; returns the seconds of each stage and their sum, `total`."""
        sums = {stage: Seconds(0.0, 0.0) for stage in self.stages}
        for item in self._items:
            result: Any = item.example.image
            for stage in self.stages:
                cpu, wall = time.process_time(), time.perf_counter()
                result = getattr(self, stage)(result, item.geometry)
                spent = time.process_time() - cpu, time.perf_counter() - wall
                sums[stage] = Seconds(sums[stage].cpu + spent[0], sums[stage].wall + spent[1])
        total = Seconds(*(sum(clock) for clock in zip(*sums.values(), strict=True)))
        return {**sums, "total": total}

    @staticmethod
    def decode(data: bytes, geometry: transforms.Geometry) -> Image.Image:
        """Decodes an image."""
        del geometry
        return Image.open(io.BytesIO(data)).convert("RGB")

    @staticmethod
    def resize(image: Image.Image, geometry: transforms.Geometry) -> Image.Image:
        """Resizes and crops if there is a crop, then resizes to the final size and flips."""
        top, left, height, width = geometry.crop.tolist()
        resized = tuple(geometry.resized[::-1].tolist())
        if (width, height) != image.size or resized != image.size:
            image = image.resize(resized, Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + width, top + height))
        if geometry.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.resize(tuple(geometry.size[::-1].tolist()), Image.Resampling.BILINEAR)

    @staticmethod
    def float(image: Image.Image, geometry: transforms.Geometry) -> np.ndarray:
        """Converts an image to a normalized float32 array."""
        del geometry
        return (np.asarray(image, np.float32) / 255 - MEAN) / DEVIATION


class Ours:
    """This package's transforms, alone and within the loader."""

    stages = ("decode", "resize", "batch")

    def __init__(self, items: Sequence[Item], dataset: Dataset, config: ConfigDict, steps: int):
        self._items, self._dataset, self._steps = items, dataset, steps
        self._config = with_loader(config, workers=0, threads=1, prefetch=1)
        self._decoded = [self._decode(item) for item in items]
        height, width = np.max([item.geometry.size for item in items], axis=0).tolist()
        self._canvas = np.zeros((height, width, 3), np.uint8)

    @staticmethod
    def _decode(item: Item) -> np.ndarray:
        return images.decode(item.example.image, item.size)

    def _decode_all(self) -> None:
        for item in self._items:
            self._decode(item)

    def _apply_all(self) -> None:
        for item, image in zip(self._items, self._decoded, strict=True):
            boxes, labels = item.example.boxes, item.example.labels
            transforms.apply(image, boxes, labels, item.geometry, canvas=self._canvas)

    def _load(self) -> None:
        for _ in train_batches(self._dataset, self._config, 0, self._steps):
            pass

    def run(self) -> dict[str, Seconds]:
        """Prepares each image once; returns seconds by stage; `batch` is the loader's own part."""
        decode, resize = timed(self._decode_all), timed(self._apply_all)
        total = timed(self._load)
        batch = Seconds(*(t - d - r for t, d, r in zip(total, decode, resize, strict=True)))
        return {"decode": decode, "resize": resize, "batch": batch, "total": total}


def with_loader(config: ConfigDict, **values: int) -> ConfigDict:
    """Returns a copy with other values under `data`."""
    config = config.copy_and_resolve_references()
    config.data.update(values)
    return config


def items_of(dataset: Dataset, config: ConfigDict, steps: int) -> list[Item]:
    """Returns the images of the first training steps."""
    plan = train_plan(dataset, config)
    specs = [plan.batch(step) for step in range(steps)]
    return [
        Item(dataset.source[int(i)], tuple(dataset.sizes[i].tolist()), spec.geometry.at(row))
        for spec in specs
        for row, i in enumerate(spec.indices)
    ]


def one_core(dataset: Dataset, config: ConfigDict, rounds: int, steps: int) -> dict[str, Any]:
    """Returns milliseconds per image of loader and baseline, measured in turns."""
    items = items_of(dataset, config, steps)
    ways = {"ours": Ours(items, dataset, config, steps), "pillow": Ordinary(items)}
    runs: dict[str, list[dict[str, Seconds]]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            seconds = way.run()
            if i > 0:  # the first warms up
                runs[name].append(seconds)

    result: dict[str, Any] = {"images": len(items), "rounds": rounds}
    for name, rows in runs.items():
        result[name] = {clock: per_image(rows, clock, len(items)) for clock in Seconds._fields}
    pairs = list(zip(runs["ours"], runs["pillow"], strict=True))
    ratios = [theirs["total"].cpu / ours["total"].cpu for ours, theirs in pairs]
    uint8 = [
        (theirs["decode"].cpu + theirs["resize"].cpu) / ours["total"].cpu for ours, theirs in pairs
    ]
    result["ratio"] = round(median(ratios), 2)
    result["ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    result["ratio_without_float"] = round(median(uint8), 2)
    return result


def per_image(rows: list[dict[str, Seconds]], clock: str, count: int) -> dict[str, float]:
    """Returns median milliseconds of each stage per image, and images per second."""
    milliseconds = {
        stage: 1e3 / count * median(getattr(row[stage], clock) for row in rows) for stage in rows[0]
    }
    milliseconds["images_per_second"] = 1e3 / milliseconds["total"]
    return {stage: round(value, 3) for stage, value in milliseconds.items()}


def median(values: Iterable[float]) -> float:
    """Returns the median as a float."""
    return float(statistics.median(values))


def family_cpu() -> float:
    """Returns the CPU seconds of this process and its descendants."""
    ticks = 0
    for pid in family(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family_megabytes() -> float:
    """Returns the memory of these processes in MB; shared pages count once."""
    return megabytes(family(os.getpid()))


def segments() -> set[str]:
    """Returns the names in the shared memory of the machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}


class PeakMemory:
    """The largest memory of all processes since the last `take`, sampled every 0.1 s."""

    def __init__(self) -> None:
        self._most, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self._most = max(self._most, family_megabytes())

    def take(self) -> float:
        """Returns the maximum in megabytes, and resets it."""
        most, self._most = self._most, 0.0
        return max(most, family_megabytes())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def loader(dataset: Dataset, config: ConfigDict, steps: int) -> dict[str, Any]:
    """Returns the loader's speed over `steps` steps, then its memory over three times as many."""
    before_memory, before_segments = family_megabytes(), segments()
    start = time.perf_counter()
    batches = train_batches(dataset, config, 0, 1 + 4 * steps + 8)  # closed with some prefetched
    next(batches)
    first = time.perf_counter() - start
    cpu, wall = family_cpu(), time.perf_counter()
    for _ in range(steps):
        next(batches)
    cpu, wall = family_cpu() - cpu, time.perf_counter() - wall
    memory = []
    with PeakMemory() as peak:
        for _ in range(3):
            for _ in range(steps):
                next(batches)
            memory.append(round(peak.take() - before_memory))
    start = time.perf_counter()
    batches.close()
    close = time.perf_counter() - start
    time.sleep(1.0)  # a thread of grain unmaps the last batch
    images = steps * config.train.batch_size
    return {
        "workers": config.data.workers,
        "threads": config.data.threads,
        "prefetch": config.data.prefetch,
        "images_per_second": round(images / wall, 1),
        "images_per_cpu_second": round(images / cpu, 1),
        "first_batch_seconds": round(first, 2),
        "memory_mb": memory,
        "close_seconds": round(close, 2),
        "processes_left": len(multiprocessing.active_children()),
        "segments_left": len(segments() - before_segments),
    }


def print_core(core: dict[str, Any]) -> None:
    """Prints the table of `one_core`."""
    print(f"One core, {core['images']} images, medians of {core['rounds']} rounds")
    print(f"{'ms per image':24}{'CPU':>10}{'wall':>10}")
    for name in ("ours", "pillow"):
        for stage in core[name]["cpu"]:
            cpu, wall = (core[name][clock][stage] for clock in Seconds._fields)
            print(f"{name + ', ' + stage:24}{cpu:10.2f}{wall:10.2f}")
    low, high = core["ratio_range"]
    print(f"ours is {core['ratio']} times as fast per core ({low} to {high} over the rounds),")
    print(f"{core['ratio_without_float']} times without the baseline's conversion to float\n")


def print_loaders(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table of `loader`."""
    titles = {
        "workers": "workers",
        "threads": "threads",
        "prefetch": "prefetch",
        "images_per_second": "images/s",
        "images_per_cpu_second": "per CPU s",
        "first_batch_seconds": "first s",
        "memory_mb": "peak MB, thirds",
        "close_seconds": "close s",
        "processes_left": "left",
        "segments_left": "shm left",
    }
    print("".join(f"{title:>{len(title) + 3}}" for title in titles.values()))
    for row in rows:
        cells = (f"{row[key]!s:>{len(title) + 3}}" for key, title in titles.items())
        print("".join(cells))
    print()


def machine() -> dict[str, Any]:
    """Returns a description of machine and versions."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(v, 2) for v in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "grain": importlib.metadata.version("grain"),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    if FLAGS.data:
        config.data.dir = FLAGS.data
    validate(config)
    dataset = open_dataset(config.data, "train")
    result = {"machine": machine(), "data": dataset.name, "batch_size": config.train.batch_size}
    result["one_core"] = one_core(dataset, config, FLAGS.rounds, FLAGS.round_steps)
    print_core(result["one_core"])
    cores = result["machine"]["cores"]
    settings = [
        {"workers": 0, "threads": 1, "prefetch": 2},
        {"workers": 0, "threads": cores, "prefetch": 2 * cores},
        {"workers": cores, "threads": 1, "prefetch": 2},
    ]
    configured = {key: config.data[key] for key in settings[0]}
    if configured not in settings:
        settings.append(configured)
    result["loaders"] = [
        loader(dataset, with_loader(config, **values), FLAGS.steps) for values in settings
    ]
    print_loaders(result["loaders"])
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_main(main)
