"""Packs the images of a split, as they are, into records that are read by position.

A data set of many small files is slow to read at random; packed once, it is a few hundred large
ones. The records are a folder of TFDS (`array_record`, features of `coco/2017`) that
`tfds.builder_from_directory` opens. TFDS' own builders start again from nothing after a kill, so
this module writes shards and metadata:

- Each shard is written under another name, flushed, and renamed when complete. A packing that was
  killed is continued: complete shards stay.
- The whole is renamed to its final name when complete. The name holds a checksum of the annotations
  and of where the images are: what is packed from other annotations has another name.
- One process packs at a time; the lock makes others wait.
- Size and modification time of every image are kept. When a packed split is opened, images whose
  file has changed are compared with what is packed, and the shards of those that differ are written
  again (`_refresh`). Images whose file is gone stay as packed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dn_detr_jax.data import images, shards
from dn_detr_jax.data.annotations import Annotations, load_table, save_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import ImageFolder, SplitFiles
from dn_detr_jax.data.formats import checksum, load_split
from dn_detr_jax.data.shards import (
    SPLIT,
    PackedImages,
    ShardWriter,
    class_names,
    progress_bar,
    read_file,
)
from dn_detr_jax.data.tfds_files import write_metadata
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import replace_atomically

logger = logging.getLogger(__name__)

_FORMAT = 1
_READERS = 8  # threads that look at files
_STAMPED = 500  # files that a thread looks at in one go
_TABLE, _SOURCE, _STAMPS = "annotations.npz", "source.json", "files.npy"


class Packed(NamedTuple):
    """A packed split: its folder, and what is in it."""

    folder: Path
    annotations: Annotations
    categories: tuple[Category, ...]


def open_packed(
    files: SplitFiles,
    directory: Path,
    packed_dir: Path,
    exif: images.Exif = "auto",
    pack: bool = True,
) -> Packed:
    """Opens the packed form of a split; packs it first unless it is there and up to date.

    Args:
      files: of the split.
      directory: `config.data.dir`; a packed folder stays valid when both move together.
      packed_dir: where packed folders lie.
      exif: `config.data.exif`.
      pack: whether anything may be packed; if not, what is there is taken as it is.

    Raises:
      DataError: the annotations have errors, an image is missing, nothing can be written, or
        nothing is packed and nothing may be.
      OSError: the annotation file can't be read.
    """
    source = _describe(files, directory, exif)
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    folder = packed_dir / f"{_name(files)}-{digest[:16]}"
    if not folder.exists() and not pack:
        raise DataError(f"the images of {files.source} are not packed in {packed_dir} yet")
    if not folder.exists():
        try:
            with _lock(packed_dir):
                if not folder.exists():
                    _pack(files, folder, source, exif)
        except OSError as error:
            raise DataError(_no_room(error, packed_dir)) from error
    packed = Packed(folder, *load_table(folder / _TABLE))
    return _refreshed(packed, files, exif) if pack else packed


def _describe(files: SplitFiles, directory: Path, exif: images.Exif) -> dict[str, Any]:
    """Returns all that decides what a packed folder holds, except for the images' content."""
    listed = [os.path.relpath(path, directory) for path in files.listed]
    return {
        "annotations": os.path.relpath(files.annotations, directory),
        "images": os.path.relpath(files.images, directory),
        "sha256": checksum(files, directory),
        "format": _FORMAT,
        **({} if exif == "auto" else {"exif": exif}),
        **({} if files.format == "coco" else {"kind": files.format, "listed": listed}),
    }


def _name(files: SplitFiles) -> str:
    """Returns the part of a packed folder's name that is for people."""
    path = files.listed[0] if files.listed else files.annotations
    name = path.stem.strip("_") or files.format
    return name if files.format == "coco" else f"{files.format}-{name}"


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


def _pack(files: SplitFiles, folder: Path, source: dict[str, Any], exif: images.Exif) -> None:
    """Packs a split into a folder that does not exist, then removes what it replaces."""
    partial = folder.with_name(f"{folder.name}.partial")
    replaced = [other for other in _packed_from(source, folder.parent) if other != partial]
    if replaced:
        logger.info("%s has changed since it was packed: packing it again", files.source)
    annotations, categories = load_split(files, exif)
    paths = _paths(files, annotations)
    stamps = _stamps(paths)  # before reading: a file that changes meanwhile is noticed next time
    if exif != "auto":
        annotations = _with_sizes_of_boxes(annotations, paths, range(len(paths)), exif)
    partial.mkdir(exist_ok=True)
    (partial / _SOURCE).write_text(json.dumps(source, indent=1), encoding="utf-8")
    write = ShardWriter(lambda i: read_file(paths[i]), annotations, categories)
    num_bytes = _write_shards(partial, files, paths, write, exif)
    save_table(partial / _TABLE, annotations, categories)
    _save_stamps(partial, stamps)
    write_metadata(
        partial,
        SPLIT,
        class_names(categories),
        [len(positions) for positions in shards.ranges(len(paths))],
        num_bytes,
        f"Images of {source['images']}, objects of {source['annotations']}.",
    )
    partial.rename(folder)
    for other in replaced:
        shutil.rmtree(other, ignore_errors=True)


