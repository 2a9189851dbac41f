"""Sine position encodings of feature maps and of boxes.

The encoding of Vaswani et al. 2017 in two dimensions, in the form of DETR. DAB-DETR uses a
temperature of 20 for the height and width of feature maps and of 10000 for boxes (Liu et al., ICLR
2022, section 4.4).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax.arrays import Array, Bool, Float


def _sines(
    position: Float[Array, "*shape"], features: int, temperature: float
) -> Float[jax.Array, "*shape {features}"]:
    """Interleaves sines and cosines of angles."""
    exponent = 2.0 * (np.arange(features) // 2) / features
    angle = position[..., None] / (temperature**exponent).astype(np.float32)
    return jnp.where(np.arange(features) % 2 == 0, jnp.sin(angle), jnp.cos(angle))


def image_encoding(
    valid: Bool[Array, "B h w"],
    features: int,
    temperature_h: float,
    temperature_w: float,
    *,
    half_pixel: bool = False,
) -> Float[jax.Array, "B h w {features}"]:
    """Encodes the positions of a feature map, relative to the valid part of each image.

    Args:
      valid: bool [B, h, w], a rectangle from the top left corner of each map.
      features: D, divisible by 4.
      temperature_h: temperature for the vertical half, which comes first.
      temperature_w: temperature for the horizontal half.
      half_pixel: if True, the position of a pixel is its center, as in Deformable DETR (with a
        temperature of 10000); if False, its far edge, as in DETR.

    Returns:
      float32 [B, h, w, D]. Values at padded pixels are finite but meaningless.
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


def box_encoding(
    boxes: Float[Array, "*boxes coords"], features: int, temperature: float = 10000.0
) -> Float[jax.Array, "*boxes coords*{features}"]:
    """Encodes anchors as sines and cosines.

    Args:
      boxes: float [..., 4] cxcywh in [0, 1], or [..., 2] with the center alone.
      features: channels for each coordinate, even.
      temperature: ratio of the longest to the shortest wavelength.

    Returns:
      float32 [..., 4 * features] in the order y, x, w, h, or [..., 2 * features] as y, x.
    """
    order = (1, 0, 2, 3)[: boxes.shape[-1]]
    encoded = _sines(boxes * (2 * math.pi), features, temperature)
    return jnp.concatenate([encoded[..., i, :] for i in order], axis=-1)
