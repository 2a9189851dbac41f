"""Mosaics: four images in one, around a random point (Bochkovskiy et al., YOLOv4, 2020).

Each tile is filled by a random part of its image that has the tile's aspect. So nothing is padded
or distorted, and objects are cut as by a random crop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.data.transforms import Geometry, apply, draw_orientation

_CENTER = (0.25, 0.75)  # where the tiles meet, as a share of each side
_PART = (0.5, 1.0)  # sides of the part of an image, as a share of the largest that fits


class Scene(NamedTuple):
    """An image and its objects.

    Attributes:
      image: uint8 [H, W, 3] RGB.
      boxes: float [n, 4], left, top, right, bottom in pixels.
      labels: int [n].
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def make_mosaic(
    rng: np.random.Generator, scenes: Sequence[Scene], augment: ConfigDict, canvas: np.ndarray
) -> Scene:
    """Makes a mosaic of four images.

    Args:
      rng: of the tiles.
      scenes: four of them.
      augment: `config.data.augment`; flips and rotations are drawn for each tile.
      canvas: uint8 [h, w, 3], overwritten; h and w are at least 2.

    Returns:
      The canvas, with the objects of all tiles, cut to their tiles.
    """
    height, width = canvas.shape[:2]
    middle = rng.uniform(_CENTER[0], _CENTER[1], 2) * (height, width)
    y, x = np.clip(np.rint(middle), 1, (height - 1, width - 1)).astype(int).tolist()
    boxes, labels = [], []
    corners = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    for scene, (top, left, bottom, right) in zip(scenes, corners, strict=True):
        size = np.array([bottom - top, right - left])
        geometry = _tile_geometry(rng, np.array(scene.image.shape[:2]), size, augment)
        _, found, found_labels = apply(*scene, geometry, canvas[top:bottom, left:right])
        boxes.append(found + np.array([left, top, left, top], np.float32))
        labels.append(found_labels)
    return Scene(canvas, np.concatenate(boxes), np.concatenate(labels))


def _tile_geometry(
    rng: np.random.Generator, image_size: np.ndarray, size: np.ndarray, augment: ConfigDict
) -> Geometry:
    """Draws the part of an image that fills a tile of a size, and its orientation."""
    flip, turns = draw_orientation(rng, rng.random(1) < augment.flip, augment)
    if turns[0] % 2:
        image_size = image_size[::-1]
    share = rng.uniform(*_PART) * (image_size / size).min()
    part = np.clip(np.rint(size * share), 1, image_size)
    corner = np.floor(rng.random(2) * (image_size - part + 1))
    crop = np.concatenate([corner, part]).astype(np.int32)
    return Geometry(image_size.astype(np.int32), crop, size, flip[0], turns[0])
