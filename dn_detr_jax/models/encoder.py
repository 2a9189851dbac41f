"""The transformer encoders of DAB-DETR and of Deformable DETR.

That of DAB-DETR scales position encodings by the content (Liu et al., "DAB-DETR: Dynamic Anchor
Boxes are Better Queries for DETR", ICLR 2022); that of Deformable DETR reads a few points of each
level (Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR
2021). Layers are normalized after their residuals; there is no norm behind the last one.
"""

import jax
from flax import linen as nn

from dn_detr_jax.arrays import Array, Float
from dn_detr_jax.models.deformable_attention import deformable_attention
from dn_detr_jax.models.initializers import xavier_uniform
from dn_detr_jax.models.layers import (
    MLP,
    FeedForward,
    LayerConfig,
    add_and_normalize,
    call_layer,
    project_and_attend,
)
from dn_detr_jax.models.levels import Levels


class EncoderLayer(nn.Module):
    """Self-attention over the tokens of an image, then the feed-forward network."""

    config: LayerConfig

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Float[jax.Array, "B T D"]:
        """Maps levels to new tokens; dropout is active if `train` is True."""
        config, x = self.config, levels.tokens
        query = key = x + levels.position
        y = project_and_attend(query, key, x, levels.valid[:, None, :], config)
        x = add_and_normalize(x, y, config, out="out", norm="attention_norm", train=train)
        return FeedForward(config, name="feed_forward")(x, train=train)


class DenseEncoder(nn.Module):
    """A stack of encoder layers in which all tokens attend to all valid tokens.

    The layers share the network that scales the position encoding, if there is one.

    Attributes:
      num_layers: number of layers.
      config: of the layers.
      remat: recompute the layers in the backward pass, see `call_layer`.
      scale_position: the content scales the position encoding, as in DAB-DETR; False: as in DETR.
    """

    num_layers: int
    config: LayerConfig
    remat: bool = False
    scale_position: bool = True

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Levels:
        """Returns the memory: the levels with encoded tokens. Padded tokens are not attended to."""
        x, dtype = levels.tokens, self.config.dtype
        features = x.shape[-1]
        scale = None
        if self.scale_position:
            scale = MLP((features, features), xavier_uniform, dtype=dtype, name="query_scale")
        for i in range(self.num_layers):
            layer = EncoderLayer(self.config, name=f"layer{i}")
            position = levels.position if scale is None else levels.position * scale(x)
            scaled = levels.replace(tokens=x, position=position)
            x = call_layer(layer, scaled, remat=self.remat, train=train)
            self.sow("intermediates", f"enc{i}", x)
        return levels.replace(tokens=x)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all levels, then the feed-forward network."""

    config: LayerConfig
    num_points: int
    point_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, levels: Levels, references: Float[Array, "B T levels 2"], *, train: bool
    ) -> Float[jax.Array, "B T D"]:
        """Maps levels to new tokens; dropout is active if `train` is True."""
        config, x = self.config, levels.tokens
        query = x + levels.position
        y = deformable_attention(
            query,
            references,
            levels,
            config,
            num_points=self.num_points,
            point_init=self.point_init,
        )
        x = add_and_normalize(x, y, config, out="out", norm="attention_norm", train=train)
        return FeedForward(config, name="feed_forward")(x, train=train)


class DeformableEncoder(nn.Module):
    """A stack of encoder layers in which every token reads a few points around its own place.

    Attributes:
      num_layers: number of layers.
      config: of the layers.
      num_points: that a head reads of each level.
      remat: recompute the layers in the backward pass, see `call_layer`.
      point_init: see `deformable_attention`.
    """

    num_layers: int
    config: LayerConfig
    num_points: int = 4
    remat: bool = False
    point_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Levels:
        """Returns the memory: the levels with encoded tokens. Padded tokens have no value."""
        references = levels.references()
        for i in range(self.num_layers):
            options = self.config, self.num_points, self.point_init
            layer = DeformableEncoderLayer(*options, name=f"layer{i}")
            x = call_layer(layer, levels, references, remat=self.remat, train=train)
            self.sow("intermediates", f"enc{i}", x)
            levels = levels.replace(tokens=x)
        return levels
