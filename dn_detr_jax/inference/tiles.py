"""Objects that are small beside their image: prediction in overlapping tiles, and their merging."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from dn_detr_jax.data.cutting import tile_edges
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.detections import Detections
from dn_detr_jax.inference.predictor import ImageLike, Predictor, read_image

_Key = TypeVar("_Key")
_AGREE = 0.5  # IoU, within what two tiles share, of boxes of one object


class TiledPredictor:
    """Finds objects as a `Predictor` does, in tiles of each image instead of the whole.

    The predictor resizes each tile to its canvas, so that an object of a large image keeps more
    pixels. An image that fits into one tile has the predictor's own detections.
    """

    def __init__(self, predictor: Predictor, tile: int, overlap: float = 0.2):
        """Wraps a predictor.

        Args:
          predictor: for the tiles; several tiles of an image fill its batches.
          tile: side of the square tiles in pixels of the upright image, at least 1.
          overlap: share of the side that neighbors have in common at least, 0 to 0.9. An object
            of at most this size is whole in a tile.

        Raises:
          DataError: a side or an overlap out of range.
        """
        if tile < 1:
            raise DataError(f"tile is {tile}, expected pixels, at least 1")
        if not 0 <= overlap <= 0.9:
            raise DataError(f"overlap is {overlap}, expected a share of the tile from 0 to 0.9")
        self._predictor, self._tile, self._overlap = predictor, tile, overlap
        self.categories, self.pixel_range = predictor.categories, predictor.pixel_range

    def predict(self, image: ImageLike, threshold: float | None = None) -> Detections:
        """Finds the objects in an image, see `Predictor.predict`."""
        return next(found for _, found in self.stream([(None, image)], threshold))

    def stream(
        self, images: Iterable[tuple[_Key, ImageLike]], threshold: float | None = None
    ) -> Iterator[tuple[_Key, Detections]]:
        """Finds the objects in any number of images, see `Predictor.stream`."""
        waiting: dict[int, _Image] = {}

        def tiles() -> Iterator[tuple[tuple[int, np.ndarray], np.ndarray]]:
            for number, (key, image) in enumerate(images):
                pixels = read_image(image, self.pixel_range)
                edges = tile_edges(pixels.shape[:2], self._tile, self._overlap)
                waiting[number] = _Image(key, pixels.shape[:2], len(edges))
                for edge in edges:
                    left, top, right, bottom = edge
                    yield (number, edge), np.ascontiguousarray(pixels[top:bottom, left:right])

        for (number, edge), found in self._predictor.stream(tiles(), threshold):
            image = waiting[number]
            image.found.append((edge, found))
            if len(image.found) == image.tiles:
                del waiting[number]
                yield image.key, merge(image.found, image.size)


@dataclasses.dataclass
class _Image:
    """An image whose tiles are under way: its key and size, their number, and what is found."""

    key: Any
    size: tuple[int, int]
    tiles: int
    found: list[tuple[np.ndarray, Detections]] = dataclasses.field(default_factory=list)


def merge(found: Sequence[tuple[np.ndarray, Detections]], size: tuple[int, int]) -> Detections:
    """Merges the detections of the tiles of an image.

    Boxes of one class in two tiles are one object if they agree within the area that both tiles
    see. The result is the box with the highest score of those that no edge of a tile cuts, or the
    hull of all if each of them is cut; its score is the highest one.

    Args:
      found: the edges of each tile, see `tile_edges`, and its detections.
      size: height and width of the image.
    """
    if len(found) == 1:
        return found[0][1]
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = [edge for edge, _ in found]
    boxes = [part.boxes + np.tile(edge[:2], 2).astype(np.float32) for edge, part in found]
    whole = np.concatenate([~_is_cut(b, e, size) for b, e in zip(boxes, edges, strict=True)])
    first = np.cumsum([0, *map(len, boxes)])
    links: list[np.ndarray] = [np.zeros((2, 0), int)]
    for i, j in itertools.combinations(range(len(found)), 2):
        shared = np.concatenate(
            [np.maximum(edges[i][:2], edges[j][:2]), np.minimum(edges[i][2:], edges[j][2:])]
        )
        if np.all(shared[:2] < shared[2:]):
            same = found[i][1].labels[:, None] == found[j][1].labels
            agree = same & (_iou(_clip(boxes[i], shared), _clip(boxes[j], shared)) > _AGREE)
            links.append(np.add(np.nonzero(agree), [[first[i]], [first[j]]]))
    row, column = np.concatenate(links, axis=1)
    total = int(first[-1])
    graph = coo_array((np.ones(len(row), bool), (row, column)), shape=(total, total))
    count, group = connected_components(graph, directed=False)

    every = np.concatenate(boxes)
    scores = np.concatenate([part.scores for _, part in found])
    # Of each group: whole boxes before cut ones, then by score.
    best = np.lexsort((-scores, ~whole, group))
    best = best[np.unique(group[best], return_index=True)[1]]
    merged, top = every[best], np.zeros(count, np.float32)
    np.maximum.at(top, group, scores)
    hull = np.concatenate([np.full((count, 2), np.inf), np.full((count, 2), -np.inf)], axis=1)
    np.minimum.at(hull[:, :2], group, every[:, :2])
    np.maximum.at(hull[:, 2:], group, every[:, 2:])
    merged = np.where(whole[best, None], merged, hull).astype(np.float32)

    order = np.argsort(-top, kind="stable")
    chosen = best[order]
    names = [name for _, part in found for name in part.class_names]
    return Detections(
        boxes=merged[order],
        scores=top[order],
        labels=np.concatenate([part.labels for _, part in found])[chosen],
        category_ids=np.concatenate([part.category_ids for _, part in found])[chosen],
        class_names=tuple(names[i] for i in chosen),
        size=size,
    )


def _is_cut(boxes: np.ndarray, edge: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether boxes reach an edge of their tile that is inside of the image."""
    near = 1 + 0.01 * (edge[2:] - edge[:2])
    inner = np.concatenate([edge[:2] > 0, edge[2:] < size[::-1]])
    reached = np.concatenate(
        [boxes[:, :2] <= edge[:2] + near, boxes[:, 2:] >= edge[2:] - near], axis=1
    )
    return np.any(inner & reached, axis=1)


def _clip(boxes: np.ndarray, edge: np.ndarray) -> np.ndarray:
    return np.clip(boxes, np.tile(edge[:2], 2), np.tile(edge[2:], 2))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the IoU [n, m] of boxes [n, 4] and [m, 4]; 0 for boxes without an area."""
    corners = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    both = np.prod(np.maximum(corners[1] - corners[0], 0), axis=-1)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1] - both
    return np.divide(both, union, out=np.zeros_like(union), where=union > 0)
