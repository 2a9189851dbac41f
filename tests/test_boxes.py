"""Boxes against plain loops, at their boundaries, and with boxes of no area."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fast_jit import fast_jit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dn_detr_jax import boxes

iou = fast_jit(lambda a, b: boxes.iou(a[:, None], b[None]))
giou = fast_jit(lambda a, b: boxes.generalized_iou(a[:, None], b[None]))
giou_gradient = fast_jit(jax.grad(lambda a, b: jnp.sum(boxes.generalized_iou(a, b)), (0, 1)))

# Zero is drawn often: formulas break at sides of length 0 and at boxes that touch.
unit = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))


def box_arrays(count):
    def ordered(array):
        return np.concatenate([array.min(axis=1), array.max(axis=1)], axis=-1)

    return hnp.arrays(np.float32, (count, 2, 2), elements=unit).map(ordered)


@given(box_arrays(3), box_arrays(2))
def test_overlaps_equal_a_plain_loop(a, b):
    """Catches swapped corners, a wrong union or hull, and broadcasting along the wrong axis."""
    want = np.array([[oracle.iou_and_giou(x, y) for y in b] for x in a])
    np.testing.assert_allclose(iou(a, b), want[..., 0], atol=2e-5)
    np.testing.assert_allclose(giou(a, b), want[..., 1], atol=2e-5)


@given(box_arrays(3), box_arrays(3))
def test_overlaps_are_bounded_and_their_gradients_finite(a, b):
    """Catches a division by zero for boxes without area, which would end a training run."""
    overlap, generalized = iou(a, b), giou(a, b)
    assert np.all((overlap >= 0) & (overlap <= 1 + 1e-6))
    assert np.all((generalized >= -1 - 1e-6) & (generalized <= overlap + 1e-6))
    assert all(np.isfinite(g).all() for g in giou_gradient(a, b))


def test_known_overlaps():
    """Catches a mistake that loop and code share: the numbers are worked out by hand."""
    a = np.float32([[0, 0, 2, 2]])
    b = np.float32([[1, 1, 3, 3], [0, 0, 2, 2], [4, 0, 6, 2], [1, 1, 1, 1]])
    np.testing.assert_allclose(iou(a, b), [[1 / 7, 1, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(giou(a, b), [[1 / 7 - 2 / 9, 1, -1 / 3, 0]], atol=1e-5)


def test_formats_are_each_others_inverse():
    """Catches a factor of two and swapped axes."""
    box = np.float32([[0.5, 0.25, 0.5, 0.125]])
    np.testing.assert_array_equal(boxes.cxcywh_to_xyxy(box), [oracle.corners(box[0])])
    np.testing.assert_array_equal(boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(box)), box)
    np.testing.assert_array_equal(boxes.area(boxes.cxcywh_to_xyxy(box)), [0.0625])


@pytest.mark.parametrize("x, gradient", [(-0.1, 0.0), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.1, 0)])
def test_clamp_lets_gradient_through_on_the_boundary(x, gradient):
    """Catches `jnp.clip`, whose gradient there is a half; that of PyTorch is 1."""
    value, slope = jax.value_and_grad(lambda v: boxes.clamp(v, 0.0, 1.0))(x)
    assert (value, slope) == (pytest.approx(min(max(x, 0.0), 1.0)), gradient)


@given(st.floats(0.002, 0.998))
def test_inverse_sigmoid_inverts(x):
    """Catches a bound that changes values inside the range."""
    assert jax.nn.sigmoid(boxes.inverse_sigmoid(jnp.float32(x))) == pytest.approx(x, abs=1e-6)


def test_inverse_sigmoid_is_bounded():
    """Anchors at or beyond the border get the outermost logit, and no gradient beyond it."""
    bound = float(np.log(1 / boxes.LOGIT_EPS))
    x = jnp.float32([-3, 0, 1, 4])
    want = [-bound, -bound, bound, bound]
    np.testing.assert_allclose(boxes.inverse_sigmoid(x), want, rtol=1e-6)
    slope = jax.vmap(jax.grad(boxes.inverse_sigmoid))(x)
    assert np.isfinite(slope).all() and slope[0] == slope[3] == 0
