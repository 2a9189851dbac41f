"""The transformer encoder of DAB-DETR: position encodings scaled by the content.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022. Layers are
normalised after their residuals; there is no norm behind the last one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax.models.attention import MLP, FeedForward, Linear, attention, layer_norm
from dn_detr_jax.models.initializers import packed_xavier_uniform, xavier_uniform


class EncoderLayer(nn.Module):
    """Self-attention over the picture, then the feed-forward network.

    Attributes:
      num_heads: heads of the attention.
      ffn_dim: width of the feed-forward network.
      activation: "prelu" or "relu".
      dropout: rate.
      dtype: of the compute.
      attention_fn: `attention`, or another with its arguments.
    """

    num_heads: int
    ffn_dim: int
    activation: str
    dropout: float
    dtype: jnp.dtype
    attention_fn: Callable[..., jax.Array] = attention

    @nn.compact
    def __call__(
        self, x: jax.Array, position: jax.Array, valid: jax.Array, train: bool
    ) -> jax.Array:
        """Maps tokens [B, K, D] with position [B, K, D] and valid [B, K] to [B, K, D]."""

        def project(x, name):
            init = packed_xavier_uniform(3)
            return Linear(x.shape[-1], nn.initializers.zeros, init, self.dtype, name=name)(x)

        placed = x + position
        y = self.attention_fn(
            project(placed, "query"),
            project(placed, "key"),
            project(x, "value"),
            valid[:, None, :],
            self.num_heads,
        )
        y = Linear(x.shape[-1], nn.initializers.zeros, dtype=self.dtype, name="out")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        x = layer_norm("attention_norm")(x + y)
        return FeedForward(
            self.ffn_dim, self.activation, self.dropout, self.dtype, name="feed_forward"
        )(x, train=train)


class Encoder(nn.Module):
    """A stack of encoder layers that share the network which scales the position encoding.

    Attributes:
      num_layers: layers.
      num_heads: heads of the attention.
      ffn_dim: width of the feed-forward networks.
      activation: "prelu" or "relu".
      dropout: rate.
      dtype: of the compute.
      remat: compute layers again in the backward pass, see `config.model.remat`.
      attention_fn: `attention`, or another with its arguments.
    """

    num_layers: int
    num_heads: int
    ffn_dim: int
    activation: str
    dropout: float
    dtype: jnp.dtype
    remat: bool = False
    attention_fn: Callable[..., jax.Array] = attention

    @nn.compact
    def __call__(
        self, x: jax.Array, position: jax.Array, valid: jax.Array, *, train: bool
    ) -> jax.Array:
        """Encodes features.

        Args:
          x: [B, K, D] features of K = h * w pixels.
          position: [B, K, D] sine encoding.
          valid: bool [B, K]; padded tokens are not attended to.
          train: dropout on.

        Returns:
          [B, K, D], the memory. Without meaning at padded tokens.
        """
        features = x.shape[-1]
        scale = MLP((features, features), xavier_uniform, dtype=self.dtype, name="query_scale")
        layer = nn.remat(EncoderLayer, static_argnums=(4,)) if self.remat else EncoderLayer
        for i in range(self.num_layers):
            x = layer(
                self.num_heads,
                self.ffn_dim,
                self.activation,
                self.dropout,
                self.dtype,
                self.attention_fn,
                name=f"layer{i}",
            )(x, position * scale(x), valid, train)
            self.sow("intermediates", f"enc{i}", x)
        return x
