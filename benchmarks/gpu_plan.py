"""Prints the compiler's plan of the training step on NVIDIA's GPUs, without a GPU.

    pip install "jax[cuda13]"
    python -m benchmarks.gpu_plan --canvas 800x1344 --batch_size 16,64 --dtype bfloat16

jax compiles ahead of time for GPUs from a description of their properties, here those of Hopper.
The table has a row for each batch size and attention:

- "xla" keeps the scores for the backward pass; "recomputed" is `model.remat=("attention",)`;
  "cudnn" is `compile.attention="cudnn"`;
- the memory that the compiler plans for a device: the total, and temporaries;
- the kernels that a step starts one after the other, and how many of them are cuDNN's attention;
- the collectives, and the bytes that they send.

With several `--devices`, the batch size is that of all devices together. Nothing is run, so there
are no times. XLA can't autotune kernels without the device, so matrix products are left to cuBLAS.
It counts neither operations nor memory traffic for such a program.
"""

import copy
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import common
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.preflight.compilation import compile_step
from dn_detr_jax.preflight.cost import Cost
from dn_detr_jax.preflight.gpus import KINDS, gpu_devices
from dn_detr_jax.preflight.report import GIB
from dn_detr_jax.sharding import make_mesh

FLAGS = flags.FLAGS
ATTENTIONS = "xla", "recomputed", "cudnn"


def count_kernels(program: str) -> int:
    """Returns how many kernels a compiled program starts, collectives and copies included."""
    kinds = "fusion|copy|custom-call|all-reduce-start|copy-start"
    entry = program[program.index("ENTRY ") :]
    return len(re.findall(rf"^ +(?:ROOT )?%[\w.-]+ = .+? (?:{kinds})\(", entry, re.MULTILINE))


def measure(config: ConfigDict, kind: str, devices: int) -> dict[str, Any]:
    """Returns the plan for the step of a config, as columns."""
    start = time.monotonic()
    compiled = compile_step(
        config, make_mesh(-1, gpu_devices(kind, devices)), config.data.canvases[0]
    )
    cost, text = Cost.of(compiled, devices), compiled.as_text()
    return {
        "planned_gib": round(cost.total / GIB, 2),
        "temporaries_gib": round(cost.temporaries / GIB, 2),
        "kernels": count_kernels(text),
        "cudnn_attentions": text.count('custom_call_target="__cudnn$fmha'),
        "collectives": sum(collective.count for collective in cost.collectives),
        "sent_mb": round(cost.bytes_sent / 1e6, 1),
        "compile_s": round(time.monotonic() - start, 1),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # uses no GPU of this machine
    report = common.Report("gpu_plan")
    for setting in common.settings_of_flags(FLAGS.config):
        for attention in FLAGS.attention:
            print(f"{setting.columns()}, attention {attention} ...", file=sys.stderr, flush=True)
            config = copy.deepcopy(FLAGS.config)
            common.apply_setting(config, setting)
            if attention == "cudnn":
                config.compile.attention = "cudnn"
            if attention == "recomputed":
                config.model.remat = ("attention",)
            row = {"gpu": FLAGS.gpu, "devices": FLAGS.devices, "attention": attention}
            report.add(setting.columns() | row | measure(config, FLAGS.gpu, FLAGS.devices))
    report.show()


if __name__ == "__main__":
    common.define_flags(batch_size=["16"], dtype=["bfloat16"])
    flags.DEFINE_enum("gpu", "h200", KINDS, "GPU to compile for.")
    flags.DEFINE_integer("devices", 1, "Number of GPUs.", lower_bound=1)
    flags.DEFINE_multi_enum("attention", ATTENTIONS, ATTENTIONS, "Several by repeating the flag.")
    run_main(main)
