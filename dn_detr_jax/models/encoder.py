"""The transformer encoder of DAB-DETR, which scales position encodings by the content.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022. Layers are
normalized after their residuals; there is no norm behind the last one.
"""

import jax
from flax import linen as nn

from dn_detr_jax.arrays import Float
from dn_detr_jax.models.initializers import packed_xavier_uniform, xavier_uniform
from dn_detr_jax.models.layers import MLP, FeedForward, LayerConfig, Linear, call_layer, layer_norm
from dn_detr_jax.models.levels import Levels


class EncoderLayer(nn.Module):
    """Self-attention over the tokens of an image, then the feed-forward network."""

    config: LayerConfig

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Float[jax.Array, "B T D"]:
        """Maps levels to new tokens; dropout is active if `train` is True."""
        config, x = self.config, levels.tokens

        def project(x, name):
            init = packed_xavier_uniform(3)
            return Linear(x.shape[-1], nn.initializers.zeros, init, config.dtype, name=name)(x)

        with_position = x + levels.position
        y = config.attention_fn(
            project(with_position, "query"),
            project(with_position, "key"),
            project(x, "value"),
            levels.valid[:, None, :],
            config.num_heads,
        )
        y = Linear(x.shape[-1], nn.initializers.zeros, dtype=config.dtype, name="out")(y)
        y = nn.Dropout(config.dropout)(y, deterministic=not train)
        x = layer_norm("attention_norm")(x + y)
        return FeedForward(config, name="feed_forward")(x, train=train)


class DenseEncoder(nn.Module):
    """A stack of encoder layers in which all tokens attend to all valid tokens.

    The layers share the network that scales the position encoding.

    Attributes:
      num_layers: number of layers.
      config: of the layers.
      remat: recompute the layers in the backward pass, see `call_layer`.
    """

    num_layers: int
    config: LayerConfig
    remat: bool = False

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Levels:
        """Returns the memory: the levels with encoded tokens. Padded tokens are not attended to."""
        x, dtype = levels.tokens, self.config.dtype
        features = x.shape[-1]
        scale = MLP((features, features), xavier_uniform, dtype=dtype, name="query_scale")
        for i in range(self.num_layers):
            layer = EncoderLayer(self.config, name=f"layer{i}")
            scaled = levels.replace(tokens=x, position=levels.position * scale(x))
            x = call_layer(layer, scaled, remat=self.remat, train=train)
            self.sow("intermediates", f"enc{i}", x)
        return levels.replace(tokens=x)
