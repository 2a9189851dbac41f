"""Cuts the images of a data set into tiles, for objects that are small beside their image.

Prediction in tiles uses the same tiles (`dn_detr_jax.inference.tiles`). An object belongs to every
tile that shows enough of it, with the part of its box inside the tile. In a tile that shows less,
that part is an ignored region, as a crowd region of COCO: it is neither learned nor missed.
"""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dn_detr_jax.data import images
from dn_detr_jax.data.annotations import Annotations, ImageRow, ObjectRow, build_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import SPLITS, annotated_folder, is_divided
from dn_detr_jax.data.directory import ImageFolder, SplitFiles
from dn_detr_jax.data.division import divide
from dn_detr_jax.data.formats import load_split
from dn_detr_jax.data.layout import find_any_split, find_split
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import named, write_json_atomically

_FOLDERS = {"train": "train", "validation": "val"}  # of the tiles, by split


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
      tile: side of the square tiles in pixels, at least 1.
      overlap: share of the side that neighbors have in common at least, 0 to 0.9.
      visible: share of a box, by area, that a tile has to show for the object to be learned, above
        0 and at most 1.

    Raises:
      DataError: a value out of range.
    """

    tile: int
    overlap: float = 0.2
    visible: float = 0.4

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise DataError(f"tile is {self.tile}, expected pixels, at least 1")
        if not 0 <= self.overlap <= 0.9:
            raise DataError(
                f"overlap is {self.overlap}, expected a share of the tile from 0 to 0.9"
            )
        if not 0 < self.visible <= 1:
            raise DataError(
                f"visible is {self.visible}, expected a share of the box above 0, at most 1"
            )


@dataclasses.dataclass(frozen=True)
class CutSplit:
    """A split that was cut.

    Attributes:
      name: "train" or "validation".
      images: number of images before.
      tiles: the table of the tiles.
    """

    name: str
    images: int
    tiles: Annotations


def tile_edges(size: tuple[int, int], tile: int, overlap: float) -> np.ndarray:
    """Places tiles over an image, at equal distances.

    Args:
      size: height and width of the image.
      tile: side in pixels.
      overlap: share of the side that neighbors have in common at least.

    Returns:
      int [n, 4], left, top, right, bottom of each tile.
    """

    def starts(length: int) -> np.ndarray:
        if length <= tile:
            return np.zeros(1, int)
        count = math.ceil((length - tile) / max(1, math.floor(tile * (1 - overlap)))) + 1
        return np.linspace(0, length - tile, count).round().astype(int)

    height, width = size
    corners = [(left, top) for top in starts(height) for left in starts(width)]
    return np.array([(x, y, min(x + tile, width), min(y + tile, height)) for x, y in corners])


def cut_boxes(
    boxes: np.ndarray, edges: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the boxes of an image to one of its tiles.

    Args:
      boxes: float [k, 4], left, top, width, height in pixels of the image.
      edges: int [4], left, top, right, bottom of the tile.
      size: height and width of the image.

    Returns:
      The boxes in pixels of the tile, float64 [k, 4], and the share of each that the tile shows,
      float64 [k]: of the area inside the image, 0 for boxes without one.

    Examples:
      >>> cut, shares = cut_boxes(np.array([[8.0, 0, 4, 2]]), np.array([10, 0, 20, 10]), (10, 20))
      >>> cut.tolist(), shares.tolist()
      ([[0.0, 0.0, 2.0, 2.0]], [0.5])
    """
    # Boxes of damaged annotations may be as large as a float holds, or not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        within = np.clip(corners, 0, np.tile(size[::-1], 2))
        seen = np.clip(within, np.tile(edges[:2], 2), np.tile(edges[2:], 2))
        whole, part = (np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), axis=1) for b in (within, seen))
        share = np.divide(part, whole, out=np.zeros(len(boxes)), where=whole > 0)
    left_top = seen[:, :2] - edges[:2]
    return np.concatenate([left_top, seen[:, 2:] - seen[:, :2]], axis=1), share


