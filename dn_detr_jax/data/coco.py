"""Directories in the format of COCO: where a split's files lie, and what its annotation file says.

The format: https://cocodataset.org/#format-data. An annotation file that others made is not to be
trusted: every value is checked, what is wrong is collected in `Findings`, and nothing of it raises.
"""

import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import DataError

_FOLDERS = {
    "train": ("train2017", "train2014", "train"),
    "validation": ("val2017", "val2014", "val", "valid", "validation"),
}
_LARGEST_ID = np.iinfo(np.int32).max  # of images: batches carry the ids as int32
_LARGEST = np.iinfo(np.int64).max
_EXAMPLES = 5


class SplitFiles(NamedTuple):
    """Where a split lies: its annotation file, and the folder that its file names start from."""

    annotations: Path
    images: Path


class Finding:
    """One kind of thing that is wrong: how often, and the first examples of it."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        return "; ".join(self.examples) + (f"; and {more} more" if more else "")


class Findings:
    """What is wrong with data, by kind.

    Errors keep a training from starting or make it fail; of warnings a training goes on.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Finding] = {}
        self.warnings: dict[str, Finding] = {}

    def error(self, kind: str, example: object) -> None:
        """Counts something that a training can't go on with."""
        self._add(self.errors, kind, example)

    def warning(self, kind: str, example: object) -> None:
        """Counts something that a training copes with."""
        self._add(self.warnings, kind, example)

    @staticmethod
    def _add(found: dict[str, Finding], kind: str, example: object) -> None:
        finding = found.setdefault(kind, Finding())
        finding.count += 1
        if len(finding.examples) < _EXAMPLES:
            finding.examples.append(_shortened(str(example), 1000))

    def raise_errors(self, source: str, advice: str) -> None:
        """Raises a DataError that names all the errors, if there are any."""
        if self.errors:
            found = ". ".join(f"{kind} ({f.count}): {f}" for kind, f in self.errors.items())
            raise DataError(f"{source}: {found}. {advice}")


def find_split(directory: Path, split: str, split_config: ConfigDict) -> SplitFiles:
    """Finds the files of a split.

    Args:
      directory: `config.data.dir`.
      split: "train" or "validation".
      split_config: `config.data.train` or `config.data.validation`; what it leaves empty is
        looked for in the usual layouts.

    Returns:
      Annotation file and folder, both of which exist.

    Raises:
      DataError: nothing is there, or several things are; says what was found or looked for.
    """
    annotations = find_annotations(directory, split, split_config)
    if annotations is None:
        year, _, plain, *_ = _FOLDERS[split]
        usual = [f"annotations/instances_{name}.json" for name in (year, plain)]
        usual += [f"{plain}.json", f"{plain}/_annotations.coco.json and the like"]
        raise DataError(_nothing_found(directory, usual, f"data.{split}.annotations"))
    if split_config.images:
        images = directory / split_config.images
        if not images.is_dir():
            raise DataError(f"data.{split}.images: there is no folder {images}")
    else:
        folders = _image_folders(directory, split, annotations)
        found = _at_most_one(folders, Path.is_dir, directory, f"data.{split}.images")
        if found is None:
            names = [str(path.relative_to(directory)) + "/" for path in folders]
            raise DataError(_nothing_found(directory, names, f"data.{split}.images"))
        images = found
    return SplitFiles(annotations, images)


def find_annotations(directory: Path, split: str, split_config: ConfigDict) -> Path | None:
    """The annotation file of a split, None if the config names none and none is found.

    Raises:
      DataError: the file that the config names is missing, or several are found.
    """
    key = f"data.{split}.annotations"
    if split_config.annotations:
        annotations = directory / split_config.annotations
        if not annotations.is_file():
            raise DataError(f"{key}: there is no file {annotations}")
        return annotations
    candidates = [directory / name for name in _annotation_names(split)]
    return _at_most_one(candidates, Path.is_file, directory, key)


def _annotation_names(split: str) -> list[str]:
    names = []
    for name in _FOLDERS[split]:
        names += [f"annotations/instances_{name}.json", f"annotations/{name}.json"]
        names += [f"instances_{name}.json", f"{name}.json"]
        names += [f"{name}/_annotations.coco.json", f"{name}/annotations.json"]
    return names


def _image_folders(directory: Path, split: str, annotations: Path) -> list[Path]:
    """Where the images of an annotation file may lie."""
    year = [name for name in _FOLDERS[split] if annotations.stem.endswith(f"_{name}")]
    names = year or [annotations.parent.name, *_FOLDERS[split]]
    folders = [directory / name for name in names if name in _FOLDERS[split]]
    folders += [directory / "images" / name for name in names if name in _FOLDERS[split]]
    if annotations.name == "_annotations.coco.json":  # beside its images
        return [annotations.parent]
    if not any(folder.is_dir() for folder in folders):
        folders.append(directory / "images")
    return folders


