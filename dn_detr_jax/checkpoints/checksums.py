"""Sizes and CRC-32 checksums of the files of a checkpoint, stored beside them.

`checksums.json` in a checkpoint's folder maps the path of every file of its items to `[bytes,
CRC-32]`. A file that is missing, cut short or changed is found before its values are used.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22  # bytes read at once


def compute_checksums(folder: Path) -> dict[str, list[int]]:
    """Returns {file: [bytes, CRC-32]} of the items' files, by their paths in the checkpoint."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files}


def verify_checksums(folder: Path, items: Sequence[str]) -> None:
    """Raises ValueError if a file of the items is missing or differs from what was written."""
    files = _read_checksums(folder)
    for item in items:
        if (folder / item).exists() and not any(name.startswith(f"{item}/") for name in files):
            raise ValueError(f"{CHECKSUMS} has no entry for {item}")
    for name, expected in files.items():
        if name.split("/")[0] not in items:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        found = _checksum(folder / name)
        if found[0] != expected[0]:
            raise ValueError(f"{name} has {found[0]} of {expected[0]} bytes")
        if found != expected:
            raise ValueError(f"{name} differs from what was written")


def was_written(folder: Path, item: str) -> bool:
    """Whether a checkpoint has, or once had, an item.

    Raises:
      ValueError, OSError: the checksums can't be read.
    """
    return (folder / item).exists() or any(
        name.startswith(f"{item}/") for name in _read_checksums(folder)
    )


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _read_checksums(folder: Path) -> dict[str, list[int]]:
    path = folder / CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    try:
        files = json.loads(path.read_text())
    except RecursionError:
        files = None
    if not isinstance(files, dict) or not all(
        isinstance(value, list) and len(value) == 2 for value in files.values()
    ):
        raise ValueError(f"{CHECKSUMS} is no list of sizes and checksums")
    return files
