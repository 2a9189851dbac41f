"""Convolutions of each channel for itself."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel for itself, without bias, padded by a pixel.

    On CPUs it is a sum of nine shifted maps: XLA has no fast kernel for grouped convolutions there.
    The parameter is that of `nn.Conv`.

    Attributes:
      kernel_init: initializer of the kernel [3, 3, 1, C].
      stride: of rows and columns.
      dtype: of the compute.
    """

    kernel_init: nn.initializers.Initializer
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[jax.Array, "B h2 w2 C"]:
        """Convolves the map of every channel."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, 1, x.shape[-1]))
        return lax.platform_dependent(
            jnp.asarray(x, self.dtype),
            kernel.astype(self.dtype),
            cpu=functools.partial(shifted_sum, stride=self.stride),
            default=functools.partial(convolution, stride=self.stride),
        )


def convolution(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 1 C"], stride: int
) -> Float[jax.Array, "B h2 w2 C"]:
    """The convolution as the operation of XLA."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted_sum(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 1 C"], stride: int
) -> Float[jax.Array, "B h2 w2 C"]:
    """The convolution as a sum of maps in float32, each shifted and multiplied by channel."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    rows, columns = (stride * ((side - 1) // stride) + 1 for side in (height, width))
    total = jnp.zeros((), jnp.float32)
    for i in range(3):
        for j in range(3):
            end = (batch, i + rows, j + columns, channels)
            part = lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
            total = total + part * kernel[i, j, 0].astype(jnp.float32)
    return total.astype(x.dtype)
