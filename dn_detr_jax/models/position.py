"""Sine position encodings of feature maps and of boxes, and masks of padding.

Vaswani et al. 2017 in two dimensions, as DETR has it; the temperature of the feature maps is 20 for
height and width in DAB-DETR (Liu et al., ICLR 2022, section 4.4), that of boxes 10000.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def _valid_lines(size: jax.Array, full: int, reduced: int) -> jax.Array:
    """Which of `reduced` lines are valid, by nearest neighbour in `full` lines: bool [B, reduced].

    Line i of the reduced map looks at line floor(i * full / reduced) of the picture.
    """
    ratio = np.float32(full) / np.float32(reduced)
    source = np.floor(np.arange(reduced, dtype=np.float32) * ratio).astype(np.int32)
    return source[None, :] < size[:, None]


def valid_tokens(size: jax.Array, canvas: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """Mask of the feature pixels that belong to the picture.

    Args:
      size: int [B, 2], valid height and width in the canvas; the rest is padding on the right and
        at the bottom.
      canvas: (H, W) of the batch.
      shape: (h, w) of the feature map.

    Returns:
      bool [B, h, w].
    """
    rows = _valid_lines(size[:, 0], canvas[0], shape[0])
    columns = _valid_lines(size[:, 1], canvas[1], shape[1])
    return rows[:, :, None] & columns[:, None, :]


def _sines(position: jax.Array, features: int, temperature: float) -> jax.Array:
    """Interleaved sines and cosines [..., features] of angles [...]."""
    exponent = 2.0 * (np.arange(features) // 2) / features
    angle = position[..., None] / (temperature**exponent).astype(np.float32)
    return jnp.where(np.arange(features) % 2 == 0, jnp.sin(angle), jnp.cos(angle))


def image_encoding(
    valid: jax.Array,
    features: int,
    temperature_h: float,
    temperature_w: float,
    *,
    half_pixel: bool = False,
) -> jax.Array:
    """Position encoding of a feature map, relative to the valid part of each picture.

    Args:
      valid: bool [B, h, w], a rectangle from the top left corner of each picture.
      features: D, divisible by 4.
      temperature_h: temperature for the vertical half, which comes first.
      temperature_w: temperature for the horizontal half.
      half_pixel: positions of pixels are their centres, as in Deformable DETR (with a temperature
        of 10000); False: their far edges, as in DETR.

    Returns:
      float32 [B, h, w, D]. At padded pixels finite and without meaning.
    """

    def encode(lines, temperature):  # [B, n] -> [B, n, D / 2]
        count = jnp.cumsum(lines.astype(jnp.float32), axis=1)
        shift = 0.5 if half_pixel else 0.0
        position = (count - shift) / (count[:, -1:] + 1e-6) * (2 * math.pi)
        return _sines(position, features // 2, temperature)

    rows = encode(valid[:, :, 0], temperature_h)
    columns = encode(valid[:, 0, :], temperature_w)
    shape = (*valid.shape, features // 2)
    return jnp.concatenate(
        [
            jnp.broadcast_to(rows[:, :, None], shape),
            jnp.broadcast_to(columns[:, None, :], shape),
        ],
        axis=-1,
    )


def box_encoding(boxes: jax.Array, features: int, temperature: float = 10000.0) -> jax.Array:
    """Sine encoding of anchors.

    Args:
      boxes: float [..., 4] cxcywh in [0, 1], or [..., 2] with the centre alone.
      features: channels for each coordinate.
      temperature: of the sines.

    Returns:
      float32 [..., 4 * features] in the order y, x, w, h, or [..., 2 * features] as y, x.
    """
    order = (1, 0, 2, 3)[: boxes.shape[-1]]
    encoded = _sines(boxes * (2 * math.pi), features, temperature)
    return jnp.concatenate([encoded[..., i, :] for i in order], axis=-1)
