"""Packs the images of a COCO-format split, as they are, into records that are read by position.

A data set of many small files is slow to read at random; packed once, it is a few hundred large
ones. The records are a folder of TFDS (`array_record`, features of `coco/2017`) that
`tfds.builder_from_directory` opens. TFDS' own builders start anew when they are killed, so shards
are written here and TFDS writes its metadata around them:

- Each shard is written under another name, flushed, and renamed when complete. Whoever continues a
  packing that was killed keeps the shards that are there.
- The whole is renamed to its final name when complete. The name holds a checksum of the annotation
  file and of where the images are: what is packed from other annotations has another name.
- A lock lets one process pack and others wait.

Images that change while the annotation file stays the same are not noticed.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from dn_detr_jax.data.annotations import Annotations, load_table, save_table
from dn_detr_jax.data.coco import SplitFiles, load_split
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import DataError

logger = logging.getLogger(__name__)

SPLIT = "images"  # the only split of a packed folder; several splits of a run may share one

_FORMAT = 1
_IMAGES_PER_SHARD = 512  # what a killed packing may have to repeat; COCO has 232 such shards
_READERS = 8  # threads that read files ahead of the writer
_AHEAD = 32  # files that they may hold: the memory of packing
_TABLE, _SOURCE = "annotations.npz", "source.json"


class Packed(NamedTuple):
    """A packed split: its folder, and what is in it."""

    folder: Path
    annotations: Annotations
    categories: tuple[Category, ...]


def open_packed(files: SplitFiles, directory: Path, packed_dir: Path) -> Packed:
    """The packed form of a split, which is packed now unless it is there and up to date.

    Args:
      files: of the split.
      directory: `config.data.dir`; a packed folder stays valid when both move together.
      packed_dir: where packed folders lie.

    Raises:
      DataError: the annotations have errors, an image is missing, or nothing can be written.
      OSError: the annotation file can't be read.
    """
    source = _describe(files, directory)
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    folder = packed_dir / f"{files.annotations.stem.strip('_')}-{digest[:16]}"
    if not folder.exists():
        try:
            with _lock(packed_dir):
                if not folder.exists():
                    _pack(files, folder, source)
        except OSError as error:
            raise DataError(_no_room(error, packed_dir)) from error
    return Packed(folder, *load_table(folder / _TABLE))


def _describe(files: SplitFiles, directory: Path) -> dict[str, Any]:
    """All that decides what a packed folder holds."""
    with files.annotations.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "annotations": os.path.relpath(files.annotations, directory),
        "images": os.path.relpath(files.images, directory),
        "sha256": checksum,
        "format": _FORMAT,
    }


def _no_room(error: OSError, packed_dir: Path) -> str:
    reason = f"data.packed_dir={str(packed_dir)!r}: images can't be packed there ({error}); "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}it needs as much space as the images: free some, what is packed is kept"
    return f"{reason}name a folder that can be written with --config.data.packed_dir=..."


@contextlib.contextmanager
def _lock(packed_dir: Path) -> Iterator[None]:
    packed_dir.mkdir(parents=True, exist_ok=True)
    with (packed_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for the process that packs images in %s", packed_dir)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pack(files: SplitFiles, folder: Path, source: dict[str, Any]) -> None:
    """Packs a split into a folder that does not exist, then removes what it replaces."""
    partial = folder.with_name(f"{folder.name}.partial")
    replaced = [other for other in _packed_from(source, folder.parent) if other != partial]
    if replaced:
        logger.info("%s has changed since it was packed: packing it anew", files.annotations)
    annotations, categories = load_split(files)
    partial.mkdir(exist_ok=True)
    (partial / _SOURCE).write_text(json.dumps(source, indent=1), encoding="utf-8")
    features = _features(categories)
    num_bytes = _write_shards(partial, files, annotations, categories, features)
    save_table(partial / _TABLE, annotations, categories)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[len(shard) for shard in _shards(len(annotations.image_ids))],
        num_bytes=num_bytes,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features=features,
        split_infos=[split],
        check_data=False,
        description=f"Images of {source['images']}, objects of {source['annotations']}.",
    )
    partial.rename(folder)
    for other in replaced:
        shutil.rmtree(other, ignore_errors=True)


def _packed_from(source: dict[str, Any], packed_dir: Path) -> list[Path]:
    """Folders, complete or not, that were packed from the same files, in whatever state."""
    found = []
    for path in packed_dir.glob(f"*/{_SOURCE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            other = json.loads(path.read_text(encoding="utf-8"))
            if all(other[key] == source[key] for key in ("annotations", "images")):
                found.append(path.parent)
    return found


def _features(categories: Sequence[Category]) -> tfds.features.FeaturesDict:
    """Those of TFDS' `coco/2017`, with areas as numbers that need not be whole."""
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


def _shards(count: int) -> list[range]:
    """The positions of the images of each shard."""
    starts = range(0, count, _IMAGES_PER_SHARD)
    return [range(start, min(start + _IMAGES_PER_SHARD, count)) for start in starts]


def _write_shards(
    partial: Path,
    files: SplitFiles,
    annotations: Annotations,
    categories: Sequence[Category],
    features: tfds.features.FeaturesDict,
) -> int:
    """Writes the shards that are not there yet; returns the bytes of all of them."""
    shards = _shards(len(annotations.image_ids))
    names = [
        f"coco_records-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}"
        for number in range(len(shards))
    ]
    todo = [number for number, name in enumerate(names) if not (partial / name).exists()]
    done = len(annotations.image_ids) - sum(len(shards[number]) for number in todo)
    logger.info(
        "packing %d images of %s into %s, once%s",
        len(annotations.image_ids),
        files.annotations,
        partial.with_suffix(""),
        f"; {done} are there already" if done else "",
    )
    label_of = {category.id: label for label, category in enumerate(categories)}
    # What FeaturesDict.serialize_example does besides takes longer, object by object.
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(
            total=len(annotations.image_ids),
            initial=done,
            desc="packing",
            unit=" images",
            disable=None,  # where there is no terminal
        ) as progress,
    ):
        for number in todo:
            records = (
                serializer.serialize_example(_example(image, index, annotations, label_of))
                for index, image in _read_ahead(pool, files.images, shards[number], annotations)
            )
            _write_shard(partial / names[number], records, len(shards[number]), progress)
    return sum((partial / name).stat().st_size for name in names)


def _read_ahead(
    pool: ThreadPoolExecutor, folder: Path, positions: range, annotations: Annotations
) -> Iterator[tuple[int, bytes]]:
    """Positions and files of images in order, read by threads, a few ahead."""
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    for index in positions:
        waiting.append((index, pool.submit(_read, folder / annotations.file_names[index])))
        if len(waiting) > _AHEAD:
            first, image = waiting.popleft()
            yield first, image.result()
    for index, image in waiting:
        yield index, image.result()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} can't be read: {error}") from error


def _example(
    image: bytes, index: int, annotations: Annotations, label_of: dict[int, int]
) -> dict[str, Any]:
    """The features of an image, encoded as TFDS serialises them.

    TFDS has no room for boxes beyond the picture: these are clipped, and without the degenerate
    ones. The numbers of the annotation file are in the table.
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
    """Writes a shard that is complete wherever it exists under its name.

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
    """Calls a method of the writer; its errors, of whatever kind, are those of the disk."""
    try:
        call(*args)
    except (RuntimeError, ValueError) as error:
        kind = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(kind, str(error)) from error
