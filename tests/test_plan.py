"""The plan of an epoch: pure, complete, the same for all processes, and within its canvases."""

import numpy as np
import pytest

from dn_detr_jax.config import base_config
from dn_detr_jax.data.placement import assign_canvases, check_canvases, place
from dn_detr_jax.data.plan import (
    TrainPlan,
    choose_objects,
    plan_epoch,
    plan_eval,
    process_rows,
    steps_per_epoch,
)
from dn_detr_jax.data.transforms import largest_sizes, resized_sizes

CANVASES = ((64, 160), (160, 64), (96, 96))


def augment(**changes):
    config = base_config().data.augment
    config.update(
        {
            "short_sides": (40, 50, 60),
            "max_long_side": 150,
            "crop_resize": (40, 50),
            "crop_size": (30, 60),
            **changes,
        }
    )
    return config


@pytest.fixture
def sizes():
    return np.random.default_rng(0).integers(40, 200, (1003, 2)).astype(np.int32)


def plan(sizes, **changes):
    arguments = {
        "seed": 0,
        "epoch": 0,
        "sizes": sizes,
        "augment": augment(),
        "canvases": CANVASES,
        "batch_size": 16,
        **changes,
    }
    return plan_epoch(**arguments)


def assert_equal_plans(a, b):
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.canvas, b.canvas)
    for x, y in zip(a.geometry, b.geometry, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("canvases", [CANVASES, CANVASES[:2], ((160, 160),)])
def test_every_epoch_has_the_same_steps_and_no_image_twice(sizes, canvases):
    for epoch in range(4):
        result = plan(sizes, epoch=epoch, canvases=canvases)
        assert len(result) == 1003 // 16
        assert result.indices.shape == (62, 16)
        assert len(np.unique(result.indices)) == result.indices.size
        assert result.indices.min() >= 0 and result.indices.max() < 1003


@pytest.mark.parametrize("batch_size", [1, 7, 1003])
def test_batch_sizes_that_leave_nothing_or_much(sizes, batch_size):
    result = plan(sizes, batch_size=batch_size)
    assert result.indices.shape == (1003 // batch_size, batch_size)


@pytest.mark.parametrize("canvases", [CANVASES, CANVASES[:2]])
def test_every_image_fits_its_canvas(sizes, canvases):
    for epoch in range(3):
        result = plan(sizes, epoch=epoch, canvases=canvases)
        canvas = np.array(canvases)[result.canvas]
        assert (result.geometry.size <= canvas[:, None]).all()
        assert (result.geometry.size >= 1).all()


def published(result, settings):
    """Returns which images have a size that the published resize gives their crop."""
    crop, size = result.geometry.crop[..., 2:], result.geometry.size
    possible = [
        resized_sizes(crop, short, settings.max_long_side) for short in settings.short_sides
    ]
    return (size == np.stack(possible)).all(-1).any(0)


@pytest.mark.parametrize("crop", [0.0, 0.5])
@pytest.mark.parametrize("canvases", [CANVASES, CANVASES[:2]])
def test_without_snap_every_size_is_a_published_one(sizes, canvases, crop):
    """Catches leftovers that are squeezed into a joint batch."""
    settings = augment(crop=crop)
    for epoch in range(8):
        result = plan(sizes, epoch=epoch, canvases=canvases, augment=settings)
        as_published = published(result, settings)
        assert (~as_published).sum() == result.shrunken
        assert result.redrawn + result.shrunken <= 16
        assert result.shrunken == 0 or crop == 0.0


def test_a_joint_batch_needs_no_redraw_where_a_canvas_holds_all():
    """Catches batches that are redrawn although they would fit the larger canvas as they are."""
    upright = np.tile([[80, 60]], (12, 1))
    settings = augment(short_sides=(30, 40, 50, 60), crop=0.0)
    canvases = ((48, 32), (64, 48), (80, 60))
    for epoch in range(10):
        result = plan(upright, epoch=epoch, augment=settings, canvases=canvases, batch_size=6)
        assert result.redrawn == result.shrunken == 0
        assert published(result, settings).all()


def test_an_image_is_made_smaller_only_if_no_draw_fits():
    sizes = np.array([[60, 150], [150, 60]])
    settings = augment(short_sides=(60,), crop=0.0)
    result = plan(sizes, augment=settings, canvases=CANVASES[:2], batch_size=2)
    assert (result.redrawn, result.shrunken) == (0, 1)
    assert sorted(result.geometry.size[0].max(-1)) == [64, 150]
    settings = augment(short_sides=(20, 60), crop=0.0)
    for epoch in range(20):
        result = plan(sizes, epoch=epoch, augment=settings, canvases=CANVASES[:2], batch_size=2)
        assert result.shrunken == 0 and published(result, settings).all()


@pytest.mark.parametrize("count", [16, 20])
def test_few_images_on_several_canvases_are_all_seen_equally_often(count):
    """Covers many joint batches (16 images), and 4 of 20 images omitted, others each time."""
    rng = np.random.default_rng(1)
    sizes = np.where(rng.random((count, 1)) < 0.3, (150, 100), (100, 150)) + rng.integers(0, 9)
    canvases = ((64, 160), (160, 64), (96, 96), (64, 64))
    settings = augment(short_sides=(40, 50, 60), crop=0.0)
    seen = np.zeros(count)
    for epoch in range(100):
        result = plan(sizes, epoch=epoch, augment=settings, canvases=canvases, batch_size=8)
        assert len(result) == 2 and result.shrunken == 0
        assert published(result, settings).all()
        seen += np.bincount(result.indices.ravel(), minlength=count)
    expected = 100 * 16 / count
    # Five standard deviations of a binomial count.
    assert np.abs(seen - expected).max() <= 5 * np.sqrt(expected * (1 - 16 / count))


@pytest.mark.parametrize("snap", [0.0, 0.05, 0.1, 0.4])
def test_an_image_moves_only_so_far_and_touches_its_canvas(snap):
    """Compares each image with a plain search over the canvases."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 150, (2000, 2))
    canvases = (*CANVASES, (150, 150), (40, 60), (60, 40))
    canvas_of, placed = place(sizes, canvases, snap, 150)
    touched = 0
    for (h, w), c, size in zip(sizes.tolist(), canvas_of, placed, strict=True):
        best, factor = 0.0, 0.0
        for H, W in canvases:
            touching = min(H / h, W / w)
            if touching < 1 - snap:
                continue
            move = min(touching, 1 + snap, max(150 / max(h, w), 1.0))
            filled = move**2 * h * w / (H * W)
            nearer = filled > best - 1e-9 and abs(move - 1) < abs(factor - 1)
            if filled > best + 1e-9 or nearer:
                best, factor, where = filled, move, (H, W)
        assert canvases[c] == where
        assert np.abs(size - np.array([h, w]) * factor).max() <= 0.5
        assert (size <= where).all() and size.max() <= 150
        assert np.abs(size / (h, w) - 1).max() <= snap + 0.501 / min(h, w)
        touched += bool((size == where).any())
    if snap:
        assert touched > 2000 * snap
    else:
        np.testing.assert_array_equal(placed, sizes)
        np.testing.assert_array_equal(canvas_of, assign_canvases(sizes, canvases))


def test_snap_saves_padding_and_stays_within_its_limits(sizes):
    """Catches a plan that forgets `snap`, and one whose leftovers move further."""
    settings = augment()
    canvases = (*CANVASES, (48, 64), (64, 48), (64, 96), (96, 64), (48, 96), (96, 48))
    exact, moved = (plan(sizes, canvases=canvases, snap=snap) for snap in (0.0, 0.1))
    assert moved.padding < 0.8 * exact.padding
    possible = np.stack(
        [resized_sizes(moved.geometry.crop[..., 2:], s, 150) for s in settings.short_sides]
    )
    ratio = moved.geometry.size / possible
    slack = 0.5 / moved.geometry.size
    within = (ratio <= 1.1 + 1.2 * slack) & (ratio >= 0.9 - 1.2 * slack)
    assert moved.shrunken == 0 and within.all(-1).any(0).all()
    assert moved.geometry.size.max() <= 150
    # Draws that snapping does not change are equal.
    order, other = np.argsort(exact.indices.ravel()), np.argsort(moved.indices.ravel())
    common = np.intersect1d(exact.indices, moved.indices)
    assert len(common) == exact.indices.size
    flips = [r.geometry.flip.ravel()[o] for r, o in ((exact, order), (moved, other))]
    assert (flips[0] == flips[1]).mean() > 0.95


def test_padding_is_the_share_of_pixels_without_image(sizes):
    result = plan(sizes)
    area = sum(np.prod(CANVASES[c]) * 16 for c in result.canvas)
    assert result.padding == pytest.approx(1 - result.geometry.size.prod(-1).sum() / area)
    evaluation = eval_plan(sizes)
    real = sum(
        h * w
        for row, size in zip(evaluation.indices, evaluation.geometry.size, strict=True)
        for i, (h, w) in zip(row, size.tolist(), strict=True)
        if i >= 0
    )
    area = sum(np.prod(CANVASES[c]) * 16 for c in evaluation.canvas)
    assert evaluation.padding == pytest.approx(1 - real / area)


def test_a_plan_is_a_pure_function_and_differs_between_epochs_and_seeds(sizes):
    first = plan(sizes)
    np.random.seed(5)
    assert_equal_plans(first, plan(sizes))
    for other in (plan(sizes, epoch=1), plan(sizes, seed=1)):
        assert not np.array_equal(first.indices, other.indices)
        order, other_order = np.argsort(first.indices.ravel()), np.argsort(other.indices.ravel())
        common = min(len(order), len(other_order))
        flips = first.geometry.flip.ravel()[order][:common]
        other_flips = other.geometry.flip.ravel()[other_order][:common]
        assert 0.3 < (flips == other_flips).mean() < 0.7


def test_images_meet_others_in_the_next_epoch(sizes):
    """Catches frozen groups: with one canvas pairs are as likely as in a plain shuffle."""

    def pairs(result):
        rows = np.sort(result.indices, axis=1)
        return {(a, b) for row in rows.tolist() for i, a in enumerate(row) for b in row[:i]}

    first, second = pairs(plan(sizes, epoch=0)), pairs(plan(sizes, epoch=1))
    expected = len(first) * 15 / 1002  # by chance alone, if all had one shape
    assert len(first & second) < 4 * expected


def test_left_out_images_change(sizes):
    left = [set(range(1003)) - set(plan(sizes, epoch=e).indices.ravel()) for e in range(3)]
    assert all(len(some) == 1003 % 16 for some in left)
    assert left[0] != left[1] and left[1] != left[2]


def test_batches_of_one_canvas_are_spread_over_the_epoch(sizes):
    canvas = plan(sizes, canvases=CANVASES).canvas
    changes = (canvas[1:] != canvas[:-1]).mean()
    shares = np.bincount(canvas) / len(canvas)
    assert changes > 0.5 * (1 - (shares**2).sum())


def stream(sizes):
    return TrainPlan(
        seed=3,
        sizes=sizes,
        image_ids=np.arange(len(sizes)),
        augment=augment(),
        canvases=CANVASES,
        batch_size=16,
    )


def test_the_step_alone_resumes(sizes):
    walked, jumped = stream(sizes), stream(sizes)
    assert walked.steps_per_epoch == 62
    batches = [walked.batch(step) for step in range(4 * 62)]
    for step in (200, 61, 62, 0):
        a, b = batches[step], jumped.batch(step)
        assert a.epoch == b.epoch == step // 62 and a.canvas == b.canvas
        np.testing.assert_array_equal(a.indices, b.indices)
        for x, y in zip(a.geometry, b.geometry, strict=True):
            np.testing.assert_array_equal(x, y)


def test_next_canvases_are_those_of_the_next_steps(sizes):
    """Catches a wrong order of compilation, and a canvas of steps before or after the training."""
    plan = stream(sizes)
    end = plan.steps_per_epoch
    for start, stop in ((0, 3 * end), (end - 3, 3 * end), (end + 5, end + 9), (2 * end, 2 * end)):
        steps = range(start, min(stop, (start // end + 1) * end))
        expected = dict.fromkeys(plan.batch(step).canvas for step in steps)
        assert plan.next_canvases(start, stop) == list(expected)
    assert plan.next_canvases(9, 5) == []


@pytest.mark.parametrize("processes", [1, 2, 4, 16])
def test_processes_share_a_batch_without_gap_or_overlap(processes):
    rows = [np.arange(16)[process_rows(16, p, processes)] for p in range(processes)]
    assert {len(r) for r in rows} == {16 // processes}
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(16))


def test_the_smallest_canvas_that_fits_is_chosen():
    sizes = [(60, 150), (150, 60), (90, 90), (30, 30), (97, 97), (64, 160), (65, 160)]
    expected = [0, 1, 2, 2, -1, 0, -1]  # 96 x 96 has the least area
    assert assign_canvases(np.array(sizes), CANVASES).tolist() == expected


def test_canvases_that_are_too_small_are_refused_before_training():
    sizes = np.array([[100, 100], [60, 240]])
    bounds = largest_sizes(sizes, augment(crop=0.0))
    with pytest.raises(ValueError, match=r"image 78 of 60 x 240 .* \(64, 160\) would hold"):
        check_canvases(bounds, ((96, 96),), sizes, np.array([77, 78]))
    check_canvases(bounds, ((96, 96), (64, 160)), sizes, np.array([77, 78]))
    with pytest.raises(ValueError, match=r"data\.canvases.*-m dn_detr_jax canvases"):
        TrainPlan(
            seed=0,
            sizes=sizes,
            image_ids=np.array([77, 78]),
            augment=augment(),
            canvases=((96, 96),),
            batch_size=1,
        )


def test_too_few_images_for_a_batch():
    assert steps_per_epoch(16, 16) == 1
    with pytest.raises(ValueError, match=r"train\.batch_size is 16, but .* 15 images"):
        steps_per_epoch(15, 16)


def eval_plan(sizes, **changes):
    arguments = {
        "sizes": sizes,
        "image_ids": np.arange(len(sizes)),
        "short_side": 60,
        "max_long_side": 150,
        "canvases": CANVASES,
        "batch_size": 16,
        **changes,
    }
    return plan_eval(**arguments)


def test_evaluation_sees_every_image_once_in_order(sizes):
    result = eval_plan(sizes)
    real = result.indices[result.indices >= 0]
    np.testing.assert_array_equal(np.sort(real), np.arange(len(sizes)))
    for c in range(len(CANVASES)):
        rows = result.indices[result.canvas == c].ravel()
        padded = rows < 0
        assert padded.sum() < 16 and not padded[: len(rows) - padded.sum()].any()
        assert (np.diff(rows[~padded]) > 0).all()
    canvas = np.array(CANVASES)[result.canvas][:, None]
    assert (result.geometry.size <= canvas)[result.indices >= 0].all()
    assert not result.geometry.flip.any()


def test_evaluation_of_a_subset(sizes):
    result = eval_plan(sizes, subset=np.array([5, 900, 17]))
    assert sorted(result.indices[result.indices >= 0]) == [5, 17, 900]


def test_objects_beyond_the_slots_are_a_random_choice():
    assert choose_objects(0, 0, 0, 5, 8).tolist() == [0, 1, 2, 3, 4]
    kept = choose_objects(0, 1, 2, 30, 8)
    assert len(set(kept)) == 8 and kept.max() < 30 and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(kept, choose_objects(0, 1, 2, 30, 8))
    others = [choose_objects(*key, 30, 8) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert not any(np.array_equal(kept, other) for other in others)
    counts = np.bincount(np.concatenate([choose_objects(0, 0, i, 30, 8) for i in range(600)]))
    assert counts.min() > 110 and counts.max() < 210  # 160 expected of each
