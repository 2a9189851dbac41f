"""Times the compiled training step on made-up pictures: no data set, no loader.

    python benchmarks/train_step.py --config configs/digits.py
    python benchmarks/train_step.py --config configs/coco_r50.py --config.model.dtype=bfloat16

Prints one JSON object: version, device, canvas, seconds to compile, median, fastest and slowest
step, pictures per second, the share of the step that the matching on the host takes, and GFLOP as
the compiler counts them. Options of the config apply, `data.canvases` too (the first is used).
"""

import json
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.command_line import run_main
from dn_detr_jax.config import ConfigError, validate
from dn_detr_jax.matching import host_timer
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.setup import COMPILER_OPTIONS
from dn_detr_jax.training.state import init_state
from dn_detr_jax.training.step import jit_train_step

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
flags.DEFINE_integer("steps", 20, "Steps to time, after three that are not.", lower_bound=1)
flags.mark_flag_as_required("config")


def made_up_batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise as pictures that fill nine tenths of the canvas, with 0 to `data.max_objects` boxes."""
    rng = np.random.default_rng(seed)
    (height, width), objects = config.data.canvases[0], config.data.max_objects
    batch = config.train.batch_size
    centres, sides = rng.uniform(0.3, 0.7, (2, batch, objects, 2))
    return {
        "image": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "size": np.tile(np.array([height * 9 // 10, width], np.int32), (batch, 1)),
        "labels": rng.integers(0, config.model.num_classes, (batch, objects), dtype=np.int32),
        "boxes": np.concatenate([centres, sides / 4], axis=-1).astype(np.float32),
        "valid": np.arange(objects) < rng.integers(0, objects + 1, (batch, 1)),
        "image_id": np.arange(batch, dtype=np.int32),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    validate(config)
    mesh, model = make_mesh(config.mesh.data), build_model(config.model)
    shapes = abstract_params(model)
    is_trained = trainable(shapes, config.model)
    total = 100_000  # steps; only the schedule of the learning rate depends on it
    optimizer, _ = make_optimizer(config, shapes, total // 50, total, is_trained)
    mask = traverse_util.unflatten_dict(is_trained, sep="/")
    step, _ = jit_train_step(
        model=model, optimizer=optimizer, trainable=mask, config=config, mesh=mesh
    )
    state = init_state(model, optimizer, config, mesh)
    batch = put_batch(made_up_batch(config), mesh)

    platform = jax.devices()[0].platform
    start = time.perf_counter()
    program = step.lower(state, batch).compile(COMPILER_OPTIONS.get(platform))
    compiled = time.perf_counter() - start

    seconds = []
    for i in range(FLAGS.steps + 3):
        if i == 3:
            host_timer.take()
        start = time.perf_counter()
        state, metrics = program(state, batch)
        metrics.block_until_ready()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[3:]
    median = statistics.median(seconds)
    cost = program.cost_analysis() or {}
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "canvas": list(config.data.canvases[0]),
        "batch_size": config.train.batch_size,
        "dtype": config.model.dtype,
        "compile_seconds": round(compiled, 1),
        "step_seconds": {
            "median": round(median, 5),
            "min": round(min(seconds), 5),
            "max": round(max(seconds), 5),
        },
        "images_per_second": round(config.train.batch_size / median, 2),
        "matching_share": round(host_timer.take() / sum(seconds), 4),
        "gflop_per_step": round(cost.get("flops", 0) / 1e9, 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_main(main, (ConfigError, OSError))