def _at_most_one(
    candidates: Sequence[Path], exists: Callable[[Path], bool], directory: Path, key: str
) -> Path | None:
    """The one of some paths that is there; a DataError if several are."""
    found = [path for path in dict.fromkeys(candidates) if exists(path)]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(directory)) for path in found)
        raise DataError(f"{directory} has {names}: say which with --config.{key}=...")
    return found[0] if found else None


def _nothing_found(directory: Path, names: Iterable[str], key: str) -> str:
    return (
        f"{directory} has none of {', '.join(dict.fromkeys(names))}; it has {_listing(directory)}. "
        f"Name the right path, relative to data.dir, with --config.{key}=..."
    )


def _listing(directory: Path) -> str:
    """The first entries of a folder, for a message."""
    if not directory.is_dir():
        return "nothing, since there is no such folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(directory))
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "nothing in it"


def read_annotations(
    path: Path, findings: Findings
) -> tuple[Annotations, tuple[Category, ...]] | None:
    """Reads an annotation file.

    Args:
      path: the file.
      findings: gets what is wrong with it.

    Returns:
      The table of the file, and its categories, both in the order of the file. Images,
      annotations and categories that can't be used are left out, each counted as an error. None
      if nothing can be read.

    Raises:
      OSError: the file can't be read.
    """
    with _no_garbage_collection():
        return _read_annotations(path, findings)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The millions of objects of a large file have no cycles; looking for some takes as long as
    reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_annotations(
    path: Path, findings: Findings
) -> tuple[Annotations, tuple[Category, ...]] | None:
    try:
        with path.open("rb") as file:
            # Outlines are most of such a file, and are not used here.
            document = json.load(file, object_hook=_without_segmentation)
    except (ValueError, RecursionError) as error:
        findings.error("no JSON", f"{path.name}: {error or type(error).__name__}")
        return None
    if not isinstance(document, dict):
        findings.error("no COCO format", f"expected an object, got {_kind(document)}")
        return None
    parts = {part: document.get(part) for part in ("images", "annotations", "categories")}
    for part, entries in parts.items():
        if not isinstance(entries, list):
            what = _kind(entries) if part in document else "nothing"
            findings.error("no COCO format", f"expected a list of {part}, got {what}")
    if not all(isinstance(entries, list) for entries in parts.values()):
        return None
    categories = _read_categories(parts["categories"], findings)
    images = _read_images(parts["images"], findings)
    objects = _read_objects(parts["annotations"], images, categories, findings)
    if findings.errors and not (images and categories):
        return None
    return _table(images, objects), tuple(Category(*item) for item in categories.items())


def _without_segmentation(value: dict) -> dict:
    value.pop("segmentation", None)
    return value


def _read_categories(entries: list, findings: Findings) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        try:
            category_id = _whole(entry, "id", least=0)
            name = _text(entry, "name")
        except _MalformedError as error:
            findings.error("malformed category", f"categories[{number}]: {error}")
            continue
        if category_id in categories:
            example = f"{category_id} ({categories[category_id]!r} and {name!r})"
            findings.error("category id that comes twice", example)
        else:
            categories[category_id] = name
    if not entries:
        findings.error("no categories", "the list of categories is empty")
    return categories


class _Image(NamedTuple):
    position: int
    size: tuple[int, int]
    file_name: str


def _read_images(entries: list, findings: Findings) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    for number, entry in enumerate(entries):
        try:
            image_id = _whole(entry, "id", least=0, most=_LARGEST_ID)
            size = (
                _whole(entry, "height", least=1, most=_LARGEST_ID),
                _whole(entry, "width", least=1, most=_LARGEST_ID),
            )
            file_name = _text(entry, "file_name")
        except _MalformedError as error:
            findings.error("malformed image", f"images[{number}]: {error}")
            continue
        if image_id in images:
            example = f"{image_id} ({images[image_id].file_name} and {file_name})"
            findings.error("image id that comes twice", example)
        else:
            images[image_id] = _Image(len(images), size, file_name)
    if not entries:
        findings.error("no images", "the list of images is empty")
    return images


class _Object(NamedTuple):
    image: int  # position
    id: int
    bbox: list[float]
    category_id: int
    area: float
    crowd: bool


def _read_objects(
    entries: list, images: dict[int, _Image], categories: dict[int, str], findings: Findings
) -> list[_Object]:
    objects, seen = [], set()
    for number, entry in enumerate(entries):
        try:
            found = _read_object(entry, number, images, categories, findings)
        except _MalformedError as error:
            findings.error("malformed annotation", f"annotations[{number}]: {error}")
            continue
        if found is None:
            continue
        if found.id in seen:
            findings.warning("annotation id that comes twice", found.id)
        seen.add(found.id)
        objects.append(found)
    objects.sort(key=lambda found: found.image)  # stable: within an image as in the file
    return objects


