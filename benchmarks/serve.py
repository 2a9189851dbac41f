"""Compares inference with the same architecture in PyTorch: latency and throughput.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.serve --canvas 800x1344 --batch_size 1,16 --dtype bfloat16
    python -m benchmarks.serve --canvas 256x320 --batch_size 1 --rounds 3 --steps 2  # on a CPU

A call turns uint8 images on the host into the best boxes, scores and labels on the host: transfer,
normalization, network, selection, transfer. `latency_s` is the time of a call when calls run one
after the other (median, fastest, slowest; `p90_s` is the 90th percentile), `latency_cpu_s` has the
seconds of all threads in it. `ready_s` is the time
from the start to the end of the first call, compilation included. `images_per_s` is measured
separately with two calls in flight, so that the host prepares one while the device runs the other.
Contenders are `ours`, the compiled program of `Predictor`, `peer` and `peer_compiled` (see
`torch_peer`); they take turns as in `benchmarks.peer`.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.peer import add_ratios
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import validate

FLAGS = flags.FLAGS
CONTENDERS = "ours", "peer", "peer_compiled"


def our_program(config: ConfigDict, batch: dict) -> tuple[Callable, Callable, dict[str, Any]]:
    """Returns functions that start the compiled detection and wait for it, and the device."""
    import jax
    import jax.numpy as jnp

    from benchmarks.train_step import device
    from dn_detr_jax.evaluation.detect import detect
    from dn_detr_jax.models.registry import build_model
    from dn_detr_jax.training.compile_options import accepted_options
    from dn_detr_jax.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    model = build_model(config.model, config.compile.attention)
    params = jax.jit(model.init)(
        jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)
    )["params"]

    def program(params, images, sizes):
        return detect(params, images, sizes, model=model, config=config)

    options = accepted_options(config, jax.devices()[0])
    lowered = jax.jit(program).lower(params, batch["image"], batch["size"])
    compiled = lowered.compile(options)

    def start(batch):
        return compiled(params, *jax.device_put((batch["image"], batch["size"])))

    return start, jax.device_get, device()


def peer_program(
    config: ConfigDict, *, compiled: bool
) -> tuple[Callable, Callable, dict[str, Any]]:
    """Returns the same for the peer."""
    from benchmarks import torch_peer

    inference = torch_peer.Inference(config, compiled=compiled)
    return inference.start, inference.finish, torch_peer.device_of(inference.device)


def work(config: ConfigDict, setting: common.Setting) -> None:
    """Runs the worker of a contender, which answers with the seconds of calls, by rounds."""
    common.apply_setting(config, setting)
    batch = common.made_up_batch(config)

    def begin():
        nonlocal start, finish
        began = time.perf_counter()
        if setting.contender == "ours":
            start, finish, device = our_program(config, batch)
        else:
            compiled = setting.contender == "peer_compiled"
            start, finish, device = peer_program(config, compiled=compiled)
        finish(start(batch))
        return {"device": device, "ready_s": round(time.perf_counter() - began, 1)}

    def pipelined():
        running = start(batch)
        for _ in range(FLAGS.steps - 1):
            following = start(batch)
            finish(running)
            running = following
        finish(running)

    def one_round():
        calls = [common.costs(lambda: finish(start(batch))) for _ in range(FLAGS.steps)]
        return {"calls": calls, "pipelined": common.timed(pipelined) / FLAGS.steps}

    start = finish = None
    common.answer(begin, one_round)


def row_of(setting: common.Setting, result: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a contender from its worker's answers."""
    first = {"contender": setting.contender} | setting.columns()
    if "failed" in result:
        return first | {"failed": result["failed"]}
    ready, rounds = result["ready"], result["rounds"]
    calls = [call["seconds"] for answer in rounds for call in answer["calls"]]
    cpu = [call["cpu_seconds"] for answer in rounds for call in answer["calls"]]
    p90 = statistics.quantiles(calls, n=10)[-1] if len(calls) > 9 else None
    pipelined = statistics.median(answer["pipelined"] for answer in rounds)
    return first | {
        "device": ready["device"],
        "on": ready["device"]["kind"],
        "ready_s": ready["ready_s"],
        "latency_s": common.summary(calls),
        "latency_cpu_s": common.summary(cpu),
        "p90_s": None if p90 is None else round(p90, 5),
        "images_per_s": round(setting.batch_size / pipelined, 2),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    if FLAGS.worker:
        work(config, common.Setting.from_json(FLAGS.worker))
        return
    validate(config)
    common.check_contenders(CONTENDERS)
    report = common.Report("serve")
    settings = common.settings_of_flags(config, FLAGS.contenders)
    for setting, result in common.take_turns("serve", settings, report):
        report.add(row_of(setting, result))
    add_ratios(report.rows(), "latency_s")
    add_ratios(report.rows(), "latency_cpu_s", "cpu_ratio")
    report.show()
    if not any("latency_s" in row for row in report.rows()):
        sys.exit(1)


if __name__ == "__main__":
    common.define_flags(["1"])
    common.define_contender_flags(CONTENDERS)
    run_main(main)
