"""Annotation files in the format of COCO, with every value checked.

The format: https://cocodataset.org/#format-data. The reader collects what is wrong in `Findings`
and raises no error for it.
"""

import contextlib
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data.annotations import Annotations, ImageRow, ObjectRow, build_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import is_plain, normal_name
from dn_detr_jax.data.findings import Findings, shortened

_LARGEST_ID = np.iinfo(np.int32).max  # of images: batches carry the ids as int32
_PARTS = ("images", "annotations", "categories")  # lists of an annotation file
_LARGEST = np.iinfo(np.int64).max


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
        findings.add(kinds.NO_JSON, f"{path.name}: {error or type(error).__name__}")
        return None
    if not isinstance(document, dict):
        findings.add(kinds.NO_COCO, f"expected an object, got {_kind(document)}")
        return None
    parts: dict[str, list] = {}
    for part in _PARTS:
        entries = document.get(part)
        if isinstance(entries, list):
            parts[part] = entries
        else:
            what = _kind(entries) if part in document else "nothing"
            findings.add(kinds.NO_COCO, f"expected a list of {part}, got {what}")
    if len(parts) < len(_PARTS):
        return None
    categories, bad_categories = _read_categories(parts["categories"], findings)
    images, bad_images = _read_images(parts["images"], findings)
    positions = {image_id: position for position, image_id in enumerate(images)}
    known = _Known(positions, bad_images, categories, bad_categories)
    objects = _read_objects(parts["annotations"], known, findings)
    if findings.errors and not (images and categories):
        return None
    table = build_table(list(images.values()), objects)
    return table, tuple(Category(*item) for item in categories.items())


def _without_segmentation(value: dict) -> dict:
    value.pop("segmentation", None)
    return value


def _read_categories(entries: list, findings: Findings) -> tuple[dict[int, str], set[int]]:
    """Reads names by id, and the ids of malformed entries."""
    categories: dict[int, str] = {}
    malformed: set[int] = set()
    for number, entry in enumerate(entries):
        try:
            category_id = _whole(entry, "id", least=0)
            name = _text(entry, "name")
        except _MalformedError as error:
            findings.add(kinds.MALFORMED_CATEGORY, f"categories[{number}]: {error}")
            malformed.update(_readable_id(entry))
            continue
        if category_id in categories:
            example = f"{category_id} ({categories[category_id]!r} and {name!r})"
            findings.add(kinds.CATEGORY_ID_TWICE, example)
        else:
            categories[category_id] = name
    if not entries:
        findings.add(kinds.NO_CATEGORIES, "the list of categories is empty")
    return categories, malformed


def _readable_id(entry: Any) -> list[int]:
    """Returns the id of a malformed entry, if it has one: its objects are not of an unknown one."""
    try:
        return [_whole(entry, "id")]
    except _MalformedError:
        return []


class _Known(NamedTuple):
    """Positions of images and names of categories by id, and the ids of the malformed ones."""

    images: dict[int, int]
    bad_images: set[int]
    categories: dict[int, str]
    bad_categories: set[int]


def _read_images(entries: list, findings: Findings) -> tuple[dict[int, ImageRow], set[int]]:
    """Reads images by id, and the ids of malformed entries."""
    images: dict[int, ImageRow] = {}
    malformed: set[int] = set()
    names: dict[str, int] = {}
    for number, entry in enumerate(entries):
        try:
            image_id = _whole(entry, "id", least=0, most=_LARGEST_ID)
            size = (
                _whole(entry, "height", least=1, most=_LARGEST_ID),
                _whole(entry, "width", least=1, most=_LARGEST_ID),
            )
            file_name = _text(entry, "file_name")
        except _MalformedError as error:
            findings.add(kinds.MALFORMED_IMAGE, f"images[{number}]: {error}")
            malformed.update(_readable_id(entry))
            continue
        if image_id in images:
            example = f"{image_id} ({images[image_id].file_name} and {file_name})"
            findings.add(kinds.IMAGE_ID_TWICE, example)
            continue
        images[image_id] = ImageRow(image_id, size, file_name)
        first = names.setdefault(normal_name(file_name), image_id)
        if first != image_id:
            findings.add(kinds.LISTED_TWICE, f"{file_name} (ids {first} and {image_id})")
    if not entries:
        findings.add(kinds.NO_IMAGES, "the list of images is empty")
    return images, malformed


def _read_objects(entries: list, known: _Known, findings: Findings) -> list[ObjectRow]:
    objects, seen = [], set()
    for number, entry in enumerate(entries):
        try:
            found = _read_object(entry, number, known, findings)
        except _MalformedError as error:
            findings.add(kinds.MALFORMED_ANNOTATION, f"annotations[{number}]: {error}")
            continue
        if found is None:
            continue
        if found.id in seen:
            findings.add(kinds.ANNOTATION_ID_TWICE, found.id)
        seen.add(found.id)
        objects.append(found)
    return objects


def _read_object(entry: Any, number: int, known: _Known, findings: Findings) -> ObjectRow | None:
    image_id, category_id = _whole(entry, "image_id"), _whole(entry, "category_id")
    bbox = _bbox(entry)
    object_id = _whole(entry, "id", least=-_LARGEST) if "id" in entry else number + 1
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):  # which False and True equal
        raise _MalformedError(f"iscrowd is {_shown(crowd)}, expected 0 or 1")
    area = _number(entry, "area") if entry.get("area") is not None else bbox[2] * bbox[3]
    has_category, has_image = category_id in known.categories, image_id in known.images
    if not has_category and category_id not in known.bad_categories:
        example = f"category_id {category_id} (annotation {object_id})"
        findings.add(kinds.UNKNOWN_CATEGORY, example)
    if not has_image and image_id not in known.bad_images:
        example = f"image_id {image_id} (annotation {object_id})"
        findings.add(kinds.UNKNOWN_IMAGE, example)
    if not (has_category and has_image):
        return None
    return ObjectRow(known.images[image_id], object_id, bbox, category_id, area, bool(crowd))


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
    if not isinstance(value, str) or not value or not is_plain(value):
        wanted = "text without control characters"
        raise _MalformedError(f"{key} is {_shown(value)}, expected {wanted}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    try:
        return shortened(json.dumps(value))
    except ValueError:  # a number of more digits than Python prints
        return _kind(value)
