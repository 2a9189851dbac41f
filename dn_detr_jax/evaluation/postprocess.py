"""From the outputs of the last decoder layer to detections."""

import jax
import jax.numpy as jnp

from dn_detr_jax.arrays import Array, Float, Shaped
from dn_detr_jax.losses import DEFAULT_CLASS_LOSS, ClassLoss


def select_detections(
    pred_logits: Float[Array, "B N K"],
    pred_boxes: Float[Array, "B N 4"],
    num_select: int,
    class_loss: ClassLoss = DEFAULT_CLASS_LOSS,
) -> dict[str, Shaped[jax.Array, "B {num_select} ..."]]:
    """Selects the best (query, class) pairs of every image.

    As in Deformable DETR and DN-DETR, all pairs of query and class compete by their score, so a
    query can give several detections. There is no non-maximum suppression.

    Args:
      pred_logits: float [B, N, K] of the last decoder layer.
      pred_boxes: float [B, N, 4] cxcywh, normalized.
      num_select: number of detections, at most N * C.
      class_loss: maps logits to the scores of the C classes.

    Returns:
      `scores` float32 [B, num_select] in descending order, `labels` int32 [B, num_select], `boxes`
      float32 [B, num_select, 4] cxcywh, normalized.
    """
    scores = class_loss.scores(pred_logits.astype(jnp.float32))
    num_classes = scores.shape[-1]
    best, pair = jax.lax.top_k(scores.reshape(scores.shape[0], -1), num_select)
    boxes = jnp.take_along_axis(pred_boxes, (pair // num_classes)[..., None], axis=1)
    return {"scores": best, "labels": pair % num_classes, "boxes": boxes.astype(jnp.float32)}
