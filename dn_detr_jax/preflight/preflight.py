"""Compiles the training step of a config for a topology and collects its cost.

`dn_detr_jax.commands.preflight` is the command. The times are bounds from the chips' peak figures,
not measurements: a real step takes longer, and the matching on the host, which the device waits
for, comes on top.
"""

import dataclasses
import math
import time
from importlib import metadata
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.config import validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.preflight.accelerators import CHIPS, Chip
from dn_detr_jax.preflight.compilation import (
    OutOfMemory,
    abstract_step,
    compile_step,
    count_operations,
    usable_memory,
)
from dn_detr_jax.preflight.cost import Cost
from dn_detr_jax.preflight.suggestions import with_batch
from dn_detr_jax.preflight.topologies import topology_devices
from dn_detr_jax.sharding import make_mesh


def versions() -> dict[str, str]:
    """Returns the versions of the packages that compile the step."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Preflight(NamedTuple):
    """The answer for one config, topology and canvas.

    Attributes:
      config: with its batch size.
      topology: its name.
      mesh: of its devices.
      canvas: height and width.
      chip: figures of the devices, or None.
      usable: bytes per device that a program may use, or None.
      num_parameters: of the model.
      fixed: bytes per device that do not depend on the batch.
      seconds: to compile.
      cost: of the step, or None if it does not fit.
      needed: bytes per device; None if the compiler did not say.
      fits: whether that is within `usable`; True where that is unknown.
    """

    config: ConfigDict
    topology: str
    mesh: Mesh
    canvas: tuple[int, int]
    chip: Chip | None
    usable: float | None
    num_parameters: int
    fixed: int
    seconds: float
    cost: Cost | None
    needed: float | None
    fits: bool

    @property
    def batch_per_device(self) -> int:
        """Images."""
        return self.config.train.batch_size // self.mesh.size

    def record(self) -> dict[str, Any]:
        """Returns everything in a form for JSON."""
        record: dict[str, Any] = {
            "versions": versions(),
            "topology": self.topology,
            "device": self.mesh.devices.flat[0].device_kind,
            "devices": self.mesh.size,
            "canvas": list(self.canvas),
            "batch_per_device": self.batch_per_device,
            "dtype": self.config.model.dtype,
            "parameters": self.num_parameters,
            "fits": self.fits,
            "bytes_needed": self.needed,
            "bytes_usable": self.usable,
            "compile_seconds": round(self.seconds, 1),
        }
        if self.chip:
            record["chip"] = dataclasses.asdict(self.chip)
        if self.cost:
            cost = dataclasses.asdict(self.cost)
            cost["collectives"] = [c._asdict() for c in self.cost.collectives]
            cost["host"] = self.cost.host._asdict()
            cost["traffic"] = [t._asdict() for t in self.cost.traffic]
            record["cost"] = cost | {"bytes_sent": self.cost.bytes_sent}
        if self.cost and self.chip:
            bound = self.cost.roofline(self.chip)
            record["roofline_seconds"] = bound._asdict() | {"bound": bound.bound}
        return record


def configured_mesh(
    config: ConfigDict, topology: str, batch_per_device: int | None = None
) -> tuple[ConfigDict, Mesh]:
    """Returns a config with its batch size, and the mesh of the devices.

    Args:
      config: whole configuration, validated; stays unchanged.
      topology: see `topology_devices`.
      batch_per_device: images per device; None: `train.batch_size` over all devices.

    Raises:
      PreflightError, ConfigError: a wrong topology, or a batch that its devices can't share.
    """
    mesh = make_mesh(config.mesh.data, topology_devices(topology))
    if batch_per_device is not None:
        config = with_batch(config, batch_per_device, mesh)
    elif config.train.batch_size % mesh.size:
        expected = f"a multiple of the {mesh.size} devices, or give --batch_per_device"
        raise ConfigError("train.batch_size", config.train.batch_size, expected)
    return config, mesh


def run_preflight(
    config: ConfigDict,
    topology: str,
    batch_per_device: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Preflight:
    """Compiles the training step of a config for a topology.

    Args:
      config: whole configuration; stays unchanged.
      topology: see `topology_devices`.
      batch_per_device: images per device; None: `train.batch_size` over all devices.
      canvas: height and width; None: the largest of the config.

    Raises:
      PreflightError, ConfigError: a wrong topology, config or batch.
    """
    validate(config)
    config, mesh = configured_mesh(config, topology, batch_per_device)
    canvas = canvas or max(map(tuple, config.data.canvases), key=math.prod)
    step = abstract_step(config, mesh)
    usable = usable_memory(mesh)
    start = time.monotonic()
    cost: Cost | None = None
    needed: float | None
    try:
        cost = Cost.of(compile_step(config, mesh, canvas), mesh.size)
        if not cost.flops:
            cost = dataclasses.replace(cost, flops=count_operations(config, canvas) / mesh.size)
        needed = cost.total
        fits = usable is None or needed <= usable
    except OutOfMemory as error:
        needed, fits = error.needed, False
        usable = usable or error.available
    return Preflight(
        config=config,
        topology=topology,
        mesh=mesh,
        canvas=canvas,
        chip=CHIPS.get(mesh.devices.flat[0].device_kind),
        usable=usable,
        num_parameters=step.num_parameters,
        fixed=step.fixed_bytes,
        seconds=time.monotonic() - start,
        cost=cost,
        needed=needed,
        fits=fits,
    )
