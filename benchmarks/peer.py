"""Compares the training step with the same architecture in PyTorch, on equal batches.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.peer --canvas 800x1344 --batch_size 16 --dtype bfloat16,float32
    python -m benchmarks.peer --canvas 256x320 --batch_size 1 --rounds 3 --steps 1  # on a CPU

    python -m benchmarks.peer --config configs/coco_deformable_r50_50ep.py ...

The contenders (`--contenders`):

- `ours`: this project without denoising queries, plain DAB-DETR, which does the peer's work;
- `ours_dn`: this project with the denoising queries of the config, which the peer lacks;
- `peer`: DAB-DETR of `transformers`, or its Deformable DETR, eager; `torch_peer` describes both;
- `peer_compiled`: the same with `torch.compile`.

Each contender is a process. On a CPU all of them run in turns, so that a slow phase of the machine
affects all of them. On an accelerator they run one after the other, because they do not all fit
(`--interleave` and `--nointerleave` override this). `ratio` is the step time of the fastest peer of
the same setting and dtype, divided by that of the row; above 1 the row is faster. `step_cpu_s` and
`cpu_ratio` are the same for the seconds of all threads of a process. `parameters` include the
statistics of the frozen batch norms. DAB-DETR of the peer has the same parameters except for the
embedding of the labels, which denoising needs: 23,460 of 43.8 million for COCO.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import common
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)

FLAGS = flags.FLAGS
CONTENDERS = "ours", "ours_dn", "peer", "peer_compiled"


def work(config: ConfigDict, setting: common.Setting) -> None:
    """Runs the worker of a contender, which answers with the seconds of a step, by rounds."""
    common.apply_setting(config, setting)
    if setting.contender == "ours":
        config.dn.groups = 0

    def start():
        nonlocal run, peak
        # Only the workers that use a framework import it.
        if setting.contender.startswith("peer"):
            from benchmarks import torch_peer

            batch = common.made_up_batch(config)
            compiled = setting.contender == "peer_compiled"
            step = torch_peer.Training(config, batch, compiled=compiled)
            device, run, peak = torch_peer.device_of(step.device), step.run, step.peak_bytes
        else:
            from benchmarks import train_step

            step = train_step.Step(config)
            device, run, peak = train_step.device(), step.run, train_step.peak_bytes
        run(1)
        parameters = step.parameters()
        seconds = round(step.compile_seconds + getattr(step, "trace_seconds", 0.0), 1)
        return {"device": device, "parameters": parameters, "compile_s": seconds}

    def one_round():
        figures = common.costs(lambda: run(FLAGS.steps))
        return {name: value / FLAGS.steps for name, value in figures.items()} | {"peak": peak()}

    run = peak = None
    common.answer(start, one_round)


def row_of(setting: common.Setting, result: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a contender from its worker's answers."""
    first = {"contender": setting.contender} | setting.columns()
    if "failed" in result:
        return first | {"failed": result["failed"]}
    ready, rounds = result["ready"], result["rounds"]
    times = common.summary([answer["seconds"] for answer in rounds])
    peak = rounds[-1]["peak"]
    return first | {
        "device": ready["device"],
        "on": ready["device"]["kind"],
        "parameters": ready["parameters"],
        "compile_s": ready["compile_s"],
        "step_s": times,
        "step_cpu_s": common.summary([answer["cpu_seconds"] for answer in rounds]),
        "images_per_s": round(setting.batch_size / times["median"], 2),
        "peak_gb": None if peak is None else round(peak / 1e9, 3),
    }


def add_ratios(rows: list[dict[str, Any]], column: str, name: str = "ratio") -> None:
    """Adds a ratio to rows that have a time, as the module docstring defines it."""
    settings = "canvas", "batch_size", "dtype"
    for row in rows:
        like = [other for other in rows if all(other[key] == row[key] for key in settings)]
        peers = [
            other[column]["median"]
            for other in like
            if column in other and other["contender"].startswith("peer")
        ]
        if column in row and peers:
            row[name] = round(min(peers) / row[column]["median"], 3)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    config = FLAGS.config
    if FLAGS.worker:
        work(config, common.Setting.from_json(FLAGS.worker))
        return
    validate(config)
    common.check_contenders(CONTENDERS)
    report = common.Report("peer")
    settings = common.settings_of_flags(config, FLAGS.contenders)
    for setting, result in common.take_turns("peer", settings, report):
        report.add(row_of(setting, result))
    add_ratios(report.rows(), "step_s")
    add_ratios(report.rows(), "step_cpu_s", "cpu_ratio")
    report.show()
    if not any("step_s" in row for row in report.rows()):
        sys.exit(1)


if __name__ == "__main__":
    common.define_flags()
    common.define_contender_flags(CONTENDERS)
    run_main(main)
