"""Compiles the training step for a TPU that need not be there, and says what it will cost.

    python -m dn_detr_jax preflight --config configs/coco_r50.py --topology v5e:4x4 \\
        --batch_per_device 2 --config.model.dtype=bfloat16

Needs no accelerator: jax compiles ahead of time for a topology, with the compiler of TPUs that
`pip install "jax[tpu]"` brings (libtpu, Linux on x86-64). `--topology local` compiles for the
devices of this machine instead. Options of the config apply.

Printed, and written as JSON with `--json FILE`: parameters, bytes per device against the memory
that the compiler may use, operations, bytes accessed, collectives, and the time that a step takes
at least on such chips (Williams, Waterman and Patterson, "Roofline", CACM 2009). A step that does
not fit in memory is reported with the options that would make it fit, each compiled to be sure
(`--nosuggest` leaves that out), and ends with exit status 1.

The times are bounds from the chips' peak figures, not measurements: a real step takes longer, and
the matching on the host, which the device waits for, comes on top.
"""

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.config import check_attention, validate
from dn_detr_jax.errors import ConfigError, PreflightError
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.preflight.accelerators import CHIPS, Chip
from dn_detr_jax.preflight.hlo import (
    Collective,
    HostTransfer,
    count_rematerialized,
    parse_collectives,
    parse_host_transfers,
    parse_loops,
    total_bytes,
)
from dn_detr_jax.sharding import make_mesh, replicated
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import TrainState, abstract_state
from dn_detr_jax.training.step import abstract_batch, jit_train_step

GIB = 2**30

REMAT_PARTS = ("backbone", "encoder", "decoder")

# Generations as topologies name them, and how many dimensions their slices have.
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_EXAMPLES = "v5e:4x4 (16 chips), v6e:8x8, v4:2x2x4, v5p:4x4x4, or local for the devices present"

# Without them libtpu asks the network where it is, logs that it found no TPU, and refuses to be
# loaded while another process has it, as one that uses TPUs must; a compiler alone need not.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


class OutOfMemory(Exception):  # noqa: N818 (an answer, not a mistake)
    """The program does not fit into a device.

    Attributes:
      needed: bytes per device, None if the compiler did not say.
      available: bytes per device, likewise.
    """

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


class Roofline(NamedTuple):
    """Seconds that a step takes at least, for three reasons, each as if it were the only one."""

    compute: float
    memory: float
    collectives: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The longest of them, which is right if they overlap wholly."""
        return max(self)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled step costs each device.

    Attributes:
      arguments: bytes of state and batch.
      outputs: bytes of new state and metrics that do not lie where the old ones lay.
      temporaries: bytes, at their peak.
      code: bytes of the program.
      flops: operations, as the compiler counts them.
      bytes_accessed: by all operations, as the compiler counts them.
      collectives: between devices.
      host: what the callback moves.
      rematerialized: instructions that the compiler computes twice to save memory.
      loops: how often each loop goes round, None if unknown; `flops` and `bytes_accessed` have
        one round of each.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    flops: float
    bytes_accessed: float
    collectives: list[Collective]
    host: HostTransfer
    rematerialized: int
    loops: list[int | None]

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, num_devices: int) -> "Cost":
        """The cost of a compiled program."""
        memory, text = compiled.memory_analysis(), compiled.as_text()
        counted = compiled.cost_analysis() or {}
        return cls(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            flops=counted.get("flops", 0.0),
            bytes_accessed=counted.get("bytes accessed", 0.0),
            collectives=parse_collectives(text, num_devices),
            host=parse_host_transfers(text),
            rematerialized=count_rematerialized(text),
            loops=parse_loops(text),
        )

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def bytes_sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(collective.bytes_sent for collective in self.collectives)

    def roofline(self, chip: Chip) -> Roofline:
        """The least time on a chip."""
        return Roofline(
            self.flops / chip.peak_flops,
            self.bytes_accessed / chip.memory_bandwidth,
            self.bytes_sent / chip.interconnect,
        )


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a topology, to make a mesh of and to compile for; they can't run anything.

    Args:
      topology: "v5e:4x4", generation and chips along each axis; or "local".

    Raises:
      PreflightError: no such topology, or libtpu is not installed.
    """
    if topology == "local":
        return jax.devices()
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


