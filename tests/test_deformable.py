"""Deformable sampling against a plain loop over pixels; the reference data check its gradients."""

import numpy as np
import pytest
from fast_jit import fast_jit

from dn_detr_jax.models.deformable import sample_levels

SHAPES = ((3, 5), (2, 2), (1, 4))
BATCH, QUERIES, HEADS, FEATURES, POINTS = 2, 4, 2, 3, 2
TOKENS = sum(height * width for height, width in SHAPES)
sample = fast_jit(sample_levels, static_argnums=1)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(BATCH, TOKENS, HEADS, FEATURES)).astype(np.float32)
    shape = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = rng.uniform(-0.3, 1.3, (*shape, 2)).astype(np.float32)
    return value, locations, rng.normal(size=shape).astype(np.float32)


def read(level, x, y):
    """Bilinear value of a map [h, w, d] at x, y in [0, 1], zeros around it."""
    height, width = level.shape[:2]
    column, row = float(x) * width - 0.5, float(y) * height - 0.5
    total = np.zeros(level.shape[2])
    for i, j in np.ndindex(height, width):
        share = max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
        total += share * level[i, j].astype(np.float64)
    return total


def test_samples_equal_a_plain_loop():
    """Catches x and y or levels mixed up, pixel corners for centers, and wrapping at the border."""
    value, locations, weights = inputs()
    got = sample(value, SHAPES, locations, weights)
    want = np.zeros((BATCH, QUERIES, HEADS, FEATURES))
    starts = np.cumsum([0, *(height * width for height, width in SHAPES)])
    for b, q, h, k, p in np.ndindex(*weights.shape):
        level = value[b, starts[k] : starts[k + 1], h].reshape(*SHAPES[k], FEATURES)
        want[b, q, h] += weights[b, q, h, k, p] * read(level, *locations[b, q, h, k, p])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.reshape(BATCH, QUERIES, -1), atol=1e-5)


def test_far_outside_is_zero_whatever_the_values():
    """Catches numbers of pixels that overflow, and 0 * inf."""
    value, locations, weights = inputs()
    locations = np.where(locations < 0.5, np.float32(-1e12), np.float32(1e12))
    assert not np.any(sample(value, SHAPES, locations, weights))


def test_tokens_that_do_not_fit_the_levels():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match=r"22 tokens, but levels of .* pixels have 23"):
        sample_levels(value[:, 1:], SHAPES, locations, weights)