def _packed_from(source: dict[str, Any], packed_dir: Path) -> list[Path]:
    """Returns folders, complete or not, that were packed from any version of the same files."""
    found = []
    for path in packed_dir.glob(f"*/{_SOURCE}"):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            other = json.loads(path.read_text(encoding="utf-8"))
            keys = ("annotations", "images", "exif", "kind", "listed")
            if all(other.get(key) == source.get(key) for key in keys):
                found.append(path.parent)
    return found


def _write_shards(
    partial: Path,
    files: SplitFiles,
    paths: Sequence[Path],
    write: ShardWriter,
    exif: images.Exif,
) -> int:
    """Writes the shards that are not there yet; returns the bytes of all of them."""
    ranges = shards.ranges(len(paths))
    names = shards.names(len(ranges))
    todo = [number for number, name in enumerate(names) if not (partial / name).exists()]
    done = len(paths) - sum(len(ranges[number]) for number in todo)
    logger.info(
        "packing %d images of %s into %s, once%s",
        len(paths),
        files.source,
        partial.with_suffix(""),
        f"; {done} are there already" if done else "",
    )
    with progress_bar(len(paths), done) as progress:
        for number in todo:
            write(partial / names[number], ranges[number], progress)
    if write.open_orientations and exif == "auto":
        logger.warning(
            "%d images of %s have an EXIF orientation that their annotated size leaves open; their "
            "boxes are taken as drawn on the stored pixels. data.exif=as_shown or as_stored says "
            "which; python -m dn_detr_jax check names them",
            write.open_orientations,
            files.source,
        )
    return sum((partial / name).stat().st_size for name in names)


def _paths(files: SplitFiles, annotations: Annotations) -> list[Path]:
    """Returns the files of the images, by the annotated name where there is no file."""
    folder = ImageFolder(files.images)
    return [files.images / (folder.find(name) or name) for name in annotations.file_names]


def _with_sizes_of_boxes(
    annotations: Annotations, paths: Sequence[Path], positions: Sequence[int], exif: images.Exif
) -> Annotations:
    """Replaces the annotated sizes of some images by the sizes that their boxes lie in."""
    sizes = annotations.sizes.copy()

    def replace(position: int) -> None:
        size = tuple(sizes[position].tolist())
        # An image that can't be read, or of another size, is an error when it is used.
        with contextlib.suppress(DataError, OSError), paths[position].open("rb") as file:
            sizes[position] = images.size_of_boxes(images.read_header(file), size, exif)

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(replace, positions))
    return dataclasses.replace(annotations, sizes=sizes)


def _stamps(paths: Sequence[Path]) -> np.ndarray:
    """Returns size, modification time and change time of files; -1 where there is no file.

    Returns:
      int64 [N, 3], in bytes and nanoseconds.
    """

    def stamp(path: Path) -> tuple[int, int, int]:
        with contextlib.suppress(OSError, ValueError):
            status = path.stat()
            return status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return -1, -1, -1

    parts = [paths[start : start + _STAMPED] for start in range(0, len(paths), _STAMPED)]
    with ThreadPoolExecutor(_READERS) as pool:  # disks in a network answer slowly
        found = pool.map(lambda part: [stamp(path) for path in part], parts)
        return np.array([row for rows in found for row in rows], np.int64).reshape(-1, 3)


def _save_stamps(folder: Path, stamps: np.ndarray) -> None:
    """Keeps sizes and modification times; a copied folder has other change times."""
    with replace_atomically(folder / _STAMPS) as temporary, temporary.open("wb") as file:
        np.save(file, stamps[:, :2])


def _load_stamps(folder: Path, count: int) -> np.ndarray | None:
    """Returns the stamps of the packed images, int64 [N, 2]; None if none are kept.

    Folders that were packed by earlier versions have none.
    """
    try:
        with (folder / _STAMPS).open("rb") as file:
            stamps = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # missing or damaged
        return None
    return stamps if stamps.shape == (count, 2) and stamps.dtype == np.int64 else None


