"""Shards of packed images: files of the format `array_record` with features of TFDS."""

import collections
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from dn_detr_jax.data import images
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import DataError

SPLIT = "images"  # the only split of a packed folder; several splits of a run may share one
IMAGES_PER_SHARD = 512  # what a killed packing may have to repeat; COCO has 232 such shards

_READERS = 8  # threads that read files ahead of the writer
_AHEAD = 32  # files that they may hold: the memory of packing


def packed_features(categories: Sequence[Category]) -> tfds.features.FeaturesDict:
    """Returns the features of TFDS' `coco/2017`, with areas as numbers that need not be whole."""
    names = [category.name for category in categories]
    if len(set(names)) < len(names):  # which TFDS does not allow
        names = [f"{category.name} ({category.id})" for category in categories]
    objects = {
        "id": np.int64,
        "area": np.float32,
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=names),
        "is_crowd": np.bool_,
    }
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
    )


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
        features: tfds.features.FeaturesDict,
    ):
        """Prepares writing.

        Args:
          read: gives the file of the image at a position; called by several threads.
          annotations: of the split.
          categories: of the data set.
          features: `packed_features`.
        """
        self._read, self._annotations = read, annotations
        self._label_of = {category.id: label for label, category in enumerate(categories)}
        # What FeaturesDict.serialize_example does besides takes longer, object by object.
        info = features.get_serialized_info()
        self._serializer = tfds.core.example_serializer.ExampleSerializer(info)
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
            example = _example(image, index, self._annotations, self._label_of)
            yield self._serializer.serialize_example(example)


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
) -> dict[str, Any]:
    """Returns the features of an image, encoded as TFDS serializes them.

    TFDS has no room for boxes beyond the image: these are clipped, and degenerate ones are left
    out. The numbers of the annotation file are in the table.
    """
    rows = np.arange(annotations.offsets[index], annotations.offsets[index + 1])
    rows = rows[~annotations.degenerate[rows]]
    height, width = annotations.sizes[index].tolist()
    shares = annotations.corners(rows) / (width, height, width, height)
    return {
        "image": image,
        "image/filename": annotations.file_names[index],
        "image/id": annotations.image_ids[index],
        "objects": {
            "id": annotations.ids[rows],
            "area": annotations.areas[rows].astype(np.float32),
            "bbox": np.clip(shares, 0.0, 1.0)[:, [1, 0, 3, 2]].astype(np.float32),
            "label": np.array([label_of[i] for i in annotations.category_ids[rows].tolist()], int),
            "is_crowd": annotations.crowd[rows],
        },
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
