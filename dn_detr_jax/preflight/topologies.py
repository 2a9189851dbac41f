"""The devices of a topology of TPUs or GPUs, without having them."""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.gpus import KINDS, gpu_devices

# Generations as topologies name them, and how many dimensions their slices have.
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_EXAMPLES = (
    "v5e:4x4 (16 chips), v6e:8x8, v4:2x2x4, v5p:4x4x4, h100:8, h200:1, or local for the devices "
    "present"
)
# Without them libtpu asks the network where it is, logs that it found no TPU, and refuses to be
# loaded while another process has it, as one that uses TPUs must; a compiler alone need not.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def topology_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology, for a mesh to compile for; they can't run anything.

    Args:
      topology: generation of TPUs and chips along each axis, such as "v5e:4x4"; GPUs of one
        machine, such as "h100:8"; or "local".

    Raises:
      PreflightError: an unknown topology, or its compiler is not installed.
    """
    if topology == "local":
        return jax.devices()
    if match := re.fullmatch(rf"({'|'.join(KINDS)}):([1-8])", topology):
        try:
            return gpu_devices(match[1], int(match[2]))
        except PreflightError as error:
            raise PreflightError(f"--topology={topology}: {error}") from None
    if topology.split(":")[0] in KINDS:
        text = "1 to 8 GPUs of one machine"
        raise PreflightError(f"--topology={topology}: {text}; for example {_EXAMPLES}")
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in _DIMENSIONS:
        raise PreflightError(f"--topology={topology}: unknown; for example {_EXAMPLES}")
    generation, sides = match[1], [int(side) for side in match[2].split("x")]
    if len(sides) != _DIMENSIONS[generation]:
        raise PreflightError(
            f"--topology={topology}: {generation} slices have {_DIMENSIONS[generation]} "
            f"dimensions; for example {_EXAMPLES}"
        )
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise PreflightError(
            f"--topology={topology} needs the compiler for TPUs, libtpu: "
            'pip install "jax[tpu]" (Linux on x86-64), or use --topology=local'
        ) from None
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A host has 2 x 2 chips, or a part of that; both cores of a v4 chip are one device.
    options: dict[str, Any] = {"chips_per_host_bounds": _host_bounds(sides)}
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(": ", 1)[-1]
        raise PreflightError(f"--topology={topology}: {reason}; for example {_EXAMPLES}") from None


def _host_bounds(sides: Sequence[int]) -> tuple[int, int, int]:
    return min(sides[0], 2), min(sides[1], 2), 1
