"""Times the compiled training step on made-up images, without a data set or a loader.

    python -m benchmarks.train_step --canvas 800x1344 --batch_size 16,64 --dtype bfloat16
    python -m benchmarks.train_step --config configs/digits.py
    python -m benchmarks.train_step --canvas 256x320 --batch_size 1 --rounds 3 --steps 1  # on a CPU

The table has a row for each combination of canvas, batch size and dtype, with

- the seconds to trace, to compile, and of a step (median, fastest and slowest round);
- the flops of the model in one step, from the compiler's cost analysis of the traced program,
  before optimization and without rematerialization. MFU divides them by the time of the step and
  the peak of the devices; it is empty if `dn_detr_jax.preflight.accelerators` lacks the device;
- memory: the compiler's plan for a device (arguments, results and temporaries), and the peak that
  the device reports (a CPU reports none);
- the share of the step during which the host solves assignments.

A second table has the times of the parts of the step, from separate programs (see `step_parts`);
`--noparts` skips their compilation. Values of the config can be overridden:
`--config.dn.groups=0`.
"""

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict

from benchmarks import common, step_parts
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import validate
from dn_detr_jax.matching import host_timer
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.freed_memory import keep_freed_memory
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import abstract_state, init_state
from dn_detr_jax.training.step import abstract_batch, jit_train_step

FLAGS = flags.FLAGS


class Step:
    """The compiled training step of a config, its state and a batch.

    Attributes:
      config: whole configuration.
      mesh: mesh of the devices.
      model: detector.
      optimizer: of the state.
      mask: bool for each parameter, whether it is trained.
      state: after the steps so far.
      batch: on the devices.
      lowered: the program before compilation.
      program: compiled.
      trace_seconds: to trace and lower the program.
      compile_seconds: to compile the program.
    """

    def __init__(self, config: ConfigDict, objects: float | None = None):
        """Compiles the step; `objects` as for `common.made_up_batch`."""
        validate(config)
        keep_freed_memory()
        self.config = config
        self.mesh = make_mesh(config.mesh.data)
        self.model = build_model(config.model, config.compile.attention)
        shapes = abstract_params(self.model)
        is_trained = trainable(shapes, config.model)
        total = 100_000  # steps; only the schedule of the learning rate depends on it
        self.optimizer, _ = make_optimizer(config, shapes, total // 50, total, is_trained)
        self.mask = traverse_util.unflatten_dict(is_trained, sep="/")
        self.state = init_state(self.model, self.optimizer, config, self.mesh)
        self.batch = self.put(common.made_up_batch(config, objects))
        self.trace_seconds = common.timed(self._lower)
        self.compile_seconds = common.timed(self._compile)

    def _lower(self) -> None:
        step = jit_train_step(
            model=self.model,
            optimizer=self.optimizer,
            trainable=self.mask,
            config=self.config,
            mesh=self.mesh,
        )
        self.lowered = step.lower(self.state, self.batch)

    def _compile(self) -> None:
        options = accepted_options(self.config, jax.devices()[0])
        self.program = self.lowered.compile(options)

    def put(self, batch: dict) -> dict:
        """Sends a batch to the devices."""
        return put_batch(batch, self.mesh)

    def run(self, steps: int) -> None:
        """Takes a number of steps, and waits for the last."""
        for _ in range(steps):
            self.state, metrics = self.program(self.state, self.batch)
        metrics = jax.block_until_ready((self.state, metrics))[1]
        loss = metrics.as_dict()["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: the times of such steps are not valid")

    def flops(self) -> float:
        """Returns the flops of the model in one step, over all devices."""
        kept = not self.config.model.remat and self.config.compile.attention == "xla"
        if kept and self.config.train.accumulate_steps == 1:
            cost = self.lowered.cost_analysis()
            if cost is not None:
                return cost["flops"]
        # jax counts no flops on a GPU, and none of fused attention: count the step for a CPU.
        config = copy.deepcopy(self.config)
        config.model.remat, config.train.accumulate_steps = (), 1  # loops are counted once
        mesh, model = make_mesh(1, jax.devices("cpu")), build_model(config.model)
        step = jit_train_step(
            model=model, optimizer=self.optimizer, trainable=self.mask, config=config, mesh=mesh
        )
        state = abstract_state(model, self.optimizer, config, mesh)
        batch = abstract_batch(config, "train", mesh)
        return step.lower(state, batch).cost_analysis()["flops"]

    def planned_bytes(self) -> int:
        """Returns the memory of a device that the compiler plans for the program."""
        plan = self.program.memory_analysis()
        kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return kept + plan.temp_size_in_bytes

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))


def device() -> dict[str, Any]:
    """Returns the description of the devices for the report."""
    devices = jax.devices()
    found = {"kind": devices[0].device_kind, "count": len(devices)}
    return {"platform": devices[0].platform} | found


def peak_bytes() -> int | None:
    """Returns this process's peak memory on the first device, if the device reports it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def gigabytes(count: float | None) -> float | None:
    """Converts bytes to GB, rounded to kB."""
    return None if count is None else round(count / 1e9, 6)


def measure(config: ConfigDict, *, rounds: int, steps: int, parts: bool) -> dict[str, Any]:
    """Returns the figures of one setting.

    Args:
      config: whole configuration.
      rounds: timed rounds, after an untimed one.
      steps: per round.
      parts: whether to time the parts, too.
    """
    step = Step(config)
    step.run(steps)
    host_timer.take()
    seconds = [common.timed(lambda: step.run(steps)) / steps for _ in range(rounds)]
    matching, total = host_timer.take(), sum(seconds) * steps
    times = common.summary(seconds)
    flops, found = step.flops(), device()
    peak = common.peak_flops(found["kind"], config.model.dtype)
    row = {
        "device": found,
        "compile_s": round(step.trace_seconds + step.compile_seconds, 1),
        "step_s": times,
        "images_per_s": round(config.train.batch_size / times["median"], 2),
        "gflop_per_step": round(flops / 1e9, 3),
        "mfu": peak and round(flops / times["median"] / peak / step.mesh.size, 4),
        "planned_gb": gigabytes(step.planned_bytes()),
        "peak_gb": gigabytes(peak_bytes()),
        "matching_share": round(matching / total / step.mesh.size, 4),
        "parameters": step.parameters(),
        "trace_s": round(step.trace_seconds, 1),
    }
    if parts:
        row["parts"] = step_parts.measure(step, rounds=rounds, steps=steps)
    return row


def parts_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table with the seconds of each part, a row for each setting."""
    shown = []
    for row in rows:
        if "parts" in row:
            medians = {name: times["median"] for name, times in row["parts"].items()}
            whole = {"all parts": sum(medians.values()), "the step": row["step_s"]["median"]}
            first = {name: row[name] for name in ("canvas", "batch_size", "dtype")}
            shown.append(first | medians | whole)
    return common.table(shown) if shown else ""


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    if FLAGS.worker:
        common.apply_setting(config, common.Setting.from_json(FLAGS.worker))
        options = {"rounds": FLAGS.rounds, "steps": FLAGS.steps, "parts": FLAGS.parts}
        common.answer(lambda: measure(config, **options), None)
        return
    validate(config)
    report = common.Report("train_step")
    for setting in common.settings_of_flags(config):
        report.add(setting.columns() | common.measured_alone("train_step", setting, report))
    report.show()
    if where := parts_table(report.rows()):
        print(f"\nSeconds of the parts, each a separate program:\n\n{where}")
    if not any("step_s" in row for row in report.rows()):
        sys.exit(1)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_bool("parts", True, "Also time the parts of the step.")
    run_main(main)
