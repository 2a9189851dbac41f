"""Lists the transfers of a compiled program between devices, and between device and host.

The module reads the text of the optimized HLO, `jax.stages.Compiled.as_text()`: the program that
runs, after the partitioner has inserted its collectives and the compiler has merged them.

    compiled = jitted.lower(*arguments).compile()
    for collective in parse_collectives(compiled.as_text(), num_devices=8):
        print(collective.kind, collective.shapes, collective.bytes, collective.count)

The operations are those of https://openxla.org/xla/operation_semantics.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dn_detr_jax.errors import PreflightError

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# A type is everything up to the operation: shapes, or a tuple of them, with layouts and comments.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\])}]) ([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|called_computations|branch_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
CONTROL = "while", "conditional", "call"  # run the instructions of other computations
_TRIP_COUNT = re.compile(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)')


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      shapes: of the results on a device, for example ("f32[256,91]", "f32[]").
      bytes: of the results, or for a reduce-scatter of the operands: the exchanged data, once.
      group: number of devices that exchange them.
      count: runs in one execution; a loop of unknown length counts once.
      where: jax's name of the operation.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group: int
    count: int  # type: ignore[assignment]  # hides the method of tuples
    where: str

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in one execution, by the algorithms that send the least.

        An all-reduce is a reduce-scatter and an all-gather; in each of them one of n devices sends
        (n - 1) / n of the data.
        """
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.count * self.bytes * (factor.get(self.kind, share) if self.group > 1 else 0.0)


class HostTransfer(NamedTuple):
    """Bytes that callbacks move in one execution; only compilers for TPUs report them."""

    to_host: int
    from_host: int


class Instruction(NamedTuple):
    """An instruction: the type of its result as the text has it, and its whole line."""

    name: str
    type: str
    operation: str
    line: str


def parse_collectives(program: str, num_devices: int) -> list[Collective]:
    """Returns the collectives that a program runs, in the order of its text.

    Args:
      program: `Compiled.as_text()`.
      num_devices: number of devices of the program.
    """
    computations, entry = split(program)
    runs = count_runs(computations, entry)
    found: list[Collective] = []
    seen: set[str] = set()
    for name, instructions in computations.items():
        for instruction in instructions if runs[name] else ():
            collective = _collective(instruction, num_devices, runs[name])
            if collective is None:
                continue
            # An asynchronous collective may appear several times for one transfer.
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            key = f"{collective.kind} {channel[1]}" if channel else ""
            if not key or key not in seen:
                found.append(collective)
            seen.add(key)
    return found


def parse_host_transfers(program: str) -> HostTransfer:
    """Returns the bytes that callbacks send to the host and get back."""
    sizes = {"send": 0, "recv": 0}
    computations, entry = split(program)
    runs = count_runs(computations, entry)
    for name, instructions in computations.items():
        for instruction in instructions:
            if instruction.operation in sizes and "is_host_transfer=true" in instruction.line:
                # The value comes first; flags and tokens follow.
                sizes[instruction.operation] += runs[name] * bytes_of(_shapes(instruction.type)[:1])
    return HostTransfer(sizes["send"], sizes["recv"])


def count_rematerialized(program: str) -> int:
    """Counts the instructions that the compiler computes a second time to save memory."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w-]+(?:\.\w+)*\.remat[\w.]* = ", program, re.M))


def parse_loops(program: str) -> list[int | None]:
    """Returns the number of rounds of each loop, None where the text does not have it.

    Compilers count the operations and bytes of one round; `parse_collectives` counts the
    collectives of all rounds.
    """
    computations, entry = split(program)
    runs = count_runs(computations, entry)
    every = (i for name, instructions in computations.items() if runs[name] for i in instructions)
    return [_trip_count(i.line, computations) for i in every if i.operation == "while"]


def total_bytes(collectives: Iterable[Collective]) -> int:
    """Returns the bytes exchanged in one execution, as `Collective.bytes` counts them."""
    return sum(collective.bytes * collective.count for collective in collectives)


def split(program: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation by its name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in program.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(Instruction(instruction[1], instruction[2], instruction[3], line))
    if not entry:
        raise PreflightError("not the text of an HLO module: it has no ENTRY")
    return computations, entry


def count_runs(
    computations: dict[str, list[Instruction]], entry: str, fused: bool = True
) -> dict[str, int]:
    """Returns how often each computation runs in one execution of the program.

    Without `fused`, only those that run instruction by instruction do.
    """
    runs = dict.fromkeys(computations, 0)

    def run(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name]:
            inner = times
            if instruction.operation == "while":
                inner = times * (_trip_count(instruction.line, computations) or 1)
            follow = fused or instruction.operation in CONTROL
            for called in _called(instruction.line) if follow else ():
                if called in computations:
                    run(called, inner)

    run(entry, 1)
    return runs


def _trip_count(line: str, computations: dict[str, list[Instruction]]) -> int | None:
    """Returns the rounds of a while loop: the compiler's note, or the bound of a loop of jax.

    `jax.lax.scan` and `fori_loop` count from 0 in steps of 1 while the counter is below a constant.
    """
    if noted := _TRIP_COUNT.search(line):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", line)
    body = computations.get(condition[1], []) if condition else []
    bounds = {
        i.name: int(constant[1])
        for i in body
        if (constant := re.search(r" = [su]\d+\[\]\S* constant\((\d+)\)", i.line))
    }
    compared = [re.search(r"compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", i.line) for i in body]
    found = [bounds[match[1]] for match in compared if match and match[1] in bounds]
    return found[0] if len(found) == 1 else None


def _called(line: str) -> Iterator[str]:
    for names in _CALLED.findall(line):
        for name in names.strip("{}").split(","):
            yield name.strip().lstrip("%")


def _collective(instruction: Instruction, num_devices: int, runs: int) -> Collective | None:
    started = instruction.operation.endswith("-start")
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    group = _group(instruction.line, num_devices)
    # The asynchronous forms return (operands, results, ...), the all-reduce only its results.
    tuple_of = elements(instruction.type) if started and kind != "all-reduce" else []
    shapes = _shapes(tuple_of[1] if len(tuple_of) > 1 else instruction.type)
    size = bytes_of(shapes) * (group if kind == "reduce-scatter" else 1)
    named = tuple(f"{dtype}[{dimensions}]" for dtype, dimensions in shapes)
    where = re.search(r'op_name="([^"]*)"', instruction.line)
    return Collective(kind, named, size, group, runs, where[1] if where else "")


def _shapes(text: str) -> list[tuple[str, str]]:
    return [shape for shape in _SHAPE.findall(text) if shape[0] != "token"]


def elements(text: str) -> list[str]:
    """Splits a tuple type into its elements, which may be tuples."""
    elements, depth, start = [], 0, 1
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            elements.append(text[start:i])
            start = i + 1
    return elements


def bytes_of(shapes: Iterable[tuple[str, str]]) -> int:
    """Returns the bytes of arrays, pairs of dtype and dimensions such as ("f32", "4,2")."""
    total = 0
    for dtype, dimensions in shapes:
        size = _bits(dtype)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += -(-size // 8)
    return total


def _bits(dtype: str) -> int:
    """Returns the bits of an element: 8 for pred, else the first number in s32, f8e4m3fn, ..."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def _group(line: str, num_devices: int) -> int:
    """Returns the number of devices in a replica group, from any of its three notations."""
    if "source_target_pairs=" in line:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        group = 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
            group *= int(part) if part else sizes[axis]
        return group
    return num_devices