def cut(data_config: ConfigDict, out: Path, tiling: Tiling) -> list[CutSplit]:
    """Cuts a data set and writes the tiles in the format of COCO, all or nothing.

    Tiles are PNG files of 8 bits per channel, named after their image and their left and top edge.
    A validation split that `data.prepare_split` makes consists of other images than the training
    split.

    Args:
      data_config: `config.data`; `dir`, `exif`, `pixel_range`, `prepare_split`, `train` and
        `validation` are used.
      out: folder to make.
      tiling: how.

    Returns:
      The splits: the training split, and the validation split if the data set has one.

    Raises:
      DataError: the folder exists, or the data can't be used.
      OSError: files can't be read or written.
    """
    directory = annotated_folder(data_config)
    if out.exists():
        raise DataError(f"{out} exists: delete it, or name another folder")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
    try:
        splits = [
            _cut_split(name, files, table, categories, data_config, unfinished, tiling)
            for name, files, table, categories in _splits(data_config, directory)
        ]
        with named(out):
            unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return splits


def _splits(
    data_config: ConfigDict, directory: Path
) -> Iterator[tuple[str, SplitFiles, Annotations, tuple[Category, ...]]]:
    """Yields the name, the files, the table and the categories of each split."""
    exif = data_config.exif
    files = find_split(directory, "train", data_config.train)
    table, categories = load_split(files, exif)
    if is_divided(data_config, directory):
        parts = divide(table.file_names, data_config.prepare_split)
        for name, positions in zip(SPLITS, parts, strict=True):
            yield name, files, table.at(positions), categories
        return
    yield "train", files, table, categories
    validation = find_any_split(directory, "validation", data_config.validation)
    if validation is not None:
        yield "validation", validation, *load_split(validation, exif)


def _cut_split(
    name: str,
    files: SplitFiles,
    table: Annotations,
    categories: tuple[Category, ...],
    data_config: ConfigDict,
    out: Path,
    tiling: Tiling,
) -> CutSplit:
    folder, found = out / _FOLDERS[name], ImageFolder(files.images)
    rows: list[ImageRow] = []
    objects: list[ObjectRow] = []
    stems = _stems(table.file_names)
    for index in tqdm(range(len(stems)), name, unit=" images", disable=None):
        path = files.images / (found.find(table.file_names[index]) or "")
        try:
            size = tuple(table.sizes[index].tolist())
            pixels = _read(path, size, data_config.exif, data_config.pixel_range)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        of_image = np.arange(table.offsets[index], table.offsets[index + 1])
        for edges in tile_edges(pixels.shape[:2], tiling.tile, tiling.overlap):
            boxes, shares = cut_boxes(table.bboxes[of_image], edges, pixels.shape[:2])
            for row, box, share in zip(of_image, boxes.tolist(), shares.tolist(), strict=True):
                if share > 0:
                    objects.append(
                        ObjectRow(
                            image=len(rows),
                            id=len(objects) + 1,
                            bbox=box,
                            category_id=int(table.category_ids[row]),
                            area=float(table.areas[row]) * share,
                            crowd=bool(table.crowd[row]) or share < tiling.visible,
                        )
                    )
            left, top, right, bottom = edges.tolist()
            file = f"{stems[index]}_{left}_{top}.png"
            _write(folder / file, pixels[top:bottom, left:right])
            rows.append(ImageRow(len(rows) + 1, (bottom - top, right - left), file))
    tiles = build_table(rows, objects)
    content = tiles.coco_json(categories, f"tiles of {tiling.tile} pixels of {files.source}")
    write_json_atomically(out / "annotations" / f"instances_{folder.name}.json", content, None)
    return CutSplit(name, len(stems), tiles)


def _stems(file_names: tuple[str, ...]) -> list[str]:
    """Returns a distinct path for each image: its name without suffix, inside the new folder."""
    stems: dict[str, None] = {}
    for name in file_names:
        parts = PurePosixPath(name).with_suffix("").parts
        plain = stem = "/".join(part for part in parts if part not in ("/", ".."))
        for number in itertools.count(2):
            if stem not in stems:
                break
            stem = f"{plain}_{number}"
        stems[stem] = None
    return list(stems)


def _read(
    path: Path, size: tuple[int, int], exif: images.Exif, pixel_range: images.PixelRange
) -> np.ndarray:
    with path.open("rb") as file:
        header = images.read_header(file)
    size = images.size_of_boxes(header, size, exif)
    return images.decode(path.read_bytes(), size, exif, pixel_range)


def _write(path: Path, pixels: np.ndarray) -> None:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
