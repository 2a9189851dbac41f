"""The geometry of the augmentation is the same for boxes and pixels."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data.plan import plan_epoch
from dn_detr_jax.data.transforms import (
    Geometry,
    apply,
    draw_geometry,
    eval_geometry,
    largest_sizes,
    resized_sizes,
)


def published_size(height, width, size, max_size):
    """Computes the published resize with scalars."""
    low, high = min(height, width), max(height, width)
    if max_size is not None and high / low * size > max_size:
        size = round(max_size * low / high)
    if low == size:
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


@pytest.mark.parametrize("short_side,limit", [(480, 1333), (800, 1333), (800, None), (96, 128)])
def test_resize_follows_the_published_rule(short_side, limit):
    sizes = np.random.default_rng(0).integers(80, 700, (500, 2))
    expected = [published_size(h, w, short_side, limit) for h, w in sizes.tolist()]
    expected = np.array(expected)
    if limit is not None:  # the published rule may step over the limit for very long images
        expected = np.minimum(expected, limit)
    np.testing.assert_array_equal(resized_sizes(sizes, short_side, limit), expected)


def test_long_side_never_exceeds_its_limit():
    sizes = np.array([[2, 281], [281, 2], [1, 5000], [640, 480], [1, 1]])
    result = resized_sizes(sizes, 800, 1333)
    assert result.max() <= 1333 and result.min() >= 1


def small_augment(**changes):
    augment = base_config().data.augment
    values = {
        "flip": 0.5,
        "short_sides": (48, 64, 80),
        "max_long_side": 133,
        "crop": 0.5,
        "crop_resize": (40, 50, 60),
        "crop_size": (30, 60),
        **changes,
    }
    augment.update(values)
    return augment


def test_draws_stay_within_the_published_ranges():
    augment = small_augment()
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 200, (4000, 2))
    geometry = draw_geometry(rng, sizes, augment)
    cropped = (geometry.resized != sizes).any(-1) | (geometry.crop[:, 2:] != sizes).any(-1)
    assert 0.4 < cropped.mean() < 0.6 and 0.45 < geometry.flip.mean() < 0.55
    assert set(geometry.resized[cropped].min(-1)) == {40, 50, 60}
    corner, kept = geometry.crop[:, :2], geometry.crop[:, 2:]
    assert (corner >= 0).all() and (corner + kept <= geometry.resized).all()
    high = np.minimum(60, geometry.resized)
    assert (kept <= high)[cropped].all() and (kept >= 30)[cropped].all()
    assert (kept == high)[cropped].any() and (kept == 30)[cropped].any()
    assert geometry.size.max() <= 133
    assert set(geometry.size[geometry.size.max(-1) < 100].min(-1)) <= {48, 64, 80}


def test_probabilities_of_zero_and_one():
    sizes = np.random.default_rng(0).integers(60, 200, (300, 2))
    never = draw_geometry(np.random.default_rng(0), sizes, small_augment(flip=0.0, crop=0.0))
    assert not never.flip.any() and (never.resized == sizes).all()
    always = draw_geometry(np.random.default_rng(0), sizes, small_augment(flip=1.0, crop=1.0))
    assert always.flip.all() and set(always.resized.min(-1)) == {40, 50, 60}


@pytest.mark.parametrize("crop", [0.0, 0.5, 1.0])
def test_largest_sizes_bound_every_draw(crop):
    augment = small_augment(crop=crop)
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 300, (300, 2))
    bounds = largest_sizes(sizes, augment)
    for _ in range(60):
        drawn = draw_geometry(rng, sizes, augment).size
        assert (drawn[:, None] <= bounds).all(-1).any(-1).all()


def random_scene(rng, height, width, count=4):
    """Draws filled boxes of different gray levels on black; returns image and boxes."""
    image = np.zeros((height, width, 3), np.uint8)
    boxes = []
    for row in range(count):  # in stripes, so that none hides another
        top = row * height // count
        bottom = (row + 1) * height // count
        y = np.sort(rng.choice(np.arange(top, bottom + 1), 2, replace=False))
        x = np.sort(rng.choice(width + 1, 2, replace=False))
        boxes.append((x[0], y[0], x[1], y[1]))
        image[y[0] : y[1], x[0] : x[1]] = 60 * (row + 1)
    return image, np.array(boxes, np.float32), np.arange(count, dtype=np.int32)


def test_a_box_stays_around_its_object_through_every_chain():
    """Checks that drawn boxes match the transformed boxes to a pixel on each side."""
    rng = np.random.default_rng(2)
    augment = small_augment(short_sides=(150, 200), max_long_side=400)
    dropped = flipped = 0
    for _ in range(150):
        height, width = rng.integers(60, 160, 2)
        image, boxes, labels = random_scene(rng, height, width)
        geometry = draw_geometry(rng, np.array([[height, width]]), augment).at(0)
        _, new_boxes, new_labels = apply(image, boxes, labels, geometry)
        flipped += bool(geometry.flip)
        for label in labels:
            alone = np.zeros_like(image)
            x0, y0, x1, y1 = boxes[label].astype(int)
            alone[y0:y1, x0:x1] = 255
            result, _, _ = apply(alone, boxes, labels, geometry)
            assert result.shape == (*geometry.size, 3)
            ink = result[..., 0] > 127
            found = new_boxes[new_labels == label]
            if len(found) == 0:
                dropped += 1
                assert not ink.any() or min(ink.any(0).sum(), ink.any(1).sum()) <= 1
                continue
            if not ink.any():  # thinner than what half the intensity can show
                continue
            ys, xs = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
            drawn = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            scale = max(geometry.size / geometry.crop[2:] * geometry.resized / (height, width))
            np.testing.assert_allclose(found[0], drawn, atol=0.51 + 0.5 * scale)
    assert dropped > 10 and flipped > 30


def planned(sizes, epoch, snap):
    """Returns the geometry of each image in a plan on canvases of other shapes."""
    augment = small_augment(short_sides=(100, 120, 140), max_long_side=200)
    canvases = ((144, 208), (208, 144), (128, 128), (112, 160), (160, 112))
    result = plan_epoch(
        seed=epoch,
        epoch=epoch,
        sizes=sizes,
        augment=augment,
        canvases=canvases,
        batch_size=len(sizes) // 2,
        snap=snap,
    )
    order = np.argsort(result.indices.ravel())
    flat = Geometry(*(field.reshape(-1, *field.shape[2:]) for field in result.geometry))
    return flat.at(order), np.repeat(np.array(canvases)[result.canvas], len(sizes) // 2, 0)[order]


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), snap=st.sampled_from([0.0, 0.1, 0.3]))
def test_a_colored_rectangle_is_where_its_box_is_after_any_planned_chain(seed, snap):
    """Catches a scale of the plan that moves the image and not its boxes, or one side alone."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(80, 200, (8, 2))
    geometries, canvases = planned(sizes, seed, snap)
    color = np.array([30, 200, 90])
    for i, (height, width) in enumerate(sizes.tolist()):
        top, left = rng.integers(0, (height - 20, width - 20))
        bottom, right = rng.integers((top + 20, left + 20), (height + 1, width + 1))
        image = np.full((height, width, 3), (220, 40, 160), np.uint8)
        image[top:bottom, left:right] = color
        geometry = geometries.at(i)
        box = np.array([[left, top, right, bottom]], np.float32)
        result, boxes, labels = apply(image, box, np.array([3]), geometry)
        assert result.shape[:2] == tuple(geometry.size) and (geometry.size <= canvases[i]).all()
        near = (np.abs(result.astype(int) - color) < 95).all(-1)  # more than half the color
        if not len(boxes):
            assert not near.any()
            continue
        assert labels.tolist() == [3]
        assert (boxes[0, :2] >= 0).all() and (boxes[0, 2:] <= geometry.size[::-1]).all()
        extent = boxes[0, 2:] - boxes[0, :2]
        assert (extent > 0).all()
        if extent.min() < 2:  # a sliver at the border of the crop, mixed with its surroundings
            continue
        ys, xs = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        drawn = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
        scale = max(geometry.size / geometry.crop[2:] * geometry.resized / (height, width))
        np.testing.assert_allclose(boxes[0], drawn, atol=0.51 + 0.5 * scale)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_a_flip_is_the_mirror_image_of_any_chain(seed):
    """Two flips give the pixels and boxes without a flip."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(80, 200, (8, 2))
    geometry = planned(sizes, seed, 0.1)[0].at(0)
    image, boxes, labels = random_scene(rng, *sizes[0])
    straight = apply(image, boxes, labels, geometry._replace(flip=np.bool_(False)))
    flipped = apply(image, boxes, labels, geometry._replace(flip=np.bool_(True)))
    np.testing.assert_array_equal(flipped[0], straight[0][:, ::-1])
    width = geometry.size[1]
    left, top, right, bottom = straight[1].T
    mirrored = np.stack([width - right, top, width - left, bottom], axis=1)
    np.testing.assert_allclose(flipped[1], mirrored, atol=1e-4)
    np.testing.assert_array_equal(flipped[2], straight[2])
    again = eval_geometry(geometry.size[None], min(geometry.size), None).at(0)
    if (again.size == geometry.size).all():
        back = apply(*flipped, again._replace(flip=np.bool_(True)))
        np.testing.assert_array_equal(back[0], straight[0])
        np.testing.assert_allclose(back[1], straight[1], atol=1e-4)


def test_flipping_twice_changes_nothing():
    rng = np.random.default_rng(3)
    image, boxes, labels = random_scene(rng, 50, 70)
    geometry = eval_geometry(np.array([[50, 70]]), 50, 1000).at(0)._replace(flip=np.bool_(True))
    once = apply(image, boxes, labels, geometry)
    assert not np.array_equal(once[0], image)
    np.testing.assert_array_equal(once[0], image[:, ::-1])
    twice = apply(*once, geometry)
    for result, expected in zip(twice, (image, boxes, labels), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_an_image_of_the_right_size_is_not_touched():
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    boxes = np.array([[3, 4, 20, 30]], np.float32)
    geometry = eval_geometry(np.array([[40, 60]]), 40, 1000).at(0)
    result = apply(image, boxes, np.array([5]), geometry)
    np.testing.assert_array_equal(result[0], image)
    np.testing.assert_array_equal(result[1], boxes)


def test_boxes_are_cut_and_lost_with_the_crop():
    image = np.zeros((100, 100, 3), np.uint8)
    geometry = Geometry(
        resized=np.array([100, 100]),
        crop=np.array([20, 40, 60, 50]),
        size=np.array([120, 100]),
        flip=np.bool_(False),
    )
    boxes = np.array([[30, 10, 50, 40], [0, 0, 40, 100], [50, 30, 60, 50]], np.float32)
    _, new_boxes, labels = apply(image, boxes, np.array([7, 8, 9]), geometry)
    np.testing.assert_allclose(new_boxes, [[0, 0, 20, 40], [20, 20, 40, 60]])
    assert labels.tolist() == [7, 9]  # the second box only touches the crop


def test_an_image_without_objects():
    image = np.zeros((30, 40, 3), np.uint8)
    geometry = eval_geometry(np.array([[30, 40]]), 60, 100).at(0)
    _, boxes, labels = apply(image, np.zeros((0, 4)), np.zeros(0, np.int32), geometry)
    assert boxes.shape == (0, 4) and labels.shape == (0,)


def photograph(height=90, width=120):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("short_side", [60, 90, 150])
def test_resizing_is_pillows_antialiased_bilinear(short_side):
    image = photograph()
    geometry = eval_geometry(np.array([image.shape[:2]]), short_side, 1000).at(0)
    result, _, _ = apply(image, np.zeros((0, 4)), np.zeros(0), geometry)
    height, width = geometry.size
    expected = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1


def test_one_resampling_shows_what_the_two_published_ones_show():
    image = photograph()
    geometry = Geometry(
        resized=np.array([70, 93]),
        crop=np.array([10, 20, 50, 60]),
        size=np.array([75, 90]),
        flip=np.bool_(False),
    )
    result, _, _ = apply(image, np.zeros((0, 4)), np.zeros(0), geometry)
    steps = Image.fromarray(image).resize((93, 70), Image.Resampling.BILINEAR)
    steps = steps.crop((20, 10, 80, 60)).resize((90, 75), Image.Resampling.BILINEAR)
    shifted = np.roll(np.asarray(steps), 1, axis=1)
    difference = np.abs(result.astype(int) - np.asarray(steps)).mean()
    assert difference < 3 and difference < 0.5 * np.abs(result.astype(int) - shifted).mean()
