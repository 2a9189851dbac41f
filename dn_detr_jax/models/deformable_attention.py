"""Deformable attention: queries read a few learned points of every feature level.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
section 4.1. `deformable.sample_levels` is its core.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float
from dn_detr_jax.models.deformable import sample_levels
from dn_detr_jax.models.layers import LayerConfig, Linear
from dn_detr_jax.models.levels import Levels


def rays(num_heads: int, num_levels: int, num_points: int) -> nn.initializers.Initializer:
    """Makes the initial offsets: each head looks into another direction, point k at distance k."""
    angle = 2 * math.pi * np.arange(num_heads) / num_heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    distance = np.arange(1, num_points + 1)
    offsets = direction[:, None, None] * distance[:, None]  # [heads, 1, points, 2]
    offsets = np.broadcast_to(offsets, (num_heads, num_levels, num_points, 2)).reshape(-1)

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        del key
        return jnp.asarray(offsets, dtype).reshape(shape)

    return init


def deformable_attention(
    query: Float[Array, "B Q D"],
    references: Float[Array, "B Q levels coords"],
    memory: Levels,
    config: LayerConfig,
    *,
    num_points: int,
    prefix: str = "",
    point_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> Float[jax.Array, "B Q D"]:
    """Sums values around reference points, or within reference boxes, of every feature level.

    Offsets and weights are linear maps of the query, in float32. Around a point, the unit of an
    offset is a pixel of the level; within a box, it is half a side over the number of points.
    Padded tokens have the value 0. Call it in a compact method: its linear maps become submodules
    of the caller. The output projection is left to `layers.add_and_normalize`.

    Args:
      query: [B, Q, D].
      references: float32 [B, Q, levels, 2] or [B, Q, levels, 4], xy or cxcywh relative to the whole
        size of each level.
      memory: tokens of all levels.
      config: of the layer.
      num_points: that each head reads of each level.
      prefix: of the names `sampling_offsets`, `attention_weights` and `value`.
      point_init: of the kernels of offsets and weights; zeros: all queries start with `rays`.
    """
    zeros, heads, levels = nn.initializers.zeros, config.num_heads, len(memory.shapes)
    batch, queries, features = query.shape
    value = Linear(features, zeros, dtype=config.dtype, name=f"{prefix}value")(memory.tokens)
    value = jnp.where(memory.valid[..., None], value, 0)

    def map_query(name, bias_init, coordinates):
        outputs = heads * levels * num_points * coordinates
        exact = jnp.float32  # bfloat16 would round positions to whole pixels
        linear = Linear(outputs, bias_init, point_init, config.dtype, exact, name=prefix + name)
        return linear(query).reshape(batch, queries, heads, -1)

    offsets = map_query("sampling_offsets", rays(heads, levels, num_points), 2)
    offsets = offsets.reshape(batch, queries, heads, levels, num_points, 2)
    weights = jax.nn.softmax(map_query("attention_weights", zeros, 1), axis=-1)
    weights = weights.reshape(batch, queries, heads, levels, num_points)

    references = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        unit = 1.0 / jnp.array(memory.shapes, jnp.float32)[:, None, ::-1]
    else:
        unit = references[..., 2:] * (0.5 / num_points)
    locations = references[..., :2] + offsets * unit
    value = value.reshape(batch, -1, heads, features // heads)
    return sample_levels(value, memory.shapes, locations, weights, config.sampling_part)
