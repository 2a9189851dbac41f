"""Checks a data set in the format of COCO, YOLO or Pascal VOC before a training.

    python -m dn_detr_jax check DIR
    python -m dn_detr_jax check DIR --config configs/finetune.py
    python -m dn_detr_jax check DIR --config.data.train.annotations=a.json

Errors would stop a training; the exit status is then 1. With warnings a training goes on.
docs/own_data.md has the table of everything that is looked for. Of the images only the headers are
read, of those of 16 bits the pixels; `--decode` reads the pixels of all.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data import formats, images
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.box_format import TOLERANCE, check_box_format, describe_box
from dn_detr_jax.data.check_report import Split
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import SPLITS, annotated_folder, is_divided, nothing_to_learn
from dn_detr_jax.data.directory import ImageFolder
from dn_detr_jax.data.division import divide
from dn_detr_jax.data.findings import Findings, Kind
from dn_detr_jax.data.layout import find_split
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import checksum

_READERS = 8


def check(
    data_config: ConfigDict, decode: bool = False, num_queries: int = 0, evaluates: bool = True
) -> list[Split]:
    """Checks both splits of a directory, and whether they fit together.

    Args:
      data_config: `config.data`; `dir`, `exif`, `pixel_range`, `prepare_split`, `train` and
        `validation` are used.
      decode: whether to decode the images, too.
      num_queries: objects that the model can find in an image; 0: not known.
      evaluates: whether the training has evaluations; if not, the training split alone is checked.

    Returns:
      The training split, then the validation split.

    Raises:
      DataError: there is no such folder, or it is prepared by TFDS.
    """
    directory = annotated_folder(data_config, ", which has checked it")
    divided = is_divided(data_config, directory)
    read = SPLITS[: 1 if divided or not evaluates else 2]
    splits = [
        check_split(
            directory,
            name,
            data_config[name],
            decode,
            data_config.exif,
            num_queries,
            data_config.pixel_range,
        )
        for name in read
    ]
    if divided:
        splits = _divided(splits[0], data_config.prepare_split)
    if len(splits) == 2:
        _check_both(*splits)
    for split in splits[: len(read)]:
        _check_unlisted(split, splits)
    return splits


def _divided(whole: Split, share: float) -> list[Split]:
    """Returns the two splits that a training split is divided into; findings stay with the first.

    Raises:
      DataError: it has less than two images.
    """
    if whole.annotations is None:
        return [whole, Split("validation", Findings())]
    parts = []
    for name, positions in zip(SPLITS, divide(whole.annotations.file_names, share), strict=True):
        parts.append(
            whole._replace(
                name=name,
                annotations=whole.annotations.at(positions),
                paths=tuple(whole.paths[position] for position in positions.tolist()),
                findings=whole.findings if name == "train" else Findings(),
            )
        )
    for part, kind in zip(parts, (kinds.NO_TARGETS, kinds.NOTHING_TO_EVALUATE), strict=True):
        found = part.annotations
        assert found is not None  # of a part
        if kind.name not in part.findings.errors and not found.targets.any():
            part.findings.add(kind, nothing_to_learn(found))
    return parts


def check_split(
    directory: Path,
    name: str,
    split_config: ConfigDict,
    decode: bool = False,
    exif: images.Exif = "auto",
    num_queries: int = 0,
    pixel_range: images.PixelRange = (),
) -> Split:
    """Checks a split alone: its paths, its annotations, and its images.

    Args:
      directory: of the data set.
      name: "train" or "validation".
      split_config: `config.data.train` or `config.data.validation`.
      decode: whether to decode the images, too.
      exif: `config.data.exif`.
      num_queries: objects that the model can find in an image; 0: not known.
      pixel_range: `config.data.pixel_range`.
    """
    findings = Findings()
    try:
        files = find_split(directory, name, split_config)
        loaded = formats.read_annotations(files, findings, exif)
    except (DataError, OSError) as error:
        findings.add(kinds.FILES_NOT_FOUND, error)
        return Split(name, findings)
    if loaded is None:
        return Split(name, findings, files)
    annotations, categories = loaded
    check_box_format(annotations, findings)
    _check_objects(annotations, categories, findings)
    if not annotations.targets.any():
        kind = kinds.NO_TARGETS if name == "train" else kinds.NOTHING_TO_EVALUATE
        findings.add(kind, nothing_to_learn(annotations))
    for index in np.flatnonzero(annotations.counts > num_queries) if num_queries else ():
        objects = f"{annotations.file_names[index]}: {annotations.counts[index]} objects"
        findings.add(kinds.TOO_MANY_OBJECTS, f"{objects}, {num_queries} queries")
    folder = ImageFolder(files.images)
    present = formats.check_files(annotations.file_names, folder, findings)
    found = [folder.find(file_name) for file_name in annotations.file_names]
    paths = tuple(None if path is None else files.images / path for path in found)
    look = functools.partial(_look, decode=decode, exif=exif, pixel_range=pixel_range)
    _check_images(annotations, paths, present, findings, look)
    return Split(name, findings, files, annotations, categories, paths)


def _check_objects(
    annotations: Annotations, categories: Sequence[Category], findings: Findings
) -> None:
    def warn(kind: Kind, objects: np.ndarray) -> None:
        for row in np.flatnonzero(objects).tolist():
            findings.add(kind, describe_box(annotations, row))

    warn(kinds.NO_EXTENT, annotations.degenerate)
    limits = annotations.sizes[annotations.rows, ::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        ends = annotations.bboxes[:, :2] + annotations.bboxes[:, 2:]
        beyond = (annotations.bboxes[:, :2] < -TOLERANCE) | (ends > limits + TOLERANCE)
    warn(kinds.BEYOND, beyond.any(1) & ~annotations.degenerate)
    bad_area = ~(np.isfinite(annotations.areas) & (annotations.areas >= 0))
    warn(kinds.BAD_AREA, bad_area)
    used = set(annotations.category_ids[annotations.targets].tolist())
    for category in categories:
        if category.id not in used:
            findings.add(kinds.EMPTY_CLASS, f"{category.name} ({category.id})")


def _check_images(
    table: Annotations,
    paths: Sequence[Path | None],
    present: Sequence[int],
    findings: Findings,
    look_at: Callable[[Path, tuple[int, int]], list[tuple[Kind, str]]],
) -> None:
    """Compares every image that is there with its annotated size."""

    def look(index: int) -> list[tuple[Kind, str]]:
        path, size = paths[index], tuple(table.sizes[index].tolist())
        assert path is not None  # of a position in `present`
        name = table.file_names[index]
        try:
            return [(kind, f"{name}: {text}") for kind, text in look_at(path, size)]
        except (DataError, OSError) as error:
            return [(kinds.UNUSABLE_IMAGE, f"{name}: {error}")]

    with ThreadPoolExecutor(_READERS) as pool:
        looked = pool.map(look, present)
        for found in tqdm(looked, "images", len(present), unit=" images", disable=None):
            for kind, text in found:
                findings.add(kind, text)


def _look(
    path: Path,
    size: tuple[int, int],
    decode: bool,
    exif: images.Exif,
    pixel_range: images.PixelRange,
) -> list[tuple[Kind, str]]:
    """Returns what is to be said of an image that can be used.

    Raises:
      DataError: the image can't be used.
      OSError: it can't be read.
    """
    with path.open("rb") as file:
        header = images.read_header(file)
    size_of_boxes = images.size_of_boxes(header, size, exif)
    found = []
    if exif == "auto" and images.orientation_is_open(header, size):
        found.append((kinds.OPEN_ORIENTATION, f"orientation {header.orientation}"))
    if decode:
        images.decode(path.read_bytes(), size_of_boxes, exif, pixel_range)
    if header.bits == 16 and not pixel_range:
        bits = images.used_bits(path.read_bytes())
        if bits < 16:
            found.append((kinds.FEW_BITS, f"{bits} bits"))
    return found


def _check_both(train: Split, validation: Split) -> None:
    """Compares the images and the classes of both splits."""
    if train.annotations is None or validation.annotations is None:
        return
    for index, other in equal_files(validation.paths, train.paths):
        name, first = validation.annotations.file_names[index], train.annotations.file_names[other]
        validation.findings.add(kinds.LEAK, name if name == first else f"{name} (there {first})")
    for category in sorted(
        set(train.categories) ^ set(validation.categories), key=lambda c: (c.id, c.name)
    ):
        split, where = (
            (train, "training") if category in train.categories else (validation, "validation")
        )
        assert split.annotations is not None
        is_used = category.id in split.annotations.category_ids
        validation.findings.add(
            kinds.CLASS_OF_ONE_SPLIT if is_used else kinds.EMPTY_CLASS_OF_ONE_SPLIT,
            f"{category.name!r} ({category.id}) is in the {where} file",
        )


def equal_files(
    paths: Sequence[Path | None], others: Sequence[Path | None]
) -> list[tuple[int, int]]:
    """Finds files with equal content under any names.

    Only files of equal size are read.

    Args:
      paths: files, None where there is none.
      others: files, None where there is none.

    Returns:
      For each of `paths` that has an equal, its position and that of the first equal in `others`.
    """
    by_size: dict[int, list[int]] = {}
    for position, size in enumerate(_sizes(others)):
        if size is not None:
            by_size.setdefault(size, []).append(position)
    sizes = _sizes(paths)
    candidates = [i for i, size in enumerate(sizes) if size in by_size]
    known = {size for size in sizes if size is not None}
    partners = sorted({other for size in known for other in by_size.get(size, ())})
    with ThreadPoolExecutor(_READERS) as pool:
        digests = dict(zip(partners, pool.map(_digest, (others[p] for p in partners)), strict=True))
        own = list(pool.map(_digest, (paths[i] for i in candidates)))
    first: dict[str, int] = {}
    for position, digest in digests.items():
        first.setdefault(digest, position)
    pairs = zip(candidates, own, strict=True)
    return [(i, first[digest]) for i, digest in pairs if digest and digest in first]


def _sizes(paths: Sequence[Path | None]) -> list[int | None]:
    def size(path: Path | None) -> int | None:
        with contextlib.suppress(OSError):
            return None if path is None else path.stat().st_size
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(size, paths))


def _digest(path: Path) -> str:
    """The checksum of a file, empty if it can't be read."""
    with contextlib.suppress(OSError):
        return checksum(path)
    return ""


def _check_unlisted(split: Split, splits: Sequence[Split]) -> None:
    """Warns of images in a split's folder that no annotation file mentions."""
    if split.files is None or split.annotations is None:
        return
    listed = {path for other in splits for path in other.paths if path is not None}
    folders = {path.parent for path in listed if path.is_relative_to(split.files.images)}
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            hidden = path.name.startswith("._")  # macOS keeps attributes of files in such
            if path.suffix.lower() in images.SUFFIXES and path not in listed and not hidden:
                split.findings.add(kinds.UNLISTED, path.relative_to(split.files.images))
