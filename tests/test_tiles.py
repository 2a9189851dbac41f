"""Prediction in tiles, with a stand-in that finds every rectangle of a drawn image."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_jax.data.cutting import tile_edges
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.detections import Detections
from dn_detr_jax.inference.tiles import TiledPredictor


class Finder:
    """Finds the visible part of each object: the pixels of one value; its class is value % 2."""

    categories, pixel_range = (), ()

    def __init__(self):
        self.seen = []

    def stream(self, images, threshold):
        for key, pixels in images:
            self.seen.append(pixels.shape[:2])
            values = [int(v) for v in np.unique(pixels[..., 0]) if v]
            boxes = [self._box(pixels[..., 0] == value) for value in values]
            scores = np.array([1 - value / 1000 for value in values], np.float32)
            labels = np.array(values, np.int32) % 2
            yield (
                key,
                Detections(
                    boxes=np.array(boxes, np.float32).reshape(-1, 4),
                    scores=scores,
                    labels=labels,
                    category_ids=labels.astype(np.int64) + 1,
                    class_names=tuple("ab"[label] for label in labels),
                    size=pixels.shape[:2],
                ),
            )

    def _box(self, mask):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def drawn(size, boxes):
    image = np.zeros((*size, 3), np.uint8)
    for value, (left, top, right, bottom) in enumerate(boxes, 1):
        image[top:bottom, left:right] = value
    return image


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    tile=st.integers(40, 120),
    overlap=st.floats(0.1, 0.6),
    data=st.data(),
)
def test_every_object_is_found_once_and_whole(size, tile, overlap, data):
    """Catches objects that are found in each tile, cut at an edge, or lost between tiles.

    Objects lie in cells of a grid, so that none covers another one; some are larger than a tile.
    """
    cell = data.draw(st.integers(12, 200))
    boxes = []
    for top in range(0, size[0] - cell + 1, cell):
        for left in range(0, size[1] - cell + 1, cell):
            if len(boxes) < 200 and data.draw(st.booleans()):
                width, height = (data.draw(st.integers(6, cell - 2)) for _ in range(2))
                boxes.append((left + 1, top + 1, left + 1 + width, top + 1 + height))
    found = TiledPredictor(Finder(), tile, overlap).predict(drawn(size, boxes))
    wanted = np.array(boxes, np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(found.boxes, wanted)  # scores fall with the number
    np.testing.assert_array_equal(found.labels, np.arange(1, len(boxes) + 1) % 2)
    assert found.class_names == tuple("ab"[label] for label in found.labels)
    assert found.size == size


def test_neighbors_of_one_class_stay_two_objects():
    """Catches a merging by overlap alone: both boxes reach into what the tiles share."""
    boxes = [(10, 10, 95, 40), (10, 44, 95, 80)]
    image = np.zeros((90, 160, 3), np.uint8)
    for value, (left, top, right, bottom) in zip((2, 4), boxes, strict=True):
        image[top:bottom, left:right] = value
    found = TiledPredictor(Finder(), 90, 0.3).predict(image)
    np.testing.assert_array_equal(found.boxes, boxes)


def test_an_image_of_one_tile_is_predicted_as_it_is():
    finder = Finder()
    image = drawn((50, 80), [(3, 4, 20, 30)])
    found = TiledPredictor(finder, 80).predict(image)
    plain = next(found for _, found in Finder().stream([(None, image)], 0.5))
    assert finder.seen == [(50, 80)]
    assert all(np.array_equal(vars(found)[name], value) for name, value in vars(plain).items())


def test_images_without_objects_and_in_any_order():
    """Catches tiles of two images that are mixed up when their batches end in another order."""

    class Backwards(Finder):
        def stream(self, images, threshold):
            yield from reversed(list(super().stream(images, threshold)))

    images = {"empty": drawn((60, 200), []), "one": drawn((200, 60), [(5, 70, 40, 190)])}
    found = dict(TiledPredictor(Backwards(), 64).stream(images.items()))
    assert len(found["empty"]) == 0 and found["empty"].boxes.shape == (0, 4)
    np.testing.assert_array_equal(found["one"].boxes, [(5, 70, 40, 190)])


def test_tiles_cover_the_image_and_overlap():
    edges = tile_edges((100, 1000), 300, 0.2)
    assert edges.tolist()[0] == [0, 0, 300, 100] and edges.tolist()[-1] == [700, 0, 1000, 100]
    assert np.all(edges[:-1, 2] - edges[1:, 0] >= 60)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (64, 0.95), (64, -0.1)])
def test_wrong_tiles(tile, overlap):
    with pytest.raises(DataError, match=r"tile is 0|overlap is"):
        TiledPredictor(SimpleNamespace(categories=(), pixel_range=()), tile, overlap)
