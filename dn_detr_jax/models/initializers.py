"""Weight initializers of the official PyTorch code, for Flax kernels (input axes first)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

xavier_uniform = nn.initializers.xavier_uniform()

# PyTorch's default for linear and convolution weights: uniform within +-1 / sqrt(fan_in).
torch_default_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_bias(fan_in: int) -> nn.initializers.Initializer:
    """Draws uniformly within +-1 / sqrt(fan_in), PyTorch's default for biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def packed_xavier_uniform(parts: int) -> nn.initializers.Initializer:
    """Draws a kernel that PyTorch packs with `parts - 1` others of its shape: Xavier uniform."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        bound = math.sqrt(6.0 / (shape[0] + parts * shape[1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def aligned_heads(num_heads: int, gain: float) -> nn.initializers.Initializer:
    """Makes a permutation, times `gain`, that distributes a sine encoding over the heads.

    With two such projections, the score of a query and a key in every head is a sum of cosines of
    the distance between their positions, which is largest if they coincide. Sine and cosine of a
    frequency stay together; all heads get frequencies of every size.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        del key
        channel = jnp.arange(shape[0])
        pair, part = channel // 2, channel % 2
        target = (pair % num_heads) * (shape[1] // num_heads) + 2 * (pair // num_heads) + part
        return gain * jax.nn.one_hot(target, shape[1], dtype=dtype)

    return init


def prior_probability_bias(probability: float = 0.01) -> nn.initializers.Initializer:
    """Makes a constant bias whose sigmoid is `probability` (Lin et al., ICCV 2017, section 4.1)."""
    return nn.initializers.constant(-math.log((1.0 - probability) / probability))
