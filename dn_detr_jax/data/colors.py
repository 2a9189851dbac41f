"""Random changes of an image's colors, as one linear map of its pixels.

Brightness, contrast and saturation are factors as in Pillow's `ImageEnhance`: the image is blended
with black, with its mean gray, with its own gray. The hue rotates the colors around the gray axis
of YIQ. All of them are linear, so that they are applied at once, and only the result is rounded and
cut to 0 to 255.
"""

import cv2
import numpy as np
from ml_collections import ConfigDict

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def change_colors(rng: np.random.Generator, image: np.ndarray, augment: ConfigDict) -> None:
    """Changes the colors of an image in place.

    Args:
      rng: four numbers are drawn from it.
      image: uint8 [H, W, 3] RGB.
      augment: `config.data.augment`; brightness, contrast and saturation change by a factor of
        `1 - x` to `1 + x`, the hue by `-x` to `x` of a full turn.
    """
    limits = augment.brightness, augment.contrast, augment.saturation, augment.hue
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * limits
    if any(limits):
        gray = float(_LUMA @ cv2.mean(image)[:3])
        matrix = color_matrix(1 + brightness, 1 + contrast, 1 + saturation, hue, gray)
        image[:] = cv2.transform(image, matrix)


def color_matrix(
    brightness: float, contrast: float, saturation: float, hue: float, gray: float
) -> np.ndarray:
    """Returns the map of colors, float32 [3, 4]: a matrix for RGB, and an offset.

    Args:
      brightness: factor of all values.
      contrast: factor of the differences from the mean gray.
      saturation: factor of the differences from each pixel's gray.
      hue: rotation, as a share of a full turn.
      gray: mean gray of the image, 0 to 255.
    """
    angle = 2 * np.pi * hue
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    rotation = np.linalg.inv(_YIQ) @ turn @ _YIQ
    saturated = saturation * np.eye(3) + (1 - saturation) * _LUMA
    matrix = contrast * brightness * (rotation @ saturated)
    offset = np.full((3, 1), (1 - contrast) * brightness * gray)  # gray keeps hue and saturation
    return np.concatenate([matrix, offset], axis=1).astype(np.float32)
