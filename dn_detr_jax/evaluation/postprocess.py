"""From the outputs of the last decoder layer to detections."""

import jax
import jax.numpy as jnp


def select_detections(
    pred_logits: jax.Array, pred_boxes: jax.Array, num_select: int
) -> dict[str, jax.Array]:
    """The best (query, class) pairs of every picture.

    As in Deformable DETR and DN-DETR, all pairs of query and class compete by the sigmoid of their
    logit, so a query can give several detections. There is no non-maximum suppression.

    Args:
      pred_logits: float [B, N, C] of the last decoder layer.
      pred_boxes: float [B, N, 4] cxcywh, normalised.
      num_select: K, at most N * C.

    Returns:
      `scores` float32 [B, K] in descending order, `labels` int32 [B, K], `boxes` float32 [B, K, 4]
      cxcywh, normalised.
    """
    num_classes = pred_logits.shape[-1]
    logits = pred_logits.astype(jnp.float32).reshape(len(pred_logits), -1)
    scores, pair = jax.lax.top_k(jax.nn.sigmoid(logits), num_select)
    boxes = jnp.take_along_axis(pred_boxes, (pair // num_classes)[..., None], axis=1)
    return {"scores": scores, "labels": pair % num_classes, "boxes": boxes.astype(jnp.float32)}
