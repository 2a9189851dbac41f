"""Measures the share of padding in the batches, and how random the batches are.

    python -m benchmarks.padding --data PATH_OF_COCO

The benchmark reads the image sizes of a directory in COCO format, draws from them with replacement,
augments them as configs/coco_r50.py (or another --config) does, and prints a table and one JSON
object. Padding is the share of padded pixels among all pixels of a batch:

- with each image on one square of 1333 pixels;
- in batches of 16 and of 2 from a plain shuffle, padded to their largest height and width;
- with the canvases that `dn_detr_jax.data.canvases` proposes, for the published augmentation and
  for a scale that may change by up to 10%, and with the canvases of the config: if all batches
  were full ("assigned"), and in the batches of a whole epoch plan ("planned").

"together" counts how often two images of a batch share a batch again in the next epoch, relative to
a plain shuffle. Images of similar shape do so more often, since a batch has one canvas.
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.data.canvases import padding, propose, required_sizes
from dn_detr_jax.data.formats import load_split
from dn_detr_jax.data.layout import find_split
from dn_detr_jax.data.placement import Canvas, place
from dn_detr_jax.data.plan import plan_epoch
from dn_detr_jax.data.transforms import draw_geometry

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).resolve().parents[1] / "configs" / "coco_r50.py"),
    "The experiment, a file in configs/.",
)
flags.DEFINE_string("data", None, "A directory in COCO format.")
flags.DEFINE_integer("images", 118_287, "Images of an epoch, drawn from those of the directory.")
flags.DEFINE_integer("epochs", 5, "Number of epochs; successive ones are compared.")
flags.mark_flag_as_required("data")

BATCH = 16


def padded_to_maximum(sizes: np.ndarray, batch: int) -> float:
    """Returns the share of padding if each batch is padded to its largest height and width."""
    batches = sizes[: len(sizes) // batch * batch].reshape(-1, batch, 2).astype(np.int64)
    area = batches.max(1).prod(-1).sum() * batch
    return float(1 - batches.prod(-1).sum() / area)


def pairs(indices: np.ndarray, count: int) -> np.ndarray:
    """Returns one number for each pair of images that share a batch."""
    rows = np.sort(indices, axis=1)
    first, second = np.triu_indices(rows.shape[1], 1)
    return (rows[:, first] * count + rows[:, second]).ravel()


def met_again(batches: list[np.ndarray], count: int) -> dict[str, float]:
    """Counts pairs that share a batch again in the next epoch, relative to chance.

    Args:
      batches: int [S, B] for each epoch, positions in the data set.
      count: number of images of the data set.

    Returns:
      The ratio, and its standard error; the number of pairs is small.
    """
    numbers = [pairs(indices, count) for indices in batches]
    again = sum(len(np.intersect1d(a, b)) for a, b in itertools.pairwise(numbers))
    chance = (batches[0].shape[1] - 1) / (count - 1)
    expected = chance * sum(map(len, numbers[:-1]))
    return {
        "together": round(again / expected, 3),
        "together_error": round(float(np.sqrt(max(again, 1)) / expected), 3),
    }


def measure_plan(
    sizes: np.ndarray, canvases: Sequence[Canvas], snap: float, data_config: ConfigDict
) -> dict[str, Any]:
    """Returns padding and randomness of the plans of a few epochs."""
    start = time.perf_counter()
    plans = [
        plan_epoch(
            seed=0,
            epoch=epoch,
            sizes=sizes,
            augment=data_config.augment,
            canvases=canvases,
            batch_size=BATCH,
            snap=snap,
        )
        for epoch in range(FLAGS.epochs)
    ]
    seconds = (time.perf_counter() - start) / len(plans)
    return {
        "planned": float(np.mean([plan.padding for plan in plans])),
        "redrawn": float(np.mean([plan.redrawn for plan in plans])),
        "shrunken": float(np.mean([plan.shrunken for plan in plans])),
        **met_again([plan.indices for plan in plans], len(sizes)),
        "plan_seconds": round(seconds, 3),
    }


def measure_canvases(
    sizes: np.ndarray,
    drawn: np.ndarray,
    canvases: Sequence[Canvas],
    snap: float,
    data_config: ConfigDict,
) -> dict[str, Any]:
    """Returns all figures of a set of canvases."""
    limit = data_config.augment.max_long_side
    chosen, placed = place(drawn, canvases, snap, limit)
    touching = (placed == np.asarray(canvases)[chosen]).any(1).mean()
    scale = np.sqrt(placed.prod(-1) / drawn.prod(-1))
    result = {
        "programs": len(canvases),
        "assigned": padding(drawn, canvases, snap, limit),
        **measure_plan(sizes, canvases, snap, data_config),
        "canvases": canvases,
    }
    if snap:
        result |= {
            "touching": round(float(touching), 3),
            "scale_mean": round(float(scale.mean()), 4),
            "scale_deviation": round(float(scale.std()), 4),
        }
    return result


def measure(directory: Path, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns the rows of the table by name, for the training of `config.data`."""
    training, validation = (
        load_split(find_split(directory, split, config[split]))[0].sizes
        for split in ("train", "validation")
    )
    rng = np.random.default_rng(0)
    sizes = training[rng.integers(len(training), size=FLAGS.images)]
    drawn = draw_geometry(rng, sizes, config.augment).size
    search = draw_geometry(rng, sizes[:20_000], config.augment).size
    required = required_sizes(training, validation, config)
    rows: dict[str, dict[str, Any]] = {
        "one square of 1333": {
            "programs": 1,
            "assigned": float(1 - drawn.prod(-1).mean() / 1333**2),
        },
    }
    for batch, name in ((BATCH, "16 padded to their maximum"), (2, "2 padded to their maximum")):
        rows[name] = {"assigned": padded_to_maximum(drawn, batch)}
    for count, snap in ((8, 0.0), (16, 0.0), (8, 0.1), (16, 0.1)):
        start = time.perf_counter()
        (canvases,) = propose(search, required, (count,), snap, config.augment.max_long_side)
        seconds = round(time.perf_counter() - start, 1)
        name = f"{count} canvases" + (f", snap {snap}" if snap else "")
        rows[name] = measure_canvases(sizes, drawn, canvases, snap, config)
        rows[name]["search_seconds"] = seconds
    rows["canvases of the config"] = measure_canvases(
        sizes, drawn, config.canvases, config.snap, config
    )
    full = len(sizes) // BATCH * BATCH
    shuffles = [rng.permutation(len(sizes))[:full].reshape(-1, BATCH) for _ in range(FLAGS.epochs)]
    rows["16 padded to their maximum"] |= met_again(shuffles, len(sizes))
    return rows


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    validate(FLAGS.config)
    rows = measure(Path(FLAGS.data), FLAGS.config.data)
    print(f"{'':28} {'programs':>8} {'assigned':>9} {'planned':>9} {'together':>12}")
    for name, row in rows.items():
        planned = f"{row['planned']:.1%}" if "planned" in row else ""
        together = (
            "{together:.2f} ± {together_error:.2f}".format(**row) if "together" in row else ""
        )
        programs = row.get("programs", "any")
        print(f"{name:28} {programs:>8} {row['assigned']:>9.1%} {planned:>9} {together:>12}")
    result = {"numpy": np.__version__, "images": FLAGS.images, "batch_size": BATCH, "rows": rows}
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
