"""The transformer decoder of DN-Deformable-DETR and DINO: anchor boxes with deformable attention.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
with queries as in Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR
2022: a layer reads points within the anchor box that the layer before has refined.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax.arrays import Array, Bool, Float
from dn_detr_jax.models.deformable_attention import deformable_attention
from dn_detr_jax.models.initializers import xavier_uniform
from dn_detr_jax.models.layers import (
    MLP,
    FeedForward,
    LayerConfig,
    add_and_normalize,
    call_layer,
    layer_norm,
    project_and_attend,
)
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.position import box_encoding
from dn_detr_jax.models.queries import Queries
from dn_detr_jax.models.refinement import refine


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward network."""

    config: LayerConfig
    num_points: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        references: Float[Array, "B Q levels 4"],
        mask: Bool[Array, "#B #Q Q"],
        memory: Levels,
        *,
        train: bool,
    ) -> Float[jax.Array, "B Q D"]:
        """Applies the layer.

        Args:
          x: content of the queries.
          query_position: learned encoding of the anchors.
          references: anchors relative to the whole size of each level.
          mask: of the self-attention, True: may attend.
          memory: from the encoder.
          train: dropout is active.
        """
        config = self.config
        residual = functools.partial(add_and_normalize, config=config, train=train)
        query, key = x + query_position, x + query_position
        y = project_and_attend(query, key, x, mask, config, prefix="self_")
        x = residual(x, y, out="self_out", norm="self_norm")
        y = deformable_attention(
            x + query_position,
            references,
            memory,
            config,
            num_points=self.num_points,
            prefix="cross_",
        )
        x = residual(x, y, out="cross_out", norm="cross_norm")
        return FeedForward(config, name="feed_forward")(x, train=train)


class DeformableDecoder(nn.Module):
    """A stack of decoder layers with iterative refinement of the anchors.

    Attributes:
      num_layers: L.
      config: of the layers.
      num_points: that a head reads of each level.
      temperature: of the sine encoding of the anchors.
      query_scale: the encoding of the anchors is scaled by the content, from the second layer on.
      norm: one layer norm for the states of all layers; False: none.
      look_forward: see `refine`.
      mask_padding: anchors are encoded relative to the valid part of the image; False: relative to
        the first level with its padding, as in PyTorch.
      remat: recompute the layers in the backward pass, see `call_layer`.
    """

    num_layers: int
    config: LayerConfig
    num_points: int = 4
    temperature: float = 10000.0
    query_scale: bool = True
    norm: bool = False
    look_forward: bool = False
    mask_padding: bool = True
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        queries: Queries,
        memory: Levels,
        box_offsets: Callable[[int, jax.Array], jax.Array],
        *,
        train: bool,
    ) -> tuple[Float[jax.Array, "L B Q D"], Float[jax.Array, "L B Q 4"]]:
        """Decodes queries, see `DenseDecoder`; returns what `refine` does."""
        features = queries.content.shape[-1]
        mlp = functools.partial(MLP, (features, features), xavier_uniform, dtype=self.config.dtype)
        position_head = mlp(name="reference_point_head")
        scale = mlp(name="query_scale") if self.query_scale else None
        # A box is relative to the valid part of the image, sampling to the whole of a level.
        ratios = jnp.tile(memory.ratios, 2)[:, None]

        def decode(i, x, reference):
            references = reference[:, :, None] * ratios
            encoded = reference if self.mask_padding else references[:, :, 0]
            encoded = box_encoding(encoded, features // 2, self.temperature)
            query_position = position_head(encoded)
            if scale is not None and i > 0:
                query_position = query_position * scale(x)
            layer = DeformableDecoderLayer(self.config, self.num_points, name=f"layer{i}")
            inputs = x, query_position, references, queries.mask, memory
            x = call_layer(layer, *inputs, remat=self.remat, train=train)
            self.sow("intermediates", f"dec{i}", x)
            return x

        return refine(
            decode,
            queries,
            self.num_layers,
            box_offsets,
            norm=layer_norm("norm") if self.norm else None,
            look_forward=self.look_forward,
        )
