"""Convolutions of each channel for itself."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float

SHIFTS = tuple((i, j) for i in range(3) for j in range(3))


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
            cpu=functools.partial(convolution_on_cpu, stride=self.stride),
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution_on_cpu(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 1 C"], stride: int
) -> Float[jax.Array, "B h2 w2 C"]:
    """The convolution as a sum of nine shifted maps in float32."""
    return shifted_sum(_padded(x), kernel, stride).astype(x.dtype)


def shifted_sum(
    padded: Float[Array, "B h w C"], kernel: Float[Array, "3 3 1 C"], stride: int
) -> Float[jax.Array, "B h2 w2 C"]:
    """Sums the windows of a map in float32, each multiplied by the kernel's value by channel."""
    batch, height, width, channels = padded.shape
    rows, columns = (stride * ((side - 3) // stride) + 1 for side in (height, width))
    total = jnp.zeros((), jnp.float32)
    for i, j in SHIFTS:
        end = (batch, i + rows, j + columns, channels)
        part = lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
        total = total + part * kernel[i, j, 0].astype(jnp.float32)
    return total


def gradient_of_input(
    gradient: Float[Array, "B h2 w2 C"],
    kernel: Float[Array, "3 3 1 C"],
    stride: int,
    shape: tuple[int, ...],
) -> Float[jax.Array, "B h w C"]:
    """Gradient of the map in float32, from that of the convolved one, as windows of one padded map.

    The gradient that JAX derives is a sum of nine padded maps. XLA on CPUs fuses all of it with
    what comes next, and that takes ten times as long and more.

    Args:
      gradient: of the convolved map, float32.
      kernel: of the convolution.
      stride: of the convolution.
      shape: (B, h, w, C) of the map.
    """
    sides = zip(shape[1:3], gradient.shape[1:3], strict=True)
    spread = [(1, side - stride * (count - 1), stride - 1) for side, count in sides]
    padding = ((0, 0, 0), *spread, (0, 0, 0))
    return shifted_sum(lax.pad(gradient, jnp.float32(0), padding), kernel[::-1, ::-1], 1)


def gradient_of_kernel(
    x: Float[Array, "B h w C"], gradient: Float[Array, "B h2 w2 C"], stride: int
) -> Float[jax.Array, "3 3 1 C"]:
    """Gradient of the kernel in float32, from that of the convolved map, float32 too.

    Rows are added up element by element, and the sum over columns comes last: XLA on CPUs is
    several times slower at a sum over batch, rows and columns at once.
    """
    batch, rows, columns, channels = gradient.shape
    padded = _padded(x)
    width = padded.shape[2]

    def add_row(sums, index):
        image, row = index // rows, index % rows
        start = (image, row, 0, 0)
        of_row = lax.dynamic_slice(gradient, start, (1, 1, columns, channels))[0, 0]
        above = (image, stride * row, 0, 0)
        window = lax.dynamic_slice(padded, above, (1, 3, width, channels))[0]
        added = []
        for part, (i, j) in zip(sums, SHIFTS, strict=True):
            end = (j + stride * (columns - 1) + 1, channels)
            added.append(part + of_row * lax.slice(window[i], (j, 0), end, (stride, 1)))
        return tuple(added), None

    zeros = tuple(jnp.zeros((columns, channels), jnp.float32) for _ in SHIFTS)
    sums, _ = lax.scan(add_row, zeros, jnp.arange(batch * rows))
    return jnp.stack([part.sum(0) for part in sums]).reshape(3, 3, 1, channels)


def _padded(x: Float[Array, "B h w C"]) -> Float[jax.Array, "B h3 w3 C"]:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)


def _forward(x, kernel, stride):
    return convolution_on_cpu(x, kernel, stride), (x, kernel)


def _backward(stride, saved, gradient):
    x, kernel = saved
    gradient = gradient.astype(jnp.float32)
    of_input = gradient_of_input(gradient, kernel, stride, x.shape)
    of_kernel = gradient_of_kernel(x, gradient, stride)
    return of_input.astype(x.dtype), of_kernel.astype(kernel.dtype)


convolution_on_cpu.defvjp(_forward, _backward)
