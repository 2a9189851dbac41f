"""The device mesh, and how batches and states lie on it.

There is one mesh axis, `data`. Batches are split over it. Everything else has a copy on every
device, except an optimizer state that is split too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dn_detr_jax.errors import ConfigError

PyTree = Any


def make_mesh(num_devices: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over `num_devices` of the devices, by default jax's; -1: all of them.

    All processes have equally many of them, in the order of the processes, so that a process reads
    the rows of a batch that its devices hold.

    Raises:
      ConfigError: there are fewer devices, or they differ in number between processes.
    """
    devices = jax.devices() if devices is None else devices
    if num_devices != -1 and not 1 <= num_devices <= len(devices):
        raise ConfigError(
            "mesh.data", num_devices, f"1 to {len(devices)} ({devices[0].platform}), or -1 for all"
        )
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if len(by_process) == 1:
        devices = devices if num_devices == -1 else devices[:num_devices]
        return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    wanted = len(devices) if num_devices == -1 else num_devices
    each, rest = divmod(wanted, len(by_process))
    fewest = min(map(len, by_process.values()))
    if rest or each > fewest:
        raise ConfigError(
            "mesh.data",
            num_devices,
            f"equally many devices in each of {len(by_process)} processes; one of them has "
            f"{fewest}: a multiple of {len(by_process)}, at most {fewest * len(by_process)}",
        )
    ordered = [device for process in sorted(by_process) for device in by_process[process][:each]]
    return Mesh(np.array(ordered), ("data",), (AxisType.Auto,))


def over_data(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: the first axis is split over the devices."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of states and results: every device has a copy."""
    return NamedSharding(mesh, P())


def largest_axis_over_data(shapes: PyTree, mesh: Mesh) -> PyTree:
    """Returns shardings that split each array over the devices.

    An array is split along its largest axis that the number of devices divides, the first of equal
    ones. If there is no such axis, every device has a copy.
    """

    def sharding(x):
        fitting = [axis for axis, size in enumerate(x.shape) if size and size % mesh.size == 0]
        if not fitting:
            return replicated(mesh)
        largest = max(fitting, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*[None] * largest, "data"))

    return jax.tree.map(sharding, shapes)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Sends the rows of a batch of this process to its devices, as parts of global arrays."""
    sharding = over_data(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def with_sharding(shapes: PyTree, sharding: NamedSharding) -> PyTree:
    """Adds a sharding to a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
