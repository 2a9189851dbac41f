"""Matrix products over the last axis, whose gradients compilers read without transposing tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*batch K"], kernel: Float[Array, "K N"], out_dtype: DTypeLike
) -> Float[jax.Array, "*batch N"]:
    """Multiplies the last axis by a matrix.

    The gradient of the kernel is `x^T g`, or `(g^T x)^T` as JAX derives it: compilers transpose the
    first factor in memory, so that it is the smaller one.

    Args:
      x: [..., K], of the kernel's dtype.
      kernel: [K, N].
      out_dtype: of the result; the products are added in it.
    """
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


def _forward(x, kernel, out_dtype):
    return matmul(x, kernel, out_dtype), (x, kernel)


def _backward(out_dtype, saved, gradient):
    x, kernel = saved
    tokens = tuple(range(x.ndim - 1))
    add = functools.partial(jax.lax.dot_general, preferred_element_type=out_dtype)
    of_x = add(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    over_tokens = (tokens, tokens), ((), ())
    if gradient.size < x.size:
        of_kernel = add(gradient, x, over_tokens).T
    else:
        of_kernel = add(x, gradient, over_tokens)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


matmul.defvjp(_forward, _backward)


class PointwiseConv(nn.Module):
    """A 1x1 convolution without bias, as a matrix product over the channels.

    XLA computes the gradient of the kernel of a 1x1 `nn.Conv` as a convolution over the whole map,
    on CPUs behind transposed copies of map and gradient. The parameter is that of `nn.Conv`.

    Attributes:
      features: number of output channels.
      kernel_init: initializer of the kernel [1, 1, C, features].
      stride: of rows and columns.
      dtype: of the compute.
    """

    features: int
    kernel_init: nn.initializers.Initializer
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w _"]) -> Float[jax.Array, "B h2 w2 {self.features}"]:
        """Maps the channels of every pixel, or of each `stride`-th one."""
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
        x = x[:, :: self.stride, :: self.stride]
        return matmul(x.astype(self.dtype), kernel[0, 0].astype(self.dtype), self.dtype)
