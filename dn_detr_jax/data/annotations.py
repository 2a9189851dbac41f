"""The table of a split: sizes, ids and objects of all its images, in arrays.

The table is in memory, so that plans, targets and ground truth read no image. Its numbers are those
of the annotation file, neither rounded nor clipped; training targets are computed from them
(`Annotations.targets_of`).
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dn_detr_jax.data.coco_classes import Category, with_holes
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import replace_atomically

_MOST_LABELS = 10_000  # of labels="category_ids": larger ids would make the class head too large


class Targets(NamedTuple):
    """The training targets of an image.

    Attributes:
      boxes: float32 [n, 4], left, top, right, bottom in pixels, within the image.
      category_ids: int64 [n].
    """

    boxes: np.ndarray
    category_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The images of a split and their objects, one row per object.

    Attributes:
      image_ids: int64 [N].
      sizes: int32 [N, 2], heights and widths in pixels.
      file_names: of the N images, as the source calls them; empty strings if it does not.
      offsets: int64 [N + 1], the objects of image i are rows offsets[i] to offsets[i + 1].
      ids: int64 [K].
      bboxes: float64 [K, 4], left, top, width, height in pixels, as annotated.
      category_ids: int64 [K].
      areas: float64 [K], in square pixels, of the object's shape if the source knows it.
      crowd: bool [K], regions of many objects, to be ignored.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    file_names: tuple[str, ...]
    offsets: np.ndarray
    ids: np.ndarray
    bboxes: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64 [K]: the position of the image that each object is in."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.offsets))

    @functools.cached_property
    def degenerate(self) -> np.ndarray:
        """bool [K]: boxes that are not finite, or without extent within their image."""
        # Some of the numbers may be as large as a float holds, or none at all.
        with np.errstate(over="ignore", invalid="ignore"):
            corners = self.corners(np.arange(len(self.ids)))
            extent = corners[:, 2:] - corners[:, :2]
        return ~(np.isfinite(self.bboxes).all(1) & (extent > 0).all(1))

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """bool [K]: training targets, which are neither crowd regions nor degenerate."""
        return ~self.crowd & ~self.degenerate

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 [N]: the number of training targets of each image."""
        before = np.concatenate([[0], np.cumsum(self.targets)])
        return np.diff(before[self.offsets])

    def targets_of(self, index: int) -> Targets:
        """Returns the training targets of the image at a position."""
        rows = np.arange(self.offsets[index], self.offsets[index + 1])
        rows = rows[self.targets[rows]]
        return Targets(self.corners(rows).astype(np.float32), self.category_ids[rows])

    def corners(self, rows: np.ndarray) -> np.ndarray:
        """Returns the corners of some objects, clipped to their images: float64 [n, 4]."""
        bboxes, limits = self.bboxes[rows], self.sizes[self.rows[rows], ::-1].astype(np.float64)
        low = np.clip(bboxes[:, :2], 0.0, limits)
        high = np.clip(bboxes[:, :2] + bboxes[:, 2:], 0.0, limits)
        return np.concatenate([low, high], axis=1)

    def at(self, positions: np.ndarray) -> "Annotations":
        """Returns the table of some of the images, in the order of their positions, int [n]."""
        counts = np.diff(self.offsets)[positions]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[positions] - offsets[:-1], counts)
        return Annotations(
            image_ids=self.image_ids[positions],
            sizes=self.sizes[positions],
            file_names=tuple(self.file_names[position] for position in positions.tolist()),
            offsets=offsets,
            ids=self.ids[rows],
            bboxes=self.bboxes[rows],
            category_ids=self.category_ids[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
        )

    def coco_json(self, categories: Sequence[Category], description: str) -> dict[str, Any]:
        """Returns the split in the JSON format of COCO, as `pycocotools.coco.COCO.dataset` has it.

        Boxes, areas and ids are those of the source, to the last digit. Boxes that are not finite
        are left out.
        """
        finite = np.flatnonzero(np.isfinite(self.bboxes).all(1))
        columns = zip(
            self.ids[finite].tolist(),
            self.image_ids[self.rows[finite]].tolist(),
            self.category_ids[finite].tolist(),
            self.bboxes[finite].tolist(),
            self.areas[finite].tolist(),
            self.crowd[finite].astype(int).tolist(),
            strict=True,
        )
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "info": {"description": description},
            "images": [
                {"id": image_id, "height": height, "width": width}
                | ({"file_name": name} if name else {})
                for image_id, (height, width), name in zip(
                    self.image_ids.tolist(), self.sizes.tolist(), self.file_names, strict=True
                )
            ],
            "annotations": [dict(zip(keys, row, strict=True)) for row in columns],
            "categories": [dataclasses.asdict(category) for category in categories],
        }


