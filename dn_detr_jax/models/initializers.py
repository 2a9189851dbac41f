"""Weight initialisers of the official PyTorch code, for Flax kernels (input axes first)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

xavier_uniform = nn.initializers.xavier_uniform()

# PyTorch's default for linear and convolution weights: uniform within +-1 / sqrt(fan_in).
torch_default_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_bias(fan_in: int) -> nn.initializers.Initializer:
    """Uniform within +-1 / sqrt(fan_in), PyTorch's default for biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def packed_xavier_uniform(parts: int) -> nn.initializers.Initializer:
    """Xavier uniform of a kernel that PyTorch keeps packed with `parts - 1` others of its shape."""

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        bound = math.sqrt(6.0 / (shape[0] + parts * shape[1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def prior_probability_bias(probability: float = 0.01) -> nn.initializers.Initializer:
    """Constant bias whose sigmoid is `probability` (Lin et al., ICCV 2017, section 4.1)."""
    return nn.initializers.constant(-math.log((1.0 - probability) / probability))
