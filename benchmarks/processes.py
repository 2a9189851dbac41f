"""Processes and their memory, from Linux' /proc."""

from collections.abc import Iterable
from pathlib import Path


def family(pid: int) -> list[int]:
    """Returns a process and its descendants."""
    found = [pid]
    for member in found:
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # the process has ended
            continue
    return found


def megabytes(pids: Iterable[int], kind: str = "Pss") -> float:
    """Returns the memory of processes together in MB; shared pages count once.

    Args:
      pids: processes that have ended count as 0.
      kind: "Pss", all memory, or a part, such as "Pss_Anon", without mapped files.
    """
    kilobytes = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
    return kilobytes / 1024
