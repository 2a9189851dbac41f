"""Times the matching on the host: alone, and in the real training step.

    python -m benchmarks.matching --canvas 800x1344 --step_batch_size 16 --dtype bfloat16
    python -m benchmarks.matching --canvas 256x320 --rounds 3 --steps 1  # on a CPU

The first table has a row for every combination of batch size, decoder layers, queries and objects
per image (`--objects_each`, the same number in each image), for random predictions and boxes. Times
are medians in milliseconds of

- `cost_ms`: the costs on the device;
- `solve_ms`: SciPy, inside the callback;
- `transfer_ms`: the rest of the callback: costs to the host, assignments to the device, waiting;
- `all_ms`: costs, callback and assignments as one program.

The second table describes the training step of the config for each number of objects: the share of
its time that SciPy takes, and the share that the whole callback adds, by comparison with the same
step with a fixed assignment computed on the device. `--nostep` skips it and its two compilations.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.train_step import Step, device
from dn_detr_jax import matching
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)

FLAGS = flags.FLAGS


def predictions(
    batch: int, layers: int, queries: int, objects: int, slots: int, classes: int = 91
) -> dict[str, np.ndarray]:
    """Returns random arguments of `matching.matching_cost`, and `valid` for `objects` slots."""
    rng = np.random.default_rng(0)

    def boxes(*shape):
        centers, sides = rng.uniform(0.2, 0.8, (2, *shape, 2))
        return np.concatenate([centers, sides / 3], axis=-1).astype(np.float32)

    return {
        "pred_logits": rng.normal(-4, 1, (layers, batch, queries, classes)).astype(np.float32),
        "pred_boxes": boxes(layers, batch, queries),
        "labels": rng.integers(0, classes, (batch, slots), dtype=np.int32),
        "boxes": boxes(batch, slots),
        "valid": np.tile(np.arange(slots) < objects, (batch, 1)),
    }


def measure_alone(arguments: dict[str, np.ndarray], repeats: int) -> dict[str, float]:
    """Returns milliseconds of the parts of one matching, as the module docstring lists them.

    Args:
      arguments: from `predictions`.
      repeats: number of timed runs, after two untimed ones.
    """
    arguments = jax.device_put(arguments)
    valid = arguments["valid"]

    def costs(arguments):
        rest = {name: value for name, value in arguments.items() if name != "valid"}
        return matching.sanitize(matching.matching_cost(**rest), arguments["valid"])[0]

    cost_program, assign_program = jax.jit(costs), jax.jit(matching.assign)
    whole_program = jax.jit(lambda arguments: matching.assign(costs(arguments), arguments["valid"]))
    cost = cost_program(arguments)

    def seconds(call: Callable[[], Any]) -> tuple[list[float], list[float]]:
        walls, solves = [], []
        for _ in range(repeats + 2):
            matching.host_timer.take()
            walls.append(common.timed(lambda: jax.block_until_ready(call())))
            solves.append(matching.host_timer.take())
        return walls[2:], solves[2:]

    cost_seconds, _ = seconds(lambda: cost_program(arguments))
    walls, solves = seconds(lambda: assign_program(cost, valid))
    whole, _ = seconds(lambda: whole_program(arguments))
    rest = [wall - solve for wall, solve in zip(walls, solves, strict=True)]
    parts = {"cost": cost_seconds, "solve": solves, "transfer": rest, "all": whole}
    return {f"{name}_ms": round(statistics.median(t) * 1e3, 3) for name, t in parts.items()}


def measure_step(
    config: ConfigDict, objects: Sequence[int], *, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Returns the rows of the second table.

    Args:
      config: whole configuration.
      objects: numbers of objects per image, one for each row.
      rounds: timed rounds, in turns with and without the callback, after an untimed one.
      steps: per round.
    """
    real = Step(config)
    with mock.patch.object(matching, "assign", _fixed_assignment):
        fixed = Step(config)
    rows = []
    for number in objects:
        batch = common.made_up_batch(config)
        slots = config.data.max_objects
        batch["valid"] = np.tile(np.arange(slots) < number, (config.train.batch_size, 1))
        real.batch, fixed.batch = real.put(batch), fixed.put(batch)
        real.run(1), fixed.run(1)
        with_callback, without, solving = [], [], []
        for _ in range(rounds):
            matching.host_timer.take()
            with_callback.append(common.timed(lambda: real.run(steps)) / steps)
            solving.append(matching.host_timer.take() / steps / real.mesh.size)
            without.append(common.timed(lambda: fixed.run(steps)) / steps)
        added = [1 - b / a for a, b in zip(with_callback, without, strict=True)]
        shares = [solve / a for solve, a in zip(solving, with_callback, strict=True)]
        rows.append(
            {
                "objects": number,
                "step_s": common.summary(with_callback),
                "fixed_step_s": common.summary(without),
                "solve_share": round(statistics.median(shares), 4),
                "callback_share": round(statistics.median(added), 4),
            }
        )
    return rows


