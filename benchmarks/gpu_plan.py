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
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import common
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.accelerators import CHIPS
from dn_detr_jax.preflight.compilation import compile_step
from dn_detr_jax.preflight.cost import Cost
from dn_detr_jax.preflight.report import GIB
from dn_detr_jax.sharding import make_mesh

FLAGS = flags.FLAGS
GPUS = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
ATTENTIONS = "xla", "recomputed", "cudnn"

# The result of CUDA's device query for an H100 SXM, in the text form of XLA's GpuTargetConfigProto.
# An H200 differs only in its memory.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{kind}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def gpus(kind: str, number: int) -> Sequence[Any]:
    """Returns devices of one host to compile for; they can't run a program.

    Args:
      kind: of `GPUS`.
      number: of devices.

    Raises:
      PreflightError: jax is installed without its compiler for GPUs.
    """
    try:
        cudnn = metadata.version("nvidia-cudnn-cu13").split(".")
        properties = _HOPPER.format(
            kind=kind,
            cudnn=cudnn,
            memory=CHIPS[kind].memory,
            bandwidth=CHIPS[kind].memory_bandwidth,
        )
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            target_config=properties,
            topology=f"1x1x{number}",
        ).devices
    except (metadata.PackageNotFoundError, RuntimeError) as error:
        raise PreflightError(f'no compiler for GPUs: pip install "jax[cuda13]" ({error})') from None


def compile_for(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the training step for GPUs that this machine need not have.

    Args:
      config: whole configuration; its first canvas is used.
      mesh: of devices from `gpus`.
    """
    config = copy.deepcopy(config)
    untried = "gpu:xla_gpu_enable_triton_gemm=false"
    config.compile.options = (untried, *config.compile.options)
    with mock.patch.object(jax, "pure_callback", _call_nothing):
        return compile_step(config, mesh, config.data.canvases[0])


def _call_nothing(solve: Callable, shape: Any, arguments: Any, **how: Any) -> jax.Array:
    """Replaces `jax.pure_callback`, which needs a real GPU, by the call that jax makes of it."""
    del solve, how
    target = jax.ffi.ffi_call("xla_ffi_python_gpu_callback", shape)
    return target(*jax.tree.leaves(arguments), index=np.uint64(0))


def count_kernels(program: str) -> int:
    """Returns how many kernels a compiled program starts, collectives and copies included."""
    kinds = "fusion|copy|custom-call|all-reduce-start|copy-start"
    entry = program[program.index("ENTRY ") :]
    return len(re.findall(rf"^ +(?:ROOT )?%[\w.-]+ = .+? (?:{kinds})\(", entry, re.MULTILINE))


def measure(config: ConfigDict, kind: str, devices: int) -> dict[str, Any]:
    """Returns the plan for the step of a config, as columns."""
    start = time.monotonic()
    compiled = compile_for(config, make_mesh(-1, gpus(kind, devices)))
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
    flags.DEFINE_enum("gpu", GPUS[0], GPUS, "GPU to compile for.")
    flags.DEFINE_integer("devices", 1, "Number of GPUs.", lower_bound=1)
    flags.DEFINE_multi_enum("attention", ATTENTIONS, ATTENTIONS, "Several by repeating the flag.")
    run_main(main)