def with_batch(config: ConfigDict, batch_per_device: int, mesh: Mesh) -> ConfigDict:
    """A copy of the config with that many pictures per device in training and evaluation."""
    config = config.copy_and_resolve_references()
    config.train.batch_size = config.eval.batch_size = batch_per_device * mesh.size
    return config


class AbstractStep(NamedTuple):
    """The training step of a config before it is compiled.

    Attributes:
      function: the jitted step of `training.step`.
      state: shapes and shardings of its train state.
    """

    function: Any
    state: TrainState

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))

    @property
    def fixed_bytes(self) -> int:
        """Bytes per device that no batch is too small for: the state, and a gradient."""
        return _bytes_per_device(self.state) + _bytes_per_device(self.state.params)


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = (leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
    sizes = (np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return sum(math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True))


def abstract_step(config: ConfigDict, mesh: Mesh) -> AbstractStep:
    """The training step as `train.py` makes it, for the devices of a mesh; computes nothing.

    Raises:
      ConfigError: a wrong config, or one that leaves `model.num_classes` or `data.max_objects` to
        the data.
    """
    validate(config)
    for section, name in (("model", "num_classes"), ("data", "max_objects")):
        if not config[section][name]:
            expected = "a number of at least 1: the preflight does not read the data to find it"
            raise ConfigError(f"{section}.{name}", 0, expected)
    per_device, parts = config.train.batch_size // mesh.size, config.train.accumulate_steps
    if per_device % parts:
        expected = f"a divisor of the {per_device} pictures per device"
        raise ConfigError("train.accumulate_steps", parts, expected)
    check_attention(config, mesh.devices.flat[0].platform)
    model = build_model(config.model, config.compile.attention)
    shapes = abstract_params(model)
    is_trained = trainable(shapes, config.model)
    # Only the schedule's constants depend on the numbers of steps.
    optimizer, _ = make_optimizer(config, shapes, 1_000, 100_000, is_trained)
    function, _ = jit_train_step(
        model=model,
        optimizer=optimizer,
        trainable=traverse_util.unflatten_dict(is_trained, sep="/"),
        config=config,
        mesh=mesh,
    )
    return AbstractStep(function, abstract_state(model, optimizer, config, mesh))


def compile_step(config: ConfigDict, mesh: Mesh, canvas: tuple[int, int]) -> jax.stages.Compiled:
    """Compiles the training step of a config.

    Args:
      config: whole configuration, see `abstract_step`.
      mesh: of devices that may be a topology's.
      canvas: height and width.

    Raises:
      OutOfMemory: the step does not fit into a device, and the compiler knows it.
      ConfigError: of the config.
    """
    step = abstract_step(config, mesh)
    lowered = step.function.lower(step.state, abstract_batch(config, "train", mesh, canvas))
    options = accepted_options(config, mesh.devices.flat[0])
    return compile_or_explain(lowered, options)


def compile_or_explain(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles; raises `OutOfMemory` where the compiler finds that the program does not fit."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if re.search("No such compile option|While setting option", str(error)):
            raise ConfigError("compile.options", options, str(error).splitlines()[0]) from None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0], *parse_out_of_memory(str(error))) from None