def _fixed_assignment(cost: jax.Array, valid: jax.Array, mesh: Any = None) -> jax.Array:
    """Replaces `matching.assign`: assigns query i to object i. It reads the costs, too."""
    del mesh
    batch, layers, queries, slots = cost.shape
    query = jnp.arange(slots, dtype=jnp.int32) % queries
    query = jnp.where(jnp.sum(cost) == jnp.inf, 0, query)  # never true; keeps the costs
    return jnp.broadcast_to(
        jnp.where(valid, query, -1).astype(jnp.int32)[:, None], (batch, layers, slots)
    )


def measure_all_alone(config: ConfigDict) -> dict[str, Any]:
    """Returns the answer of the worker for the first table."""
    rows = []
    names = "batch_size", "layers", "queries", "objects_each"
    for shape in itertools.product(*(_numbers(name) for name in names)):
        arguments = predictions(*shape, slots=max(config.data.max_objects, shape[-1]))
        times = measure_alone(arguments, FLAGS.rounds * FLAGS.steps)
        rows.append(dict(zip(names, shape, strict=True)) | times)
    return {"device": device(), "rows": rows}


def measure_all_steps(config: ConfigDict) -> dict[str, Any]:
    """Returns the answer of the worker for the second table."""
    objects = dict.fromkeys(min(n, config.data.max_objects) for n in _numbers("objects_each"))
    rows = measure_step(config, list(objects), rounds=FLAGS.rounds, steps=FLAGS.steps)
    return {"device": device(), "rows": rows}


def _numbers(flag: str) -> list[int]:
    return [common.positive(f"--{flag}", text) for text in FLAGS[flag].value]


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    tasks = {"alone": measure_all_alone, "step": measure_all_steps}
    if FLAGS.worker:
        setting = common.Setting.from_json(FLAGS.worker)
        common.apply_setting(config, setting)
        common.answer(lambda: tasks[setting.contender](config), None)
        return
    validate(config)
    batch_size = FLAGS.step_batch_size or config.train.batch_size
    sizes = [str(batch_size)]  # the flag is for the first table
    settings = common.settings_of_flags(config, list(tasks) if FLAGS.step else ["alone"], sizes)
    report = common.Report("matching")
    for setting in settings:
        first = setting.columns() if setting.contender == "step" else {}
        answer = common.measured_alone("matching", setting, report)
        head = {"device": answer.pop("device", None), "of": setting.contender}
        for row in answer.pop("rows", [answer]):
            report.add(head | first | row)
    report.show("of")
    if all("failed" in row for row in report.rows()):
        sys.exit(1)


if __name__ == "__main__":
    common.define_flags(["1", "16", "64"])
    flags.DEFINE_list("layers", ["6"], "Decoder layers, several by commas; the first table's.")
    flags.DEFINE_list("queries", ["300"], "Queries, several by commas; the first table's.")
    flags.DEFINE_list("objects_each", ["1", "7", "20", "100"], "Objects of each image.")
    flags.DEFINE_integer("step_batch_size", 0, "Batch size of the second table; 0: the config's.")
    flags.DEFINE_bool("step", True, "Also make the second table.")
    run_main(main)
