"""The plan of an epoch: pure, complete, the same for everybody, and within its canvases."""

import numpy as np
import pytest

from dn_detr_jax.config import base_config
from dn_detr_jax.data.plan import (
    TrainPlan,
    assign_canvases,
    check_canvases,
    choose_objects,
    plan_epoch,
    plan_eval,
    process_rows,
    steps_per_epoch,
)
from dn_detr_jax.data.transforms import largest_sizes

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
        "shuffle_window": 200,
        **changes,
    }
    return plan_epoch(**arguments)


def assert_equal_plans(a, b):
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.canvas, b.canvas)
    for x, y in zip(a.geometry, b.geometry, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("window", [1, 50, 200, 5000])
@pytest.mark.parametrize("canvases", [CANVASES, CANVASES[:2], ((160, 160),)])
def test_every_epoch_has_the_same_steps_and_no_picture_twice(sizes, window, canvases):
    for epoch in range(4):
        result = plan(sizes, epoch=epoch, shuffle_window=window, canvases=canvases)
        assert len(result) == 1003 // 16
        assert result.indices.shape == (62, 16)
        assert len(np.unique(result.indices)) == result.indices.size
        assert result.indices.min() >= 0 and result.indices.max() < 1003


@pytest.mark.parametrize("batch_size", [1, 7, 1003])
def test_batch_sizes_that_leave_nothing_or_much(sizes, batch_size):
    result = plan(sizes, batch_size=batch_size)
    assert result.indices.shape == (1003 // batch_size, batch_size)


@pytest.mark.parametrize("canvases", [CANVASES, CANVASES[:2]])
def test_every_picture_fits_its_canvas(sizes, canvases):
    for epoch in range(3):
        result = plan(sizes, epoch=epoch, canvases=canvases)
        canvas = np.array(canvases)[result.canvas]
        assert (result.geometry.size <= canvas[:, None]).all()
        assert (result.geometry.size >= 1).all()


def test_only_what_is_left_at_the_end_is_made_smaller(sizes):
    """All but (canvases x batch size) pictures keep the size that was drawn for them."""
    result = plan(sizes, canvases=CANVASES[:2])
    size = result.geometry.size.reshape(-1, 2)
    crop = result.geometry.crop[..., 2:].reshape(-1, 2)
    as_drawn = np.isin(size.min(-1), (40, 50, 60)) | (size.max(-1) == 150)
    assert 0 < (~as_drawn).sum() <= 2 * 16
    # Made smaller, not stretched.
    aspect = size / size.max(-1, keepdims=True) - crop / crop.max(-1, keepdims=True)
    assert np.abs(aspect).max() < 0.06


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


def test_pictures_meet_others_in_the_next_epoch(sizes):
    """With one canvas as likely as in a plain shuffle, so the window must not freeze the groups."""

    def pairs(result):
        rows = np.sort(result.indices, axis=1)
        return {(a, b) for row in rows.tolist() for i, a in enumerate(row) for b in row[:i]}

    first, second = pairs(plan(sizes, epoch=0)), pairs(plan(sizes, epoch=1))
    expected = len(first) * 15 / 1002  # by chance alone, if all had one shape
    assert len(first & second) < 4 * expected


def test_left_out_pictures_change(sizes):
    left = [set(range(1003)) - set(plan(sizes, epoch=e).indices.ravel()) for e in range(3)]
    assert all(len(some) == 1003 % 16 for some in left)
    assert left[0] != left[1] and left[1] != left[2]


def test_batches_of_one_canvas_are_spread_over_the_epoch(sizes):
    canvas = plan(sizes, canvases=CANVASES).canvas
    changes = (canvas[1:] != canvas[:-1]).mean()
    shares = np.bincount(canvas) / len(canvas)
    assert changes > 0.5 * (1 - (shares**2).sum())


def test_the_step_alone_resumes(sizes):
    def stream():
        return TrainPlan(
            seed=3,
            sizes=sizes,
            image_ids=np.arange(len(sizes)),
            augment=augment(),
            canvases=CANVASES,
            batch_size=16,
            shuffle_window=200,
        )

    walked, jumped = stream(), stream()
    assert walked.steps_per_epoch == 62
    batches = [walked.batch(step) for step in range(4 * 62)]
    for step in (200, 61, 62, 0):
        a, b = batches[step], jumped.batch(step)
        assert a.epoch == b.epoch == step // 62 and a.canvas == b.canvas
        np.testing.assert_array_equal(a.indices, b.indices)
        for x, y in zip(a.geometry, b.geometry, strict=True):
            np.testing.assert_array_equal(x, y)


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
    with pytest.raises(ValueError, match=r"data\.canvases"):
        TrainPlan(
            seed=0,
            sizes=sizes,
            image_ids=np.array([77, 78]),
            augment=augment(),
            canvases=((96, 96),),
            batch_size=1,
            shuffle_window=10,
        )


def test_too_few_pictures_for_a_batch():
    assert steps_per_epoch(16, 16) == 1
    with pytest.raises(ValueError, match=r"train\.batch_size is 16, but .* 15 pictures"):
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


def test_evaluation_sees_every_picture_once_in_order(sizes):
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