def parse_out_of_memory(message: str) -> tuple[float | None, float | None]:
    """Bytes needed and available, from the message of XLA's compiler for TPUs.

    Examples:
      >>> parse_out_of_memory("total memory required (24.00G) exceeds available HBM (15.75G).")
      (25769803776.0, 16911433728.0)
      >>> parse_out_of_memory("Used 512.0M of 0.25G hbm. Exceeded hbm capacity by 256M.")
      (536870912.0, 268435456.0)
      >>> parse_out_of_memory("no numbers")
      (None, None)
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"required.*?\({size}\).*?available.*?\({size}\)",
        rf"Used {size}i?B? of {size}i?B? hbm",
    ):
        if match := re.search(pattern, message, re.DOTALL):
            numbers = [match.group(1, 2), match.group(3, 4)]
            needed, available = (
                float(n) * 1024 ** " KMGT".index(unit or " ") for n, unit in numbers
            )
            return needed, available
    return None, None


def usable_memory(mesh: Mesh) -> float | None:
    """Bytes of a device that a program may use; None if that can't be known, as for a CPU.

    For TPUs it is what the compiler says when it is given a program that fits into no chip.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or device in jax.devices():
        statistics = device.memory_stats() if device.platform != "cpu" else None
        return (statistics or {}).get("bytes_limit")
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=replicated(mesh))
    try:
        compile_or_explain(jax.jit(lambda x: x + 1).lower(huge))
    except OutOfMemory as error:
        return error.available
    return None


class Proposal(NamedTuple):
    """Options that might make a step fit.

    Attributes:
      options: values by config key.
      batch_per_device: pictures per device.
    """

    options: dict[str, Any]
    batch_per_device: int

    def text(self) -> str:
        """As on the command line of a shell."""
        overrides = [f"--config.{key}={value}" for key, value in self.options.items()]
        # Tuples need quotes; within double ones their own stay readable.
        quoted = [f'"{o.replace(" ", "")}"' if "(" in o else o for o in overrides]
        return " ".join([f"--batch_per_device={self.batch_per_device}", *quoted])

    def applied(self, config: ConfigDict, mesh: Mesh) -> ConfigDict:
        """A copy of the config with it."""
        config = with_batch(config, self.batch_per_device, mesh)
        config.update_from_flattened_dict(self.options)
        return config


class Outcome(NamedTuple):
    """What became of a proposal: bytes per device, and whether they fit."""

    proposal: Proposal
    needed: float | None
    fits: bool


def proposals(config: ConfigDict, batch_per_device: int) -> list[Proposal]:
    """Options that save much memory at the same batch, the one that costs less first."""
    options: list[dict[str, Any]] = []
    if config.model.dtype == "float32":
        options.append({"model.dtype": "bfloat16"})
    if set(config.model.remat) != set(REMAT_PARTS):
        options.append({"model.remat": REMAT_PARTS})
    return [Proposal(option, batch_per_device) for option in options]


def smaller_batch(needed: float, fixed: float, available: float, batch: int, parts: int = 1) -> int:
    """The largest batch that fits if what is not fixed grows in proportion to it.

    Args:
      needed: bytes at `batch`.
      fixed: of them, bytes that do not depend on the batch.
      available: bytes.
      batch: pictures per device, a multiple of `parts` and more than that.
      parts: `train.accumulate_steps`.

    Returns:
      A multiple of `parts`, at least that, below `batch`.

    Examples:
      >>> smaller_batch(needed=20.0, fixed=2.0, available=16.0, batch=9)
      7
    """
    each = max(needed - fixed, 1) / batch
    fitting = math.floor((available - fixed) / each) // parts * parts
    return min(max(fitting, parts), batch - parts)