class ImageRow(NamedTuple):
    """An image of a table: id, height and width in pixels, name."""

    id: int
    size: tuple[int, int]
    file_name: str


class ObjectRow(NamedTuple):
    """An object of a table.

    Attributes:
      image: position of its image.
      id: of the object.
      bbox: left, top, width, height in pixels.
      category_id: of its class.
      area: in square pixels.
      crowd: whether it is to be ignored.
    """

    image: int
    id: int
    bbox: Sequence[float]
    category_id: int
    area: float
    crowd: bool


def build_table(images: Sequence[ImageRow], objects: Sequence[ObjectRow]) -> Annotations:
    """Returns the table of some images and their objects, those of an image in the given order."""
    objects = sorted(objects, key=lambda found: found.image)  # stable
    count = len(objects)
    rows = np.fromiter((found.image for found in objects), np.int64, count)
    per_image = np.bincount(rows, minlength=len(images))
    return Annotations(
        image_ids=np.fromiter((image.id for image in images), np.int64, len(images)),
        sizes=np.array([image.size for image in images], np.int32).reshape(-1, 2),
        file_names=tuple(image.file_name for image in images),
        offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        ids=np.fromiter((found.id for found in objects), np.int64, count),
        bboxes=np.array([found.bbox for found in objects], np.float64).reshape(-1, 4),
        category_ids=np.fromiter((found.category_id for found in objects), np.int64, count),
        areas=np.fromiter((found.area for found in objects), np.float64, count),
        crowd=np.fromiter((found.crowd for found in objects), np.bool_, count),
    )


def save_table(path: Path, annotations: Annotations, categories: Sequence[Category]) -> None:
    """Writes a table and the categories of a data set to one `.npz` file, all or nothing.

    Raises:
      OSError: if the folder can't be written.
    """
    arrays = {
        field.name: getattr(annotations, field.name) for field in dataclasses.fields(annotations)
    }
    arrays["file_names"] = _pack_strings(annotations.file_names)
    arrays["categories.id"] = np.array([category.id for category in categories], np.int64)
    arrays["categories.name"] = _pack_strings([category.name for category in categories])
    with replace_atomically(path, durable=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_table(path: Path) -> tuple[Annotations, tuple[Category, ...]]:
    """Reads what `save_table` wrote.

    Raises:
      OSError: if there is no such file.
      DataError: if it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        ids, names = arrays.pop("categories.id"), _unpack_strings(arrays.pop("categories.name"))
        arrays["file_names"] = _unpack_strings(arrays["file_names"])
        categories = tuple(map(Category, ids.tolist(), names))
        return Annotations(**arrays), categories
    except Exception as error:  # damaged files lead NumPy to many kinds of errors
        if isinstance(error, OSError) and error.filename is not None:  # it can't be opened
            raise
        raise DataError(f"{path}: damaged ({error}); delete it, and it is written again") from error


def _pack_strings(strings: Sequence[str]) -> np.ndarray:
    """Packs strings as bytes: in an array of strings, each takes the space of the longest."""
    return np.frombuffer(json.dumps(list(strings)).encode(), np.uint8)


def _unpack_strings(packed: np.ndarray) -> tuple[str, ...]:
    return tuple(json.loads(packed.tobytes()))


def label_categories(categories: Sequence[Category], labels: str) -> tuple[Category, ...]:
    """Returns the category of each label.

    Args:
      categories: of the data set, with distinct ids.
      labels: "contiguous": 0 to K - 1, in the order of the ids; "category_ids": the ids
        themselves, with `Category(id, "")` for labels that are no category's id.

    Returns:
      One category per label, in the order of the labels.

    Raises:
      DataError: the ids can't be labels.

    Examples:
      >>> label_categories([Category(3, "c"), Category(1, "a")], "contiguous")
      (Category(id=1, name='a'), Category(id=3, name='c'))
      >>> [category.name for category in label_categories([Category(2, "b")], "category_ids")]
      ['', '', 'b']
    """
    in_order = sorted(categories, key=lambda category: category.id)
    if labels == "contiguous":
        return tuple(in_order)
    lowest, highest = in_order[0].id, in_order[-1].id
    if lowest < 0 or highest >= _MOST_LABELS:
        raise DataError(
            f"data.labels='category_ids' needs category ids from 0 to {_MOST_LABELS - 1}, these "
            f"are {lowest} to {highest}: set data.labels=contiguous"
        )
    return with_holes(tuple(in_order))