def _read_object(
    entry: Any,
    number: int,
    images: dict[int, _Image],
    categories: dict[int, str],
    findings: Findings,
) -> _Object | None:
    image_id, category_id = _whole(entry, "image_id"), _whole(entry, "category_id")
    bbox = _bbox(entry)
    object_id = _whole(entry, "id", least=-_LARGEST) if "id" in entry else number + 1
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):  # which False and True equal
        raise _MalformedError(f"iscrowd is {_shown(crowd)}, expected 0 or 1")
    area = _number(entry, "area") if entry.get("area") is not None else bbox[2] * bbox[3]
    if category_id not in categories:
        example = f"category_id {category_id} (annotation {object_id})"
        findings.error("annotation of an unknown category", example)
    if image_id not in images:
        example = f"image_id {image_id} (annotation {object_id})"
        findings.error("annotation of an unknown image", example)
        return None
    if category_id not in categories:
        return None
    return _Object(images[image_id].position, object_id, bbox, category_id, area, bool(crowd))


def _table(images: dict[int, _Image], objects: list[_Object]) -> Annotations:
    count = len(objects)
    rows = np.fromiter((found.image for found in objects), np.int64, count)
    bboxes = np.array([found.bbox for found in objects], np.float64).reshape(-1, 4)
    per_image = np.bincount(rows, minlength=len(images))
    return Annotations(
        image_ids=np.fromiter(images, np.int64, len(images)),
        sizes=np.array([image.size for image in images.values()], np.int32).reshape(-1, 2),
        file_names=tuple(image.file_name for image in images.values()),
        offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        ids=np.fromiter((found.id for found in objects), np.int64, count),
        bboxes=bboxes,
        category_ids=np.fromiter((found.category_id for found in objects), np.int64, count),
        areas=np.fromiter((found.area for found in objects), np.float64, count),
        crowd=np.fromiter((found.crowd for found in objects), np.bool_, count),
    )


class _MalformedError(Exception):
    """A value that is not what the format has there."""


def _value(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise _MalformedError(f"expected an object, got {_kind(entry)}")
    if key not in entry:
        raise _MalformedError(f"{key} is missing")
    return entry[key]


def _whole(entry: Any, key: str, least: int = -_LARGEST, most: int = _LARGEST) -> int:
    """An integer, which 640.0 is too."""
    value = _value(entry, key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        limits = "" if least == -_LARGEST else f" of at least {least}"
        limits += "" if most == _LARGEST else f" and at most {most}"
        raise _MalformedError(f"{key} is {_shown(value)}, expected a whole number{limits}")
    return value


def _number(entry: Any, key: str) -> float:
    value = _value(entry, key)
    if not _is_number(value):
        raise _MalformedError(f"{key} is {_shown(value)}, expected a number")
    return _as_float(value)


def _bbox(entry: Any) -> list[float]:
    value = _value(entry, "bbox")
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        wanted = "[left, top, width, height] in pixels"
        raise _MalformedError(f"bbox is {_shown(value)}, expected {wanted}")
    return [_as_float(number) for number in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _text(entry: Any, key: str) -> str:
    value = _value(entry, key)
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise _MalformedError(f"{key} is {_shown(value)}, expected printable text")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    try:
        return _shortened(json.dumps(value))
    except ValueError:  # a number of more digits than Python prints
        return _kind(value)


def _shortened(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def missing_files(images: Path, file_names: Iterable[str]) -> list[str]:
    """Those of some file names that are not in a folder, by listing each folder only once."""
    listings: dict[str, set[str]] = {}
    missing = []
    for name in file_names:
        folder, _, last = name.rpartition("/")
        if folder not in listings:
            listings[folder] = _files_in(images / folder if folder else images)
        if last not in listings[folder]:
            missing.append(name)
    return missing


def _files_in(folder: Path) -> set[str]:
    try:
        # Neither folders nor devices and pipes, which may have no end.
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


def load_split(files: SplitFiles) -> tuple[Annotations, tuple[Category, ...]]:
    """Reads the annotations of a split that is to be trained or evaluated on.

    Raises:
      DataError: one line that names everything that would break a training.
      OSError: the annotation file can't be read.
    """
    findings = Findings()
    loaded = read_annotations(files.annotations, findings)
    if loaded is not None:
        for name in missing_files(files.images, loaded[0].file_names):
            findings.error(f"image that is not in {files.images}", name)
    advice = "Everything at once: python -m dn_detr_jax check DIR"
    findings.raise_errors(str(files.annotations), advice)
    assert loaded is not None  # without errors there is a table
    return loaded