def suggest(
    config: ConfigDict,
    batch_per_device: int,
    needed: float | None,
    fixed: float,
    available: float | None,
    attempt: Callable[[Proposal], Outcome],
) -> Iterator[Outcome]:
    """Tries what would make a step fit.

    Args:
      config: whole configuration, with which it does not fit.
      batch_per_device: pictures per device, with which it does not fit.
      needed: bytes it needs per device, None if that is not known.
      fixed: of them, bytes that do not depend on the batch.
      available: bytes a device has, None if that is not known.
      attempt: compiles a proposal.

    Yields:
      Outcomes: of each option at the same batch; of all of them together if none is enough alone;
      and of smaller batches until one fits, with the options unless one of them was enough.
    """
    single = []
    for proposal in proposals(config, batch_per_device):
        single.append(attempt(proposal))
        yield single[-1]
    options: dict[str, Any] = {}
    if single and not any(outcome.fits for outcome in single):
        last = single[0]
        for outcome in single:
            options |= outcome.proposal.options
        if len(single) > 1:
            last = attempt(Proposal(options, batch_per_device))
            yield last
            if last.fits:
                options = {}
        needed = needed if last.fits else last.needed
    batch, parts = batch_per_device, config.train.accumulate_steps
    while batch > parts:
        if needed is not None and available is not None:
            batch = smaller_batch(needed, fixed, available, batch, parts)
        else:
            batch = max(batch // 2 // parts, 1) * parts
        outcome = attempt(Proposal(options, batch))
        yield outcome
        if outcome.fits:
            return
        needed = outcome.needed


def versions() -> dict[str, str]:
    """Of what compiled the step."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu"):
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
      chip: what is known of the devices, or None.
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
        """Pictures."""
        return self.config.train.batch_size // self.mesh.size

    def record(self) -> dict[str, Any]:
        """All of it for a JSON file."""
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
            record["cost"] = cost | {"bytes_sent": self.cost.bytes_sent}
        if self.cost and self.chip:
            bound = self.cost.roofline(self.chip)
            record["roofline_seconds"] = bound._asdict() | {"bound": bound.bound}
        return record


def run_preflight(
    config: ConfigDict,
    topology: str,
    batch_per_device: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Preflight:
    """Compiles the training step of a config for a topology.

    Args:
      config: whole configuration; is not changed.
      topology: see `topology_devices`.
      batch_per_device: pictures per device; None: `train.batch_size` over all devices.
      canvas: height and width; None: the largest of the config.

    Raises:
      PreflightError, ConfigError: it can't be done.
    """
    mesh = make_mesh(config.mesh.data, topology_devices(topology))
    if batch_per_device is not None:
        config = with_batch(config, batch_per_device, mesh)
    elif config.train.batch_size % mesh.size:
        expected = f"a multiple of the {mesh.size} devices, or give --batch_per_device"
        raise ConfigError("train.batch_size", config.train.batch_size, expected)
    canvas = canvas or max(map(tuple, config.data.canvases), key=math.prod)
    step = abstract_step(config, mesh)
    usable = usable_memory(mesh)
    start = time.monotonic()
    cost, needed = None, None
    try:
        cost = Cost.of(compile_step(config, mesh, canvas), mesh.size)
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


def table(result: Preflight) -> str:
    """What `record` has, to be read."""
    device = result.mesh.devices.flat[0].device_kind
    height, width = result.canvas
    rows = [
        ("devices", f"{result.mesh.size} x {result.chip.name if result.chip else device}"),
        (
            "step",
            f"{result.config.train.batch_size} pictures of {height} x {width}, "
            f"{result.batch_per_device} per device, {result.config.model.dtype}",
        ),
        ("parameters", f"{result.num_parameters:,}"),
        *_memory_rows(result),
    ]
    if result.cost:
        rows += _cost_rows(result.cost)
    if result.cost and result.chip:
        rows += _roofline_rows(result, result.cost.roofline(result.chip))
    compiler = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows.append(("compiled", f"in {result.seconds:.0f} s by {compiler}"))
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _memory_rows(result: Preflight) -> list[tuple[str, str]]:
    needed = "unknown" if result.needed is None else memory_text(result.needed)
    if result.usable is not None:
        needed += f" of {memory_text(result.usable)} that a program may use"
    rows = [("memory per device", needed if result.fits else f"{needed}: DOES NOT FIT")]
    cost = result.cost
    if cost is None:
        return [*rows, ("  state, gradients", f"{memory_text(result.fixed)}, whatever the batch")]
    rows += [
        ("  state and batch", memory_text(cost.arguments)),
        ("  temporaries", memory_text(cost.temporaries)),
        ("  outputs", memory_text(cost.outputs)),
        ("  program", memory_text(cost.code)),
    ]
    if cost.rematerialized:
        text = f"the compiler computes {cost.rematerialized} instructions twice to save memory"
        rows.append(("", text))
    return rows


def _cost_rows(cost: Cost) -> list[tuple[str, str]]:
    rows = [
        ("operations", f"{quantity(cost.flops, 'FLOP')} per device"),
        ("memory traffic", f"{quantity(cost.bytes_accessed, 'B')} per device"),
    ]
    rounds = ["?" if n is None else str(n) for n in cost.loops if n != 1]
    if rounds:
        text = f"both too low: loops are counted once, but go round {', '.join(rounds)} times"
        rows.append(("", text))
    rows.append(("sent to devices", f"{quantity(cost.bytes_sent, 'B')} per device"))
    for kind in sorted({c.kind for c in cost.collectives}):
        same = [c for c in cost.collectives if c.kind == kind]
        dtypes = "/".join(sorted({shape.split("[")[0] for c in same for shape in c.shapes}))
        count, size = sum(c.count for c in same), quantity(total_bytes(same), "B")
        rows.append((f"  {kind}", f"{count} x, of {size} in all, {dtypes}"))
    if any(cost.host):
        there, back = (quantity(size, "B") for size in cost.host)
        rows.append(("sent to the host", f"{there}, and {back} back, per device"))
    return rows


def _roofline_rows(result: Preflight, bound: Roofline) -> list[tuple[str, str]]:
    rate = result.config.train.batch_size / bound.seconds
    return [
        ("least time per step", f"{quantity(bound.seconds, 's')}, bound by {bound.bound}"),
        *((f"  {name}", quantity(getattr(bound, name), "s")) for name in bound._fields),
        ("at most", f"{rate:,.0f} pictures per second on all devices; matching on the host not in"),
    ]


def memory_text(size: float) -> str:
    """Bytes of memory, to be read.

    Examples:
      >>> memory_text(15.75 * 2**30), memory_text(3 * 2**20)
      ('15.75 GiB', '3.00 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def quantity(value: float, unit: str) -> str:
    """A number with three digits and a prefix.

    Examples:
      >>> quantity(1.2749e12, "FLOP"), quantity(0.00644, "s"), quantity(999.6, "B")
      ('1.27 TFLOP', '6.44 ms', '1 kB')
    """
    rounded, prefixes = float(f"{value:.3g}"), " kMGTPE"
    if 0 < abs(rounded) < 1:
        prefixes, rounded = "num ", rounded * 1e9
    power = 0
    while abs(rounded) >= 999.9 and power + 1 < len(prefixes):
        rounded, power = rounded / 1000, power + 1
    return f"{rounded:.3g} {prefixes[power].strip()}{unit}"


def print_suggestions(result: Preflight) -> list[Outcome]:
    """Compiles what might make the step fit, prints what became of each, and returns that."""

    def attempt(proposal: Proposal) -> Outcome:
        print(f"trying {proposal.text()} ...", file=sys.stderr, flush=True)
        config = proposal.applied(result.config, result.mesh)
        tried = run_preflight(config, result.topology, None, result.canvas)
        return Outcome(proposal, tried.needed, tried.fits)

    tried = []
    outcomes = suggest(
        result.config,
        result.batch_per_device,
        result.needed,
        result.fixed,
        result.usable,
        attempt,
    )
    for outcome in outcomes:
        tried.append(outcome)
        needed = "" if outcome.needed is None else f", {outcome.needed / GIB:.2f} GiB"
        verdict = "fits" if outcome.fits else "does not fit"
        print(f"{verdict}{needed}: {outcome.proposal.text()}", flush=True)
    if not any(outcome.fits for outcome in tried):
        print("nothing tried fits: smaller data.canvases, a smaller model, or a larger chip")
    elif (smaller := tried[-1].proposal.batch_per_device) < result.batch_per_device:
        parts = next(
            n
            for n in range(2, result.batch_per_device + 1)
            if result.batch_per_device % n == 0 and result.batch_per_device // n <= smaller
        )
        text = Proposal(tried[-1].proposal.options, result.batch_per_device).text()
        print(f"not compiled: {text} --config.train.accumulate_steps={parts}, the batch in parts")
    return tried
