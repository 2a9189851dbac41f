"""TFRecord files read by position, without TensorFlow.

A file is a sequence of records: the length in 8 bytes, little endian, a checksum of it in 4, the
content, and a checksum of that in 4. One pass over the lengths finds the position of each record.
The positions are kept beside the files if the folder can be written: the pass takes many small
reads.

Source: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dn_detr_jax.errors import DataError
from dn_detr_jax.files import replace_atomically

logger = logging.getLogger(__name__)

_HEADER, _FOOTER = 12, 4  # bytes around the content


class TFRecords:
    """The contents of the records of several files, in order. Safe for threads, can be pickled."""

    def __init__(self, files: Sequence[Path], lengths: Sequence[int], index_file: Path):
        """Finds the records.

        Args:
          files: in order.
          lengths: number of records in each.
          index_file: where the places of the records are kept, `.npy`.

        Raises:
          DataError: a file is cut off, or has another number of records.
          OSError: a file can't be read.
        """
        self._files = tuple(map(os.fspath, files))
        index = _saved_index(index_file, files, lengths)
        if index is None:
            index = np.concatenate(
                [_scan(number, file, lengths[number]) for number, file in enumerate(files)]
            )
            _save(index, index_file)
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> bytes:
        number, start, length = self._index[position].tolist()
        with open(self._files[number], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), length, start)
        if len(content) != length:
            raise DataError(f"{self._files[number]}: cut off at {start + len(content)} bytes")
        return content


def _scan(number: int, file: Path, length: int) -> np.ndarray:
    """File number, start and length of the content of each record, int64 [n, 3]."""
    rows, place, end = [], 0, file.stat().st_size
    with file.open("rb", buffering=0) as stream:
        while place < end:
            header = os.pread(stream.fileno(), _HEADER, place)
            size = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else end
            if place + _HEADER + size + _FOOTER > end:
                raise DataError(
                    f"{file}: no TFRecord file, or one that is cut off, at byte {place}"
                )
            rows.append((number, place + _HEADER, size))
            place += _HEADER + size + _FOOTER
    if len(rows) != length:
        raise DataError(f"{file}: has {len(rows)} records, {length} are expected")
    return np.array(rows, np.int64).reshape(-1, 3)


def _saved_index(path: Path, files: Sequence[Path], lengths: Sequence[int]) -> np.ndarray | None:
    """The index that was kept, if it is one of these files as they are now."""
    try:
        with path.open("rb") as stream:
            index = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception:  # none, or a damaged one
        return None
    if index.shape != (sum(lengths), 3) or index.dtype != np.int64:
        return None
    ends = np.cumsum(lengths)
    for number, file in enumerate(files):
        rows = index[ends[number] - lengths[number] : ends[number]]
        expected = rows[-1, 1] + rows[-1, 2] + _FOOTER if len(rows) else 0
        if (rows[:, 0] != number).any() or expected != file.stat().st_size:
            return None
        starts = rows[:, 1] - _HEADER
        if (starts[:1] != 0).any() or (
            starts[1:] != (rows[:, 1] + rows[:, 2] + _FOOTER)[:-1]
        ).any():
            return None
    return index


def _save(index: np.ndarray, path: Path) -> None:
    try:
        with replace_atomically(path) as temporary, temporary.open("wb") as file:
            np.save(file, index)
    except OSError:
        logger.info("%s is not saved: the folder can't be written", path)
