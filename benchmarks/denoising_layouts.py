"""Compares the two layouts of the denoising queries: slots, memory, flops and time of the step.

    python -m benchmarks.denoising_layouts --data PATH_OF_COCO --canvas 160x224 --batch_size 2

Prints three tables, of the paper's layout (groups x `data.max_objects` slots for every image) and
of the packed one:

- Slots: for the object counts of a directory in COCO format and several `dn.slots`. "used" is the
  share of slots that hold an object. "given" is the share of the objects' copies, one per group,
  that get a slot. "all groups" is the share of images whose groups all get slots. The last rows
  describe one batch of 16 with an image of `--crowd` objects. "largest of batch" is the layout of
  the PyTorch code, groups x the most objects in each batch of 16; its shape is not static.
- The step of the config at its own canvas, `--large_batch_size` images, in bfloat16, traced and
  not run: the model's flops, and the bytes that are kept for the backward pass.
- The compiled step at `--canvas` and `--batch_size`, its first image with `--crowd` objects:
  planned memory, and the time of both layouts in turns.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.memory import kept_bytes
from benchmarks.train_step import Step, device, gigabytes
from dn_detr_jax import denoising
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import abstract_state
from dn_detr_jax.training.step import abstract_batch, denoising_queries, jit_train_step

FLAGS = flags.FLAGS
BATCH = 16


def with_layout(config: ConfigDict, layout: str, slots: int | None = None) -> ConfigDict:
    """Returns a copy of the config with another layout."""
    config = copy.deepcopy(config)
    config.dn.layout = layout
    config.dn.slots = config.dn.slots if slots is None else slots
    return config


def usage(counts: np.ndarray, config: ConfigDict) -> dict[str, Any]:
    """Returns slots computed and used for images with these numbers of objects."""
    objects, groups = config.data.max_objects, config.dn.groups
    counts = np.minimum(counts, objects)
    valid = np.arange(objects) < counts[:, None]
    batch = {
        "labels": np.zeros(valid.shape, np.int32),
        "boxes": np.full((*valid.shape, 4), 0.5, np.float32),
        "valid": valid,
    }
    dn = denoising_queries(batch, jax.random.key(0), config)
    real = np.asarray(dn.valid & ~dn.negative).sum(axis=1)
    return {
        "slots": dn.num_slots,
        "used": round(float(np.asarray(dn.valid).mean()), 4),
        "given": round(float(real.sum() / (groups * counts.sum())), 4),
        "all groups": round(float(np.mean(real == groups * counts)), 4),
    }


def largest_of_batch(counts: np.ndarray, config: ConfigDict) -> dict[str, Any]:
    """Returns the same for groups x the most objects of each batch, over random batches."""
    rng, groups = np.random.default_rng(0), config.dn.groups
    batches = rng.choice(counts, (1000, min(BATCH, len(counts))))
    slots = groups * batches.max(axis=1)
    used = groups * batches.sum() / (slots.sum() * batches.shape[1])
    return {"slots": round(float(slots.mean()), 1), "used": round(float(used), 4)}


def slot_rows(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Yields the rows of the first table."""
    for split in ("train", "validation"):
        counts = open_dataset(config.data, split).annotations.counts
        crowded = np.append(counts[: BATCH - 1], FLAGS.crowd)
        for name, numbers in ((split, counts), (f"{split}, one crowd", crowded)):
            head = {"images": name, "objects": f"{numbers.mean():.1f}, most {numbers.max()}"}
            largest = largest_of_batch(numbers, config) if name == split else {}
            if largest:
                yield head | {"layout": "largest of batch"} | largest
            yield head | {"layout": "paper"} | usage(numbers, with_layout(config, "paper"))
            for slots in map(int, FLAGS.slots):
                packed = usage(numbers, with_layout(config, "packed", slots))
                yield head | {"layout": "packed"} | packed


def traced(config: ConfigDict) -> dict[str, Any]:
    """Returns flops and kept bytes of a step, without compiling it."""
    model, mesh = build_model(config.model), make_mesh(1)
    shapes = abstract_params(model)
    is_trained = trainable(shapes, config.model)
    optimizer, _ = make_optimizer(config, shapes, 1000, 100_000, is_trained)
    mask = traverse_util.unflatten_dict(is_trained, sep="/")
    step = jit_train_step(
        model=model, optimizer=optimizer, trainable=mask, config=config, mesh=mesh
    )
    state = abstract_state(model, optimizer, config, mesh)
    lowered = step.lower(state, abstract_batch(config, "train", mesh))
    return {
        "gflop_per_step": round(lowered.cost_analysis()["flops"] / 1e9, 1),
        "kept_gb": gigabytes(kept_bytes(config)),
    }


def queries(config: ConfigDict) -> int:
    """Returns the number of decoder queries of an image in training."""
    paper = denoising.slots_needed(config.data.max_objects, config.dn.groups, config.dn.contrastive)
    slots = paper if config.dn.layout == "paper" else min(paper, config.dn.slots)
    return config.model.num_queries * max(config.model.num_patterns, 1) + slots


def timed_steps(configs: dict[str, ConfigDict]) -> dict[str, dict[str, Any]]:
    """Returns planned memory and times of all layouts, which run in turns."""
    steps = {}
    for name, config in configs.items():
        step = steps[name] = Step(config)
        batch = common.made_up_batch(config)
        batch["valid"][0] = np.arange(config.data.max_objects) < FLAGS.crowd
        step.batch = step.put(batch)
        step.run(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(FLAGS.rounds):
        for name, step in steps.items():
            run = lambda step=step: step.run(FLAGS.steps)  # noqa: E731
            seconds[name].append(common.timed(run) / FLAGS.steps)
    return {
        name: {
            "planned_gb": gigabytes(step.planned_bytes()),
            "step_s": common.summary(seconds[name]),
            "against_paper": common.summary(
                [a / b for a, b in zip(seconds[name], seconds["paper"], strict=True)]
            ),
        }
        for name, step in steps.items()
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    config.data.dir = FLAGS.data
    validate(config)
    (setting,) = common.settings_of_flags(config)
    report = common.Report("denoising_layouts")
    for row in slot_rows(config):
        report.add({"table": "slots"} | row)

    large = copy.deepcopy(config)
    large.model.dtype, large.train.batch_size = "bfloat16", FLAGS.large_batch_size
    common.apply_setting(config, setting)
    for layout in ("paper", "packed"):
        chosen = with_layout(large, layout)
        head = {"table": "traced", "layout": layout, "queries": queries(chosen)}
        shape = {"canvas": "{}x{}".format(*chosen.data.canvases[0])}
        shape["batch_size"] = FLAGS.large_batch_size
        report.add(head | shape | traced(chosen))

    configs = {layout: with_layout(config, layout) for layout in ("paper", "packed")}
    for layout, row in timed_steps(configs).items():
        head = {"table": "compiled", "layout": layout, "queries": queries(configs[layout])}
        report.add(head | {"device": device()} | setting.columns() | row)
    report.show(split_by="table")


if __name__ == "__main__":
    common.define_flags(batch_size=["2"], dtype=["float32"])
    flags.DEFINE_string("data", None, "A directory in COCO format.")
    flags.DEFINE_list("slots", ["50", "100", "150", "200", "300"], "Numbers of packed slots.")
    flags.DEFINE_integer("crowd", 90, "Objects of the crowded image.", lower_bound=0)
    flags.DEFINE_integer("large_batch_size", 2, "Images of the step that is only traced.")
    flags.mark_flag_as_required("data")
    run_main(main)
