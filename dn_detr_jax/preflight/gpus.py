"""NVIDIA's GPUs to compile for, without a GPU.

jax compiles for a GPU from the properties that CUDA's device query reports. They are written down
here for the GPUs of `KINDS`. XLA tries kernels out on the device and takes the fastest; without the
device it can't, so matrix products are left to cuBLAS.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.accelerators import CHIPS

# jax's `device_kind` by the name in a topology.
KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# Options without which XLA asks for the device.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
INSTALL = (
    "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm "
    "nvidia-cuda-crt, the first two in jax's version"
)
_CUDNN = "9.28"  # compiled for where cuDNN is not installed
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


def gpu_devices(name: str, number: int) -> Sequence[Any]:
    """Returns devices of one host to compile for; they can't run a program.

    Args:
      name: of `KINDS`.
      number: of devices.

    Raises:
      PreflightError: jax is installed without its compiler for GPUs.
    """
    kind = KINDS[name]
    try:
        cudnn = metadata.version("nvidia-cudnn-cu13")
    except metadata.PackageNotFoundError:
        cudnn = _CUDNN
    properties = _HOPPER.format(
        kind=kind,
        cudnn=cudnn.split("."),
        memory=CHIPS[kind].memory,
        bandwidth=CHIPS[kind].memory_bandwidth,
    )
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            target_config=properties,
            topology=f"1x1x{number}",
        ).devices
    except RuntimeError as error:
        raise PreflightError(f"no compiler for GPUs: {INSTALL} ({error})") from None


def is_absent_gpu(device: Any) -> bool:
    """Whether a device is one of `gpu_devices`, not of this machine."""
    return device.platform in ("gpu", "cuda") and device not in jax.devices()


def usable_bytes(kind: str) -> float:
    """Bytes that jax takes of a GPU's memory: three quarters, or what its variable says."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")) * CHIPS[kind].memory


@contextlib.contextmanager
def callbacks_without_gpu() -> Iterator[None]:
    """Lets programs with a host callback be compiled, but not run, for GPUs that are absent.

    `jax.pure_callback` asks for a GPU to register the function with. Within this context, the
    program gets the call that jax makes of it, of no function.
    """

    def call_nothing(solve: Callable, shape: Any, arguments: Any, **how: Any) -> jax.Array:
        del solve, how
        target = jax.ffi.ffi_call("xla_ffi_python_gpu_callback", shape)
        return target(*jax.tree.leaves(arguments), index=np.uint64(0))

    original = jax.pure_callback
    jax.pure_callback = call_nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        jax.pure_callback = original
