"""Layers with their own derivatives against the plain forms, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import fast_jit
from flax import linen as nn

from dn_detr_jax.models.attention import attention
from dn_detr_jax.models.depthwise import DepthwiseConv, convolution, convolution_on_cpu
from dn_detr_jax.models.products import PointwiseConv, matmul

INIT = nn.initializers.normal(0.1)
# Relative error of an array: sums in another order, and some roundings to bfloat16.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 3 * 2**-8}


def assert_same(got, want, dtype):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = np.float32(one), np.float32(other)
        assert np.linalg.norm(one - other) <= TOLERANCE[dtype] * np.linalg.norm(other)


def results(function, *arguments):
    """Returns values and gradients, those of the values' sines so that no two are equal."""

    def run(*arguments):
        value, backward = jax.vjp(function, *arguments)
        return value, backward(jnp.sin(value))

    return fast_jit(run)(*arguments)


@pytest.mark.parametrize(
    "dtype, out_dtype",
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)],
)
@pytest.mark.parametrize("features", [2, 7])  # the gradient is transposed, or x
def test_product_equals_the_plain_one(dtype, out_dtype, features):
    """Catches a transposed gradient, and one that is added or returned in another dtype."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 8)), dtype)
    kernel = jnp.asarray(rng.normal(size=(8, features)), dtype)

    def plain(x, kernel):
        return jnp.matmul(x, kernel, preferred_element_type=out_dtype)

    got = results(lambda x, kernel: matmul(x, kernel, out_dtype), x, kernel)
    assert_same(got, results(plain, x, kernel), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_equals_the_general_one(dtype, stride):
    """Catches strides that begin elsewhere at odd sizes, and a parameter of another name, shape or
    start, with which checkpoints and seeds would lose their meaning.
    """
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 8)).astype(np.float32)
    ours = PointwiseConv(6, INIT, stride, dtype)
    general = nn.Conv(6, (1, 1), stride, padding=0, use_bias=False, kernel_init=INIT, dtype=dtype)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, general.init(jax.random.key(1), x))
    assert_same(results(ours.apply, params, x), results(general.apply, params, x), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_equals_the_general_one(dtype, stride):
    """Catches shifts in the wrong direction, strides that begin elsewhere at odd or even sizes, and
    another parameter.
    """
    x = np.random.default_rng(0).normal(size=(2, 5, 8, 6)).astype(np.float32)
    ours = DepthwiseConv(INIT, stride, dtype)
    general = nn.Conv(
        6, (3, 3), stride, 1, feature_group_count=6, use_bias=False, kernel_init=INIT, dtype=dtype
    )
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, general.init(jax.random.key(1), x))
    assert_same(results(ours.apply, params, x), results(general.apply, params, x), dtype)
    arguments = jnp.asarray(x, dtype), params["params"]["kernel"].astype(dtype)
    forms = [functools.partial(form, stride=stride) for form in (convolution, convolution_on_cpu)]
    assert_same(results(forms[0], *arguments), results(forms[1], *arguments), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("mask_shape", [(2, 1, 7), (1, 5, 7)])
def test_attention_equals_the_plain_one(dtype, remat, mask_shape):
    """Catches a weight that is divided by its sum twice or never, a gradient that masked keys
    get, and one that lacks the part of the sum.
    """
    rng = np.random.default_rng(0)
    sizes = (5, 12), (7, 12), (7, 8)
    arrays = [jnp.asarray(rng.normal(size=(2, *size)), dtype) for size in sizes]
    mask = rng.random(mask_shape) < 0.6
    mask[..., 3] = True

    def plain(query, key, value):
        query, key, value = (x.reshape(*x.shape[:2], 2, -1) for x in (query, key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None], scores / 6**0.5, -1e30)
        weights = jax.nn.softmax(scores).astype(dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 5, 8)

    def ours(query, key, value):
        return attention(query, key, value, mask, 2, remat=remat)

    assert_same(results(ours, *arrays), results(plain, *arrays), dtype)
