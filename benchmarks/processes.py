"""Processes and their memory, from Linux' /proc."""

from collections.abc import Iterable
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for member in found:
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has ended
            continue
    return found


def megabytes(pids: Iterable[int], kind: str = "Pss") -> float:
    """Memory of processes together, shared pages counted once.

    Args:
      pids: those that have ended count as nothing.
      kind: "Pss", all of it, or a part, such as "Pss_Anon": without files that are mapped.
    """
    kilobytes = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
    return kilobytes / 1024
