"""The cost of a compiled step for each device, and the least time that follows from it.

The least time is that of Williams, Waterman and Patterson, "Roofline", CACM 2009: a bound from a
chip's peak figures, not a measurement.
"""

import dataclasses
from typing import NamedTuple

import jax

from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.accelerators import Chip
from dn_detr_jax.preflight.hlo import (
    Collective,
    HostTransfer,
    count_rematerialized,
    parse_collectives,
    parse_host_transfers,
    parse_loops,
)
from dn_detr_jax.preflight.traffic import Traffic, parse_traffic

LARGEST = 10  # operations that are kept


class Roofline(NamedTuple):
    """Least seconds of a step by three limits, each as if it were the only one."""

    compute: float
    memory: float
    collectives: float

    @property
    def bound(self) -> str:
        """The name of the tightest limit."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The largest of the three, which holds if they overlap completely."""
        return max(self)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled step costs each device.

    Attributes:
      arguments: bytes of state and batch.
      outputs: bytes of new state and metrics that do not reuse the memory of the old ones.
      temporaries: bytes, at their peak.
      code: bytes of the program.
      flops: operations, as the compiler counts them; 0: it does not.
      bytes_accessed: by all operations, likewise, also those within the chip's own memory. The
        compiler for GPUs counts neither.
      main_memory: bytes that cross the boundary of the chip, by the text of the program.
      traffic: of that, the operations with the most.
      collectives: between devices.
      host: bytes that the callback moves.
      rematerialized: instructions that the compiler computes twice to save memory.
      loops: number of rounds of each loop, None if unknown; `flops` and `bytes_accessed` count
        one round of each, `main_memory` and `traffic` all of them.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    flops: float
    bytes_accessed: float
    main_memory: int
    traffic: list[Traffic]
    collectives: list[Collective]
    host: HostTransfer
    rematerialized: int
    loops: list[int | None]

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, num_devices: int) -> "Cost":
        """Reads the cost of a compiled program.

        Raises:
          PreflightError: the compiler does not report it.
        """
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if memory is None or text is None:
            raise PreflightError("the compiler reports neither memory nor program")
        counted = compiled.cost_analysis() or {}
        traffic = parse_traffic(text)
        return cls(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            flops=counted.get("flops", 0.0),
            bytes_accessed=counted.get("bytes accessed", 0.0),
            main_memory=sum(each.bytes for each in traffic),
            traffic=traffic[:LARGEST],
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
        """Returns the least time on a chip."""
        return Roofline(
            self.flops / chip.peak_flops,
            self.main_memory / chip.memory_bandwidth,
            self.bytes_sent / chip.interconnect,
        )
