"""Linear maps, small networks and norms, shared by encoder, decoder and heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float
from dn_detr_jax.models.attention import attention
from dn_detr_jax.models.initializers import (
    packed_xavier_uniform,
    torch_default_bias,
    torch_default_kernel,
    xavier_uniform,
)
from dn_detr_jax.models.products import matmul

LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Settings that all layers of encoder and decoder share.

    Attributes:
      num_heads: heads of every attention.
      ffn_dim: width of the feed-forward networks.
      activation: "prelu" or "relu", in the feed-forward networks.
      dropout: rate.
      dtype: of the compute. Layer norms, boxes and the residual stream stay in float32.
      attention_fn: `attention`, or a function with the same arguments and result.
      sampling_part: see `deformable.sample_levels`.
    """

    num_heads: int
    ffn_dim: int
    activation: str = "prelu"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention_fn: Callable[..., jax.Array] = attention
    sampling_part: int | None = None


def call_layer(layer: nn.Module, *inputs: Any, remat: bool, **static: Any) -> jax.Array:
    """Calls a layer, and recomputes it in the backward pass if `remat` is True.

    Args:
      layer: module bound to its parent.
      *inputs: arrays, or trees of arrays. With `remat` they are all that the forward pass keeps.
      remat: recompute the layer's intermediate results in place of storing them.
      **static: keyword arguments of the layer that are Python values, such as `train`.
    """
    if not remat:
        return layer(*inputs, **static)
    return nn.remat(lambda layer, *inputs: layer(*inputs, **static))(layer, *inputs)


def layer_norm(name: str) -> nn.LayerNorm:
    """Makes a layer norm with PyTorch's epsilon and the two-pass variance.

    It computes in float32 for every dtype of the compute. The residual stream thus stays in
    float32 too: it is small, and its rounding errors would add up from layer to layer.
    """
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=jnp.float32, name=name
    )


class Linear(nn.Module):
    """A linear map, by default with Xavier weights and PyTorch's default bias.

    Attributes:
      features: number of outputs.
      bias_init: initializer of the bias; None: PyTorch's default.
      kernel_init: initializer of the weights.
      dtype: of the compute.
      out_dtype: of the result; None: `dtype`.
    """

    features: int
    bias_init: nn.initializers.Initializer | None = None
    kernel_init: nn.initializers.Initializer = xavier_uniform
    dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch _"]) -> Float[jax.Array, "*batch {self.features}"]:
        """Maps the last axis."""
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
        bias_init = self.bias_init or torch_default_bias(fan_in)
        bias = self.param("bias", bias_init, (self.features,))
        out_dtype = self.out_dtype or self.dtype
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype), out_dtype)
        # In float32, since the gradient is a sum over all tokens.
        return (y.astype(jnp.float32) + bias).astype(out_dtype)


class MLP(nn.Module):
    """Linear maps with ReLU between them.

    Attributes:
      features: number of outputs of each layer.
      kernel_init: initializer of the weights.
      last_constant: if given, the last layer starts with weights 0 and this bias, one number or one
        for each output.
      dtype: of the compute.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = torch_default_kernel
    last_constant: float | tuple[float, ...] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch _"]
    ) -> Float[jax.Array, "*batch {self.features[-1]}"]:
        """Maps the last axis; the result is float32."""
        last = len(self.features) - 1
        for i, features in enumerate(self.features):
            init, bias_init = self.kernel_init, None
            if i == last and self.last_constant is not None:
                init = nn.initializers.zeros
                bias_init = nn.initializers.constant(jnp.array(self.last_constant))
            out_dtype = jnp.float32 if i == last else None
            x = Linear(features, bias_init, init, self.dtype, out_dtype, name=f"layer{i}")(x)
            if i < last:
                x = nn.relu(x)
        return x


def project_and_attend(
    query: Float[Array, "B Q D"],
    key: Float[Array, "B T D"],
    value: Float[Array, "B T D"],
    mask: Bool[Array, "#B #Q T"],
    config: LayerConfig,
    *,
    prefix: str = "",
) -> Float[jax.Array, "B Q D"]:
    """Projects queries, keys and values, and attends with them.

    The weights start like PyTorch's, which has the three projections in one matrix. Call it in a
    compact method: its linear maps become submodules of the caller. The output projection is left
    to `add_and_normalize`.

    Args:
      query: [B, Q, D].
      key: [B, T, D].
      value: [B, T, D].
      mask: True: may attend.
      config: of the layer.
      prefix: of the names `query`, `key` and `value`.
    """

    def project(x, name):
        zeros, init = nn.initializers.zeros, packed_xavier_uniform(3)
        return Linear(x.shape[-1], zeros, init, config.dtype, name=prefix + name)(x)

    projected = project(query, "query"), project(key, "key"), project(value, "value")
    return config.attention_fn(*projected, mask, config.num_heads)


def add_and_normalize(
    x: Float[Array, "B Q D"],
    y: Float[Array, "B Q D"],
    config: LayerConfig,
    *,
    out: str,
    norm: str,
    train: bool,
) -> Float[jax.Array, "B Q D"]:
    """Projects the result of an attention, adds it to the residual stream and normalizes the sum.

    Call it in a compact method: its modules become submodules of the caller.

    Args:
      x: residual stream.
      y: result of the attention.
      config: of the layer.
      out: name of the output projection.
      norm: name of the layer norm.
      train: dropout is active.
    """
    y = Linear(x.shape[-1], nn.initializers.zeros, dtype=config.dtype, name=out)(y)
    y = nn.Dropout(config.dropout)(y, deterministic=not train)
    return layer_norm(norm)(x + y)


class Activation(nn.Module):
    """ReLU, or PReLU with one learned slope (He et al., ICCV 2015)."""

    kind: str = "prelu"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
        """Applies the function to every element."""
        if self.kind == "relu":
            return nn.relu(x)
        slope = self.param("slope", nn.initializers.constant(0.25), ())
        # In float32, since the slope's gradient is a sum over all tokens and channels.
        y = x.astype(jnp.float32)
        return jnp.where(y >= 0, y, slope * y).astype(x.dtype)


class FeedForward(nn.Module):
    """The two-layer network of a transformer layer, with its residual and layer norm."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"], *, train: bool) -> Float[jax.Array, "*batch D"]:
        """Maps the last axis; dropout is active if `train` is True."""
        config = self.config
        y = Linear(config.ffn_dim, dtype=config.dtype, name="linear1")(x)
        y = Activation(config.activation, name="activation")(y)
        y = nn.Dropout(config.dropout)(y, deterministic=not train)
        y = Linear(x.shape[-1], dtype=config.dtype, name="linear2")(y)
        y = nn.Dropout(config.dropout)(y, deterministic=not train)
        return layer_norm("norm")(x + y)
