"""The memory traffic of a compiled program by jax's operations, from the text of the program.

    for traffic in parse_traffic(compiled.as_text())[:10]:
        print(traffic.where, traffic.bytes)

A program for TPUs copies parts of arrays into the chip's own memory before they are used, and back.
The text says where each array is, so that only traffic with the main memory counts; a copy belongs
to the operation that uses it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dn_detr_jax.preflight import hlo

_TYPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.-]+)")
# The last result of cuBLAS and cuDNN, of which they use what they need.
_WORKSPACE = re.compile(r", (?:/\*[^*]*\*/)?s8\[\d+\](?:\{[^}]*\})?\)$")
_COPIES = "copy-start", "slice-start", "async-start"
# What moves no data, and the second halves of asynchronous operations.
_WITHOUT = {
    *hlo.CONTROL,
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("copy-done", "slice-done", "async-done", "async-update", "send-done", "recv-done"),
    *(f"{kind}-done" for kind in hlo.KINDS),
}


class Traffic(NamedTuple):
    """What the instructions of one of jax's operations read from the main memory and write to it.

    Attributes:
      where: jax's name of the operation, "" for what the compiler has added.
      bytes: in all rounds of loops. An array of which a fusion reads a part counts in full.
      count: instructions, likewise.
    """

    where: str
    bytes: int
    count: int  # type: ignore[assignment]  # hides the method of tuples


def parse_traffic(program: str) -> list[Traffic]:
    """Sums up what each operation reads and writes, the largest first.

    Args:
      program: `jax.stages.Compiled.as_text()`.
    """
    computations, entry = hlo.split(program)
    runs = hlo.count_runs(computations, entry, fused=False)
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, instructions in computations.items():
        if runs[name]:
            for where, size in _traffic(instructions):
                sizes[where][0] += size * runs[name]
                sizes[where][1] += runs[name]
    found = [Traffic(where, size, count) for where, (size, count) in sizes.items()]
    return sorted(found, key=lambda traffic: -traffic.bytes)


def _traffic(instructions: Sequence[hlo.Instruction]) -> Iterable[tuple[str, int]]:
    """Yields an operation and bytes for each instruction that moves data."""
    types = {i.name: i.type for i in instructions}
    operands = {i.name: _operands(i) for i in instructions}
    named = {i.name: _NAME.search(i.line) for i in instructions}
    names = {name: match[1] for name, match in named.items() if match}
    users: dict[str, list[str]] = defaultdict(list)
    for name, read in operands.items():
        for operand in read:
            users[operand].append(name)

    def user_of(name: str) -> str:
        """The operation that uses a result, through instructions without a name."""
        for _ in range(8):
            if name in names or not users[name]:
                break
            name = users[name][0]
        return names.get(name, "")

    for instruction in instructions:
        read = operands[instruction.name]
        if instruction.operation in _WITHOUT:
            continue
        if instruction.operation in _COPIES:
            elements = hlo.elements(instruction.type)
            target = elements[0 if instruction.operation == "copy-start" else 1]
            sides = bool(_in_memory(target)) + any(_in_memory(types.get(x, "")) for x in read)
            producer = names.get(read[0], "") if read else ""
            yield user_of(instruction.name) or producer, sides * _size(target)
        else:
            result = instruction.type
            if instruction.operation == "custom-call":
                result = _WORKSPACE.sub(")", result)
            size = sum(_in_memory(types.get(operand, "")) for operand in read)
            yield names.get(instruction.name, ""), size + _in_memory(result)


def _operands(instruction: hlo.Instruction) -> list[str]:
    _, _, inputs = instruction.line.partition(f" {instruction.operation}(")
    return _OPERAND.findall(inputs.split(")", 1)[0])


def _in_memory(type_text: str) -> int:
    """Bytes of an array, or of a tuple of arrays, that are in the main memory: in no space S(n)."""
    found = [
        (dtype, shape) for dtype, shape, layout in _TYPE.findall(type_text) if "S(" not in layout
    ]
    return hlo.bytes_of(found)


def _size(type_text: str) -> int:
    return hlo.bytes_of((dtype, shape) for dtype, shape, _ in _TYPE.findall(type_text))
