"""Standardized pixels, and the masks of what is an image and what is padding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax.arrays import Array, Bool, Float, Int, UInt8

# Mean and standard deviation of ImageNet in RGB, of values in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def normalize_images(
    image: UInt8[Array, "B H W 3"], size: Int[Array, "B 2"]
) -> Float[jax.Array, "B H W 3"]:
    """Standardizes uint8 pixels and sets padding to zero.

    Args:
      image: uint8 [B, H, W, 3] RGB.
      size: int [B, 2], valid height and width.

    Returns:
      float32 [B, H, W, 3].
    """
    mean, std = jnp.array(IMAGE_MEAN), jnp.array(IMAGE_STD)
    scaled = (image.astype(jnp.float32) / 255.0 - mean) / std
    valid = valid_tokens(size, image.shape[1:3], image.shape[1:3])
    return jnp.where(valid[..., None], scaled, 0.0)


def valid_tokens(
    size: Int[Array, "B 2"], canvas: Sequence[int], shape: Sequence[int]
) -> Bool[Array, "B {shape[0]} {shape[1]}"]:
    """Masks the pixels of a feature map that belong to the image.

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


def _valid_lines(size: Int[Array, " B"], full: int, reduced: int) -> Bool[Array, "B {reduced}"]:
    """Masks the valid lines of `reduced`, by nearest neighbor in `full` lines: bool [B, reduced].

    Line i of the reduced map corresponds to line floor(i * full / reduced) of the canvas.
    """
    ratio = np.float32(full) / np.float32(reduced)
    source = np.floor(np.arange(reduced, dtype=np.float32) * ratio).astype(np.int32)
    return source[None, :] < size[:, None]
