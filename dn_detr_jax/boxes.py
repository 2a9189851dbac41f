"""Box formats, overlaps and the logit space in which anchors are refined.

Boxes are float arrays `[..., 4]`: `cxcywh` (center x, center y, width, height) or `xyxy` (left,
top, right, bottom). Networks predict `cxcywh` normalized by the valid size of the image, so values
lie in [0, 1]. Overlaps follow Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019,
with the guards of the official DN-DETR code (1e-6 in the denominators), so that empty boxes give 0.
"""

import jax
import jax.numpy as jnp

from dn_detr_jax.arrays import Array, Float, Shaped

# Anchors live in logit space between +-log(0.999 / 0.001), the range of the official code.
LOGIT_EPS = 1e-3
_OVERLAP_EPS = 1e-6


def clamp(
    x: Shaped[Array, "*shape"], low: float | None = None, high: float | None = None
) -> Shaped[Array, "*shape"]:
    """Clips like `jnp.clip`, but with a gradient of 1 on the boundary itself, as in PyTorch.

    Args:
      x: any shape.
      low: smallest value, or None.
      high: largest value, or None.
    """
    if low is not None:
        x = jnp.where(x < low, low, x)
    if high is not None:
        x = jnp.where(x > high, high, x)
    return x


def inverse_sigmoid(
    x: Float[Array, "*shape"], eps: float = LOGIT_EPS
) -> Float[jax.Array, "*shape"]:
    """Computes `log(x / (1 - x))` with numerator and denominator kept at or above `eps`.

    Args:
      x: any shape; values outside [0, 1] are clipped.
      eps: bound; the result lies within +-log(1 / eps), about 6.9 for the default.

    Returns:
      Array of the shape of `x`. The gradient is 0 where a bound is active.
    """
    x = clamp(x, 0.0, 1.0)
    return jnp.log(clamp(x, eps) / clamp(1.0 - x, eps))


def cxcywh_to_xyxy(boxes: Float[Array, "*boxes 4"]) -> Float[jax.Array, "*boxes 4"]:
    """Converts `[..., 4]` boxes from center and size to corners."""
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return jnp.concatenate([center - half, center + half], axis=-1)


def xyxy_to_cxcywh(boxes: Float[Array, "*boxes 4"]) -> Float[jax.Array, "*boxes 4"]:
    """Converts `[..., 4]` boxes from corners to center and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * (low + high), high - low], axis=-1)


def area(boxes: Float[Array, "*boxes 4"]) -> Float[Array, "*boxes"]:
    """Computes the areas `[...]` of `xyxy` boxes `[..., 4]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_and_union(
    a: Float[Array, "*#pairs 4"], b: Float[Array, "*#pairs 4"]
) -> tuple[Float[jax.Array, "*pairs"], Float[jax.Array, "*pairs"]]:
    """Computes intersection over union and the area of the union of `xyxy` boxes, see `iou`."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    sides = clamp(high - low, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(a) + area(b) - intersection
    return intersection / (union + _OVERLAP_EPS), union


def iou(a: Float[Array, "*#pairs 4"], b: Float[Array, "*#pairs 4"]) -> Float[jax.Array, "*pairs"]:
    """Computes the intersection over union of `xyxy` boxes, elementwise with broadcasting.

    For all pairs of `[N, 4]` and `[M, 4]` call `iou(a[:, None], b[None])`, which is `[N, M]`.
    """
    return iou_and_union(a, b)[0]


def generalized_iou(
    a: Float[Array, "*#pairs 4"], b: Float[Array, "*#pairs 4"]
) -> Float[jax.Array, "*pairs"]:
    """Computes the generalized IoU of `xyxy` boxes, in [-1, 1], elementwise with broadcasting."""
    overlap, union = iou_and_union(a, b)
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    sides = clamp(high - low, 0.0)
    hull = sides[..., 0] * sides[..., 1]
    return overlap - (hull - union) / (hull + _OVERLAP_EPS)
