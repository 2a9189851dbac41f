"""Shards of packed images: files of the format `array_record` with features of TFDS."""

import collections
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from dn_detr_jax.data import images
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.tfds_files import bytes_feature, damage_named, encode
from dn_detr_jax.errors import DataError

SPLIT = "images"  # the only split of a packed folder; several splits of a run may share one
IMAGES_PER_SHARD = 512  # what a killed packing may have to repeat; COCO has 232 such shards

_READERS = 8  # threads that read files ahead of the writer
_AHEAD = 32  # files that they may hold: the memory of packing


def class_names(categories: Sequence[Category]) -> list[str]:
    """Returns distinct names of classes, as TFDS wants them."""
    names = [category.name for category in categories]
    if len(set(names)) < len(names):
        names = [f"{category.name} ({category.id})" for category in categories]
    return names


def ranges(count: int) -> list[range]:
    """Returns the positions of the images of each shard."""
    starts = range(0, count, IMAGES_PER_SHARD)
    return [range(start, min(start + IMAGES_PER_SHARD, count)) for start in starts]


def names(count: int) -> list[str]:
    """Returns the file names of a number of shards, in the format of TFDS."""
    return [
        f"coco_records-{SPLIT}.array_record-{number:05d}-of-{count:05d}" for number in range(count)
    ]


def progress_bar(total: int, done: int = 0) -> tqdm:
    """A progress bar of packing, shown on a terminal only."""
    return tqdm(total=total, initial=done, desc="packing", unit=" images", disable=None)


class PackedImages:
    """The bytes of the image files in a packed folder, by position.

    Can be pickled; reading is safe for threads.
    """

    def __init__(self, folder: Path, count: int):
        """Opens the shards.

        Args:
          folder: packed by `packing`.
          count: number of images.

        Raises:
          DataError: a shard is missing.
        """
        self._folder, self._count = folder, count
        parts = ranges(count)
        paths = [folder / name for name in names(len(parts))]
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path} is missing; delete the folder, and it is packed again")
        # With their numbers of records, shards are opened when they are read.
        sized = [f"{path}[0:{len(part)}]" for path, part in zip(paths, parts, strict=True)]
        self._records = ArrayRecordDataSource(sized)

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        return PackedImages, (self._folder, self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        with damage_named(f"{self._folder}: a damaged record at {index}"):
            return bytes_feature(self._records[index], "image")


class ShardWriter:
    """Writes shards of images and their objects.

    Attributes:
      open_orientations: written images whose EXIF orientation the annotated size leaves open.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        annotations: Annotations,
        categories: Sequence[Category],
    ):
        """Prepares writing.

        Args:
          read: gives the file of the image at a position; called by several threads.
          annotations: of the split.
          categories: of the data set.
        """
        self._read, self._annotations = read, annotations
        self._label_of = {category.id: label for label, category in enumerate(categories)}
        self.open_orientations = 0

    def __call__(self, path: Path, positions: range, progress: tqdm) -> None:
        """Writes a shard of the images at some positions.

        Raises:
          DataError: an image can't be read.
          OSError: the shard could not be written.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            _write_shard(path, self._records(pool, positions), len(positions), progress)

    def _records(self, pool: ThreadPoolExecutor, positions: range) -> Iterator[bytes]:
        for index, image in _read_ahead(pool, self._read, positions):
            with contextlib.suppress(DataError):  # an unusable image is an error when it is used
                header = images.read_header(io.BytesIO(image))
                size = tuple(self._annotations.sizes[index].tolist())
                self.open_orientations += images.orientation_is_open(header, size)
            yield encode(_example(image, index, self._annotations, self._label_of))


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], bytes], positions: range
) -> Iterator[tuple[int, bytes]]:
    """Yields positions and files of images in order, read by threads, a few ahead."""
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    for index in positions:
        waiting.append((index, pool.submit(read, index)))
        if len(waiting) > _AHEAD:
            first, image = waiting.popleft()
            yield first, image.result()
    for index, image in waiting:
        yield index, image.result()


def read_file(path: Path) -> bytes:
    """Reads a file; raises a DataError with its path if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} can't be read: {error}") from error


def _example(
    image: bytes, index: int, annotations: Annotations, label_of: dict[int, int]
) -> dict[str, bytes | np.ndarray]:
    """Returns the features of an image, as TFDS serializes them.

    TFDS has no room for boxes beyond the image: these are clipped, and degenerate ones are left
    out. The numbers of the annotation file are in the table.
    """
    rows = np.arange(annotations.offsets[index], annotations.offsets[index + 1])
    rows = rows[~annotations.degenerate[rows]]
    height, width = annotations.sizes[index].tolist()
    shares = annotations.corners(rows) / (width, height, width, height)
    return {
        "image": image,
        "image/filename": annotations.file_names[index].encode(),
        "image/id": annotations.image_ids[index],
        "objects/id": annotations.ids[rows],
        "objects/area": annotations.areas[rows].astype(np.float32),
        "objects/bbox": np.clip(shares, 0.0, 1.0)[:, [1, 0, 3, 2]].astype(np.float32),
        "objects/label": np.array(
            [label_of[i] for i in annotations.category_ids[rows].tolist()], int
        ),
        "objects/is_crowd": annotations.crowd[rows].astype(int),
    }


def _write_shard(path: Path, records: Iterator[bytes], count: int, progress: tqdm) -> None:
    """Writes a shard under another name, and renames it when it is complete.

    Raises:
      OSError: it could not be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    # JPEG can't be compressed further, and trying takes most of the time.
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for record in records:
            _guarded(writer.write, record)
            progress.update()
    finally:
        _guarded(writer.close)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    reader = ArrayRecordReader(str(partial))
    written = reader.num_records()
    reader.close()
    if written != count:
        raise OSError(errno.EIO, f"{partial} has {written} of {count} records after writing")
    partial.replace(path)


def _guarded(call: Callable[..., None], *args: bytes) -> None:
    """Calls a method of the writer; raises all its errors as OSError."""
    try:
        call(*args)
    except (RuntimeError, ValueError) as error:
        kind = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(kind, str(error)) from error
