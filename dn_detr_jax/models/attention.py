"""Dot-product attention and the small networks around it, shared by encoder and decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax.models.initializers import torch_default_bias, torch_default_kernel, xavier_uniform

LAYER_NORM_EPS = 1e-5


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    num_heads: int,
    *,
    remat: bool = False,
) -> jax.Array:
    """Multi-head scaled dot-product attention; scores and softmax in float32.

    Args:
      query: [B, Q, heads * d], heads outermost.
      key: [B, K, heads * d]
      value: [B, K, heads * e]; e may differ from d.
      mask: bool, broadcasting to [B, Q, K], True: may attend. Every row needs one True.
      num_heads: heads.
      remat: compute the scores again in the backward pass in place of keeping them.

    Returns:
      [B, Q, heads * e] in the dtype of `value`.
    """

    def heads(x):
        return x.reshape(*x.shape[:2], num_heads, -1)

    def weighted_sum(query, key, value):
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = scores * (query.shape[-1] ** -0.5)
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    if remat:
        weighted_sum = jax.checkpoint(weighted_sum)
    out = weighted_sum(heads(query), heads(key), heads(value))
    return out.reshape(*out.shape[:2], -1)


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    num_heads: int,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """`attention` as one kernel, which keeps no scores for the backward pass.

    cuDNN takes even numbers of queries and keys, and heads whose queries, keys and values have one
    width, a multiple of 8. What is missing is added here, and taken off the result.

    Args:
      query: [B, Q, heads * d], heads outermost; bfloat16 or float16, as are the other two.
      key: [B, K, heads * d]
      value: [B, K, heads * e]; e may differ from d.
      mask: bool, broadcasting to [B, Q, K], True: may attend. Every row needs one True.
      num_heads: heads.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      [B, Q, heads * e] in the dtype of `value`.
    """
    (batch, queries, depth), keys = query.shape, key.shape[1]
    widths = depth // num_heads, value.shape[-1] // num_heads
    width = max(widths) + -max(widths) % 8

    def heads(x):
        x = x.reshape(*x.shape[:2], num_heads, -1)
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])))

    mask = jnp.broadcast_to(mask, (batch, queries, keys))
    mask = jnp.pad(mask, ((0, 0), (0, queries % 2), (0, 0)), mode="edge")
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, keys % 2)))  # nobody sees the added key
    out = jax.nn.dot_product_attention(
        heads(query),
        heads(key),
        heads(value),
        mask=mask[:, None],
        scale=widths[0] ** -0.5,
        implementation=implementation,
    )
    return out[:, :queries, :, : widths[1]].reshape(batch, queries, -1)


def layer_norm(name: str) -> nn.LayerNorm:
    """Layer norm with PyTorch's epsilon and the two-pass variance.

    In float32, which keeps the residual stream in float32 too, whatever the dtype of the compute:
    it is small, and its rounding would add up from layer to layer.
    """
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=jnp.float32, name=name
    )


class Linear(nn.Module):
    """Linear map with Xavier weights and PyTorch's default bias, unless told otherwise.

    Attributes:
      features: outputs.
      bias_init: of the bias; None: PyTorch's default.
      kernel_init: of the weights.
      dtype: of the compute.
      out_dtype: of the result; None: that of the compute.
    """

    features: int
    bias_init: nn.initializers.Initializer | None = None
    kernel_init: nn.initializers.Initializer = xavier_uniform
    dtype: jnp.dtype = jnp.float32
    out_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., K] to [..., features]."""
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
        bias_init = self.bias_init or torch_default_bias(fan_in)
        bias = self.param("bias", bias_init, (self.features,))
        out_dtype = self.out_dtype or self.dtype
        operands = x.astype(self.dtype), kernel.astype(self.dtype)
        y = jnp.matmul(*operands, preferred_element_type=out_dtype)
        # In float32 for the sake of the gradient, a sum over all tokens.
        return (y.astype(jnp.float32) + bias).astype(out_dtype)


class MLP(nn.Module):
    """Linear maps with ReLU between them.

    Attributes:
      features: outputs of each layer.
      kernel_init: of the weights.
      last_constant: start the last layer with weights 0 and this bias; None: like the others.
      dtype: of the compute.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = torch_default_kernel
    last_constant: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., K] to float32 [..., features[-1]]."""
        last = len(self.features) - 1
        for i, features in enumerate(self.features):
            init, bias_init = self.kernel_init, None
            if i == last and self.last_constant is not None:
                init = nn.initializers.zeros
                bias_init = nn.initializers.constant(self.last_constant)
            out_dtype = jnp.float32 if i == last else None
            x = Linear(features, bias_init, init, self.dtype, out_dtype, name=f"layer{i}")(x)
            if i < last:
                x = nn.relu(x)
        return x


class Activation(nn.Module):
    """ReLU, or PReLU with one learned slope (He et al., ICCV 2015)."""

    kind: str = "prelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps any shape."""
        if self.kind == "relu":
            return nn.relu(x)
        slope = self.param("slope", nn.initializers.constant(0.25), ())
        # In float32 for the sake of the slope's gradient, a sum over all tokens and channels.
        y = x.astype(jnp.float32)
        return jnp.where(y >= 0, y, slope * y).astype(x.dtype)


class FeedForward(nn.Module):
    """The two-layer network of a transformer layer, with its residual and layer norm.

    Attributes:
      hidden: width between the two layers.
      activation: "prelu" or "relu".
      dropout: rate.
      dtype: of the compute.
    """

    hidden: int
    activation: str
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        y = Linear(self.hidden, dtype=self.dtype, name="linear1")(x)
        y = Activation(self.activation, name="activation")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = Linear(x.shape[-1], dtype=self.dtype, name="linear2")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return layer_norm("norm")(x + y)