def _refreshed(packed: Packed, files: SplitFiles, exif: images.Exif) -> Packed:
    """Packs images again whose file has changed; returns the updated split.

    Raises:
      DataError: an image has changed, and its shard can't be written.
    """
    paths = _paths(files, packed.annotations)
    stamps = _stamps(paths)
    are_kept = _load_stamps(packed.folder, len(paths)) is not None
    if are_kept and not len(_suspects(packed.folder, stamps)):
        return packed
    try:
        with _lock(packed.folder.parent):  # another process may have been faster
            return _refresh(packed, files, paths, stamps, exif)
    except OSError as error:
        changed = _changed(packed.folder, paths, _suspects(packed.folder, stamps))
        if not changed:  # a folder for reading only: the files are compared again next time
            logger.info("%s can't be written: the times of the images are not kept", packed.folder)
            return packed
        raise DataError(
            f"{paths[changed[0]]} has changed since it was packed in {packed.folder} (and "
            f"{len(changed) - 1} more), and that folder can't be written ({error}); name another "
            "with --config.data.packed_dir=..."
        ) from error


def _suspects(folder: Path, stamps: np.ndarray) -> np.ndarray:
    """Returns the positions of files that are there and may not be as they were when packed.

    If no stamps are kept, these are the files that were written, or put in their place, after the
    oldest shard.
    """
    before = _load_stamps(folder, len(stamps))
    if before is not None:
        differs = (before != stamps[:, :2]).any(1)
    else:
        shards = [path.stat().st_mtime_ns for path in folder.glob(f"*{SPLIT}.array_record-*")]
        differs = stamps[:, 1:].max(1) >= min(shards, default=0)
    return np.flatnonzero(differs & (stamps[:, 0] >= 0))


def _changed(folder: Path, paths: Sequence[Path], suspects: np.ndarray) -> list[int]:
    """Returns those of some positions whose file has other content than what is packed."""
    packed = PackedImages(folder, len(paths))

    def differs(position: int) -> bool:
        content = read_file(paths[position])
        try:
            return content != packed[position]
        except DataError:  # a damaged record, which is written again
            return True

    with ThreadPoolExecutor(_READERS) as pool:
        return [i for i, d in zip(suspects, pool.map(differs, suspects.tolist()), strict=True) if d]


def _refresh(
    packed: Packed,
    files: SplitFiles,
    paths: Sequence[Path],
    stamps: np.ndarray,
    exif: images.Exif,
) -> Packed:
    """Writes the shards of changed images, then the table, then the stamps.

    A process that is killed in between leaves the old stamps, and the next one starts again.
    """
    folder, annotations, categories = packed
    changed = _changed(folder, paths, _suspects(folder, stamps))
    if changed:
        logger.info(
            "%d images, such as %s, have changed since they were packed in %s: packing them again",
            len(changed),
            paths[changed[0]],
            folder,
        )
        if files.format == "yolo":  # whose boxes are shares of the images' sizes
            annotations, _ = load_split(files, exif)
        elif exif != "auto":
            annotations = _with_sizes_of_boxes(annotations, paths, changed, exif)
        _replace_shards(folder, paths, stamps, changed, annotations, categories)
        save_table(folder / _TABLE, annotations, categories)
    before = _load_stamps(folder, len(stamps))
    if before is not None:  # images whose file is gone stay as packed, and so do their stamps
        gone = stamps[:, 0] < 0
        stamps[gone, :2] = before[gone]
    _save_stamps(folder, stamps)
    return Packed(folder, annotations, categories)


def _replace_shards(
    folder: Path,
    paths: Sequence[Path],
    stamps: np.ndarray,
    changed: Sequence[int],
    annotations: Annotations,
    categories: Sequence[Category],
) -> None:
    """Rewrites the shards that hold changed images; an image without a file stays as packed."""
    packed = PackedImages(folder, len(paths))

    def read(index: int) -> bytes:
        if stamps[index, 0] < 0:
            return packed[index]
        return read_file(paths[index])

    write = ShardWriter(read, annotations, categories)
    ranges = shards.ranges(len(paths))
    todo = [number for number, positions in enumerate(ranges) if set(changed) & set(positions)]
    with progress_bar(sum(len(ranges[number]) for number in todo)) as progress:
        for number in todo:
            path = folder / shards.names(len(ranges))[number]
            if not path.exists():
                raise DataError(
                    f"{folder}: packed in other shards; delete it, and it is packed again"
                )
            write(path, ranges[number], progress)
