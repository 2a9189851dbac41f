"""Proposals of canvases: they hold every image, and pad little."""

import itertools
import json
import re

import numpy as np
import pytest
from coco_sample import COCO_SAMPLE, needs_coco_sample

from dn_detr_jax.config import base_config
from dn_detr_jax.data import canvases as canvases_module
from dn_detr_jax.data.canvases import (
    MULTIPLE,
    drawn_sizes,
    padding,
    propose,
    report,
    required_sizes,
)
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.placement import assign_canvases, check_canvases
from dn_detr_jax.data.plan import plan_eval
from dn_detr_jax.data.transforms import largest_sizes
from dn_detr_jax.errors import DataError


@pytest.fixture
def config():
    """Settings for small images, so that all sets of canvases can be tried."""
    config = base_config()
    config.data.update(eval_short_side=120, eval_max_long_side=180)
    config.data.augment.update(
        short_sides=(64, 96, 120), max_long_side=180, crop_resize=(60, 80), crop_size=(60, 90)
    )
    return config.data


def photographs(count, seed=0):
    """Draws sizes; most are wide, some upright and some square."""
    rng = np.random.default_rng(seed)
    aspects = rng.choice([1.5, 1.33, 1.0, 0.67, 1.77], count, p=[0.4, 0.3, 0.1, 0.15, 0.05])
    short = rng.integers(90, 160, count)
    high, wide = np.where(aspects < 1, 1 / aspects, 1), np.where(aspects < 1, 1, aspects)
    return np.stack([short * high, short * wide], 1).astype(np.int32)


@pytest.mark.parametrize("snap", [0.0, 0.1])
def test_proposals_hold_every_training_and_evaluation_image(config, snap):
    """Catches a search that drops the canvas which only a few images need."""
    training = np.concatenate([photographs(60), [[400, 100]]])
    validation = np.concatenate([photographs(40, seed=1), [[90, 300], [300, 90]]])
    drawn = drawn_sizes(training, config.augment, 2000)
    required = required_sizes(training, validation, config)
    proposals = propose(drawn, required, (1, 2, 3, 5), snap, 180)
    shares = []
    for count, proposal in zip((1, 2, 3, 5), proposals, strict=True):
        assert 1 <= len(proposal) <= count
        assert all(side % MULTIPLE == 0 for canvas in proposal for side in canvas)
        ids = np.arange(len(training))
        check_canvases(largest_sizes(training, config.augment), proposal, training, ids)
        plan_eval(
            sizes=validation,
            image_ids=np.arange(len(validation)),
            short_side=120,
            max_long_side=180,
            canvases=proposal,
            batch_size=4,
        )
        shares.append(padding(drawn, proposal, snap, 180))
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("snap", [0.0, 0.1])
def test_the_search_finds_the_best_set_of_few(config, snap):
    """Compares with all sets of three canvases that hold every image."""
    training = photographs(50)
    drawn = drawn_sizes(training, config.augment, 400)
    required = required_sizes(training, training, config)
    (proposal,) = propose(drawn, required, (3,), snap, 180)
    peak = max(h * w for h, w in proposal)
    sides = range(64, 193, MULTIPLE)
    best = 1.0
    for trial in itertools.combinations(itertools.product(sides, sides), 3):
        if max(h * w for h, w in trial) > peak or (assign_canvases(required, trial) < 0).any():
            continue
        best = min(best, padding(drawn, trial, snap, 180))
    assert padding(drawn, proposal, snap, 180) == pytest.approx(best, abs=1e-4)


def test_padding_by_hand():
    sizes = np.array([[50, 60], [60, 50], [30, 30]])
    canvases = ((64, 64), (32, 32))
    share = padding(sizes, canvases, 0.0, 100)
    assert share == pytest.approx(1 - (3000 + 3000 + 900) / (64 * 64 * 2 + 32 * 32))
    share = padding(sizes, canvases, 0.1, 100)
    assert share == pytest.approx(1 - (53 * 64 * 2 + 32 * 32) / (64 * 64 * 2 + 32 * 32))
    with pytest.raises(DataError, match="65 x 20 fits none"):
        padding(np.array([[30, 30], [65, 20]]), canvases, 0.0, 100)


def test_the_report_can_be_pasted_and_counts_objects(digits_config):
    """Catches a line that is not Python, or shares of other canvases."""
    train, validation = (
        open_dataset(digits_config.data, split).annotations for split in ("train", "validation")
    )
    digits_config.data.snap = 0.1
    counts = train.counts
    digits_config.data.max_objects = int(counts.max()) - 1
    text = report(train, validation, digits_config.data, counts=(1, 2), images=300)
    lines = text.splitlines()
    for snap in (0.0, 0.1):
        start = lines.index(f"config.data.snap = {snap}")
        shares, pasted = lines[start + 1 : start + 5 : 2], lines[start + 2 : start + 5 : 2]
        for proposed, line in zip(shares, pasted, strict=True):
            exec(line, {"config": digits_config})
            share = float(re.search(r"([\d.]+)% padding", proposed)[1]) / 100
            drawn = drawn_sizes(train.sizes, digits_config.data.augment, 300, seed=1)
            found = padding(drawn, digits_config.data.canvases, snap, 128)
            assert found == pytest.approx(share, abs=6e-4)
    assert f"config.data.max_objects = {counts.max()}" in lines
    more = (counts == counts.max()).sum()
    assert any(line.startswith(f"# {counts.max() - 1}: {more} of 96 ") for line in lines)


def sample_sizes(split):
    path = COCO_SAMPLE / "annotations" / f"instances_{split}2017.json"
    images = json.loads(path.read_text())["images"]
    return np.array([(image["height"], image["width"]) for image in images], np.int32)


@needs_coco_sample
@pytest.mark.parametrize(("snap", "most"), [(0.0, 0.22), (0.1, 0.085)])
def test_eight_canvases_pad_little_on_photographs(snap, most, monkeypatch):
    """Catches a worse search, on draws that the search did not see."""
    monkeypatch.setattr(canvases_module, "_ROUNDS", 1)
    monkeypatch.setattr(canvases_module, "_SEARCHED", 1000)
    config = base_config().data
    training, validation = sample_sizes("train"), sample_sizes("val")
    required = required_sizes(training, validation, config)
    drawn = drawn_sizes(training, config.augment, 4000)
    (proposal,) = propose(drawn, required, (8,), snap, 1333)
    held_out = drawn_sizes(training, config.augment, 8000, seed=1)
    assert padding(held_out, proposal, snap, 1333) <= most
    assert max(h * w for h, w in proposal) == 800 * 1344
