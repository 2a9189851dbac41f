"""The transformer decoder of DAB-DETR: queries are anchor boxes, refined layer by layer.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022, sections 4.1
to 4.3. Each layer encodes the anchors that the layer before has refined (the gradient between
layers is stopped). It attends to the memory with content and position side by side in every head
(Meng et al., "Conditional DETR", ICCV 2021), and modulates the position part by the width and
height of the anchor.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dn_detr_jax.arrays import Array, Bool, Float
from dn_detr_jax.models.initializers import aligned_heads, xavier_uniform
from dn_detr_jax.models.layers import (
    MLP,
    FeedForward,
    LayerConfig,
    Linear,
    add_and_normalize,
    call_layer,
    layer_norm,
)
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.position import box_encoding
from dn_detr_jax.models.queries import Queries
from dn_detr_jax.models.refinement import refine


def interleave_heads(
    content: Float[Array, "B T D"], position: Float[Array, "B T D"], num_heads: int
) -> Float[jax.Array, "B T 2*D"]:
    """Puts content and position side by side in every head."""
    shape = (*content.shape[:2], num_heads, -1)
    both = jnp.concatenate([content.reshape(shape), position.reshape(shape)], axis=-1)
    return both.reshape(*content.shape[:2], -1)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward network.

    Attributes:
      config: shared by all layers.
      first: True for the first layer. Its content has no position yet, so its cross-attention adds
        the position to the content.
      position_gain: see `DenseDecoder`.
      level_attention: see `DenseDecoder`.
    """

    config: LayerConfig
    first: bool
    position_gain: float
    level_attention: bool = False

    def _project(self, x: Float[Array, "B T D"], name: str) -> Float[jax.Array, "B T D"]:
        return Linear(x.shape[-1], dtype=self.config.dtype, name=name)(x)

    def _project_position(self, x: Float[Array, "B T D"], name: str) -> Float[jax.Array, "B T D"]:
        if not self.position_gain:
            return self._project(x, name)
        init = aligned_heads(self.config.num_heads, self.position_gain)
        zeros = nn.initializers.zeros
        return Linear(x.shape[-1], zeros, init, self.config.dtype, name=name)(x)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        query_position: Float[Array, "B Q D"],
        query_sine: Float[Array, "B Q D"],
        mask: Bool[Array, "#B #Q Q"],
        memory: Levels,
        *,
        train: bool,
    ) -> Float[jax.Array, "B Q D"]:
        """Applies the layer.

        Args:
          x: content of the queries.
          query_position: learned encoding of the anchors.
          query_sine: modulated sine encoding of the anchors' centers.
          mask: of the self-attention, True: may attend.
          memory: from the encoder.
          train: dropout is active.
        """
        project, num_heads = self._project, self.config.num_heads
        residual = functools.partial(add_and_normalize, config=self.config, train=train)
        query = project(x, "self_query_content") + project(query_position, "self_query_position")
        key = project(x, "self_key_content") + project(query_position, "self_key_position")
        weights = self._level_weights(query, len(memory.shapes))
        y = self.config.attention_fn(query, key, project(x, "self_value"), mask, num_heads)
        x = residual(x, y, out="self_out", norm="self_norm")

        query, key = project(x, "cross_query_content"), project(memory.tokens, "cross_key_content")
        key_position = self._project_position(memory.position, "cross_key_position")
        if self.first:
            query = query + project(query_position, "cross_query_position")
            key = key + key_position
        query_sine = self._project_position(query_sine, "cross_query_sine")
        query = interleave_heads(query, query_sine, num_heads)
        key = interleave_heads(key, key_position, num_heads)
        value, valid = project(memory.tokens, "cross_value"), memory.valid[:, None, :]
        if weights is None:
            y = self.config.attention_fn(query, key, value, valid, num_heads)
        else:
            # The output projection is linear and the weights add up to 1: one projection of the sum
            # equals the sum of projections.
            ends = np.cumsum([height * width for height, width in memory.shapes])[:-1]
            of_levels = (jnp.split(x, ends, axis) for x, axis in ((key, 1), (value, 1), (valid, 2)))
            y = sum(
                self.config.attention_fn(query, *level, num_heads) * weight
                for *level, weight in zip(*of_levels, weights, strict=True)
            )
        x = residual(x, y, out="cross_out", norm="cross_norm")
        return FeedForward(self.config, name="feed_forward")(x, train=train)

    def _level_weights(
        self, query: Float[Array, "B Q D"], levels: int
    ) -> Float[jax.Array, "{levels} B Q 1"] | None:
        """Weighs the levels for each query; None without `level_attention`."""
        if not self.level_attention:
            return None
        dtype = self.config.dtype
        logits = Linear(levels, dtype=dtype, out_dtype=jnp.float32, name="level_attention")(query)
        return jnp.moveaxis(nn.softmax(logits, axis=-1), -1, 0)[..., None]


class DenseDecoder(nn.Module):
    """A stack of decoder layers with iterative refinement of the anchors.

    Attributes:
      num_layers: L.
      config: of the layers.
      temperature: of the sine encoding of the anchors.
      position_gain: if above 0, the cross-attention starts out at the place of the anchor: the
        position projections of query and key start equal, with this gain, and the scale of the
        position query starts at one. `temperature` must then be that of the feature maps. 0: Xavier
        weights everywhere, as published.
      level_attention: the cross-attention reads every level of the memory for itself; the results
        are summed with weights that the query decides. False: all tokens are one sequence.
      remat: recompute the layers in the backward pass, see `call_layer`.
    """

    num_layers: int
    config: LayerConfig
    temperature: float
    position_gain: float = 0.0
    level_attention: bool = False
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
        """Decodes queries.

        Args:
          queries: content, anchors and mask.
          memory: from the encoder.
          box_offsets: (layer, [B, Q, D]) -> float32 [B, Q, 4], which refines the anchors.
          train: dropout is active.

        Returns:
          See `refine`, with `look_forward`.
        """
        features = queries.content.shape[-1]
        mlp = functools.partial(MLP, kernel_init=xavier_uniform, dtype=self.config.dtype)
        position_head = mlp((features, features), name="reference_point_head")
        scale_start = 1.0 if self.position_gain else None
        query_scale = mlp((features, features), last_constant=scale_start, name="query_scale")
        size_head = mlp((features, 2), name="reference_size_head")

        def decode(i, x, reference):
            encoded = box_encoding(reference, features // 2, self.temperature)
            query_position = position_head(encoded)
            query_sine = encoded[..., :features]
            if i > 0:
                query_sine = query_sine * query_scale(x)
            # Width modulates the x half, height the y half, which comes first.
            size = jax.nn.sigmoid(size_head(x)) / reference[..., 2:]
            query_sine = query_sine * jnp.repeat(size[..., ::-1], features // 2, axis=-1)
            options = i == 0, self.position_gain, self.level_attention
            layer = DecoderLayer(self.config, *options, name=f"layer{i}")
            inputs = x, query_position, query_sine, queries.mask, memory
            x = call_layer(layer, *inputs, remat=self.remat, train=train)
            self.sow("intermediates", f"dec{i}", x)
            return x

        return refine(
            decode,
            queries,
            self.num_layers,
            box_offsets,
            norm=layer_norm("norm"),
            look_forward=True,
        )
