"""Losses of the DETR family and the set criterion over all decoder layers.

Focal loss: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. Set
criterion: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1,
with the sigmoid focal class loss of Deformable DETR and DN-DETR.

Losses are sums over the batch divided by counts over the batch. Under `jax.jit` with a sharded
batch both are global, so nothing here knows of devices. With the counts of a larger batch given
instead, the results of its parts add up to those of the whole. Everything is computed in float32.
"""

import jax
import jax.numpy as jnp

from dn_detr_jax import boxes as box_ops


def sigmoid_focal_loss(
    logits: jax.Array, target_class: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
    """Binary focal loss of every class.

    Args:
      logits: float [..., C].
      target_class: int, shape broadcasting to [...]; any value outside 0..C-1 stands for no
        object: all C targets are 0.
      alpha: weight of the positive class, 1 - alpha of the negative; negative: no weighting.
      gamma: focusing exponent.

    Returns:
      float [..., C], not reduced.
    """
    target = target_class[..., None] == jnp.arange(logits.shape[-1])
    sign = jnp.where(target, 1.0, -1.0).astype(logits.dtype)
    # With z = +-logit the probability of the true outcome is sigmoid(z).
    z = logits * sign
    loss = jax.nn.softplus(-z) * jax.nn.sigmoid(-z) ** gamma
    if alpha < 0:
        return loss
    return loss * jnp.where(target, alpha, 1.0 - alpha).astype(logits.dtype)


def box_losses(pred_boxes: jax.Array, target_boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L1 and generalized IoU loss of boxes that belong together.

    Args:
      pred_boxes: float [..., 4] cxcywh.
      target_boxes: float, broadcasting to [..., 4], cxcywh.

    Returns:
      |difference| of each coordinate [..., 4], and 1 - GIoU [...].
    """
    l1 = jnp.abs(pred_boxes - target_boxes)
    giou = box_ops.generalized_iou(
        box_ops.cxcywh_to_xyxy(pred_boxes), box_ops.cxcywh_to_xyxy(target_boxes)
    )
    return l1, 1.0 - giou


def classes_of_queries(
    assignment: jax.Array, labels: jax.Array, num_queries: int, num_classes: int
) -> jax.Array:
    """Target class of every query: that of its object, or `num_classes` for no object.

    Args:
      assignment: int [B, L, M], query of every object or -1.
      labels: int [B, M].
      num_queries: N.
      num_classes: C.

    Returns:
      int32 [L, B, N].
    """
    # By comparison, not by scattering: a scatter into sharded pictures makes the compiler gather.
    matched = assignment[:, :, None, :] == jnp.arange(num_queries)[:, None]  # [B, L, N, M]
    classes = jnp.where(matched, labels[:, None, None, :], num_classes)
    return jnp.min(classes, axis=-1, initial=num_classes).astype(jnp.int32).swapaxes(0, 1)


def set_criterion(
    pred_logits: jax.Array,
    pred_boxes: jax.Array,
    labels: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    assignment: jax.Array,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    num_objects: jax.Array | None = None,
    num_images: int | None = None,
) -> dict[str, jax.Array]:
    """Losses of matched predictions, for every decoder layer.

    Args:
      pred_logits: float [L, B, N, C], the matching part.
      pred_boxes: float [L, B, N, 4] cxcywh.
      labels: int [B, M].
      boxes: float [B, M, 4] cxcywh.
      valid: bool [B, M].
      assignment: int [B, L, M], query of every object or -1.
      alpha: of the focal loss.
      gamma: of the focal loss.
      num_objects: to divide by; None: those of this batch.
      num_images: the same for what is a mean over pictures.

    Returns:
      The losses `loss_ce`, `loss_bbox`, `loss_giou` and the metrics `loss_xy`, `loss_hw` (parts of
      loss_bbox), `class_error` (percent of matched queries whose best class is wrong) and
      `cardinality_error` (published as the mean difference between the number of objects and of
      queries whose best class is not the last one), each float32 [L], divided by the number of
      objects, at least 1. `class_error` is 100 for a batch without objects.
    """
    num_queries, num_classes = pred_logits.shape[2:]
    pred_logits = pred_logits.astype(jnp.float32)
    pred_boxes = pred_boxes.astype(jnp.float32)
    num_objects = jnp.sum(valid, dtype=jnp.float32) if num_objects is None else num_objects
    count = jnp.maximum(num_objects, 1.0)
    images = num_images or len(valid)

    target_class = classes_of_queries(assignment, labels, num_queries, num_classes)
    focal = sigmoid_focal_loss(pred_logits, target_class, alpha=alpha, gamma=gamma)

    query = assignment.swapaxes(0, 1)  # [L, B, M]
    matched = query >= 0
    matched_boxes = jnp.take_along_axis(pred_boxes, jnp.maximum(query, 0)[..., None], axis=2)
    l1, giou = box_losses(matched_boxes, boxes)
    l1 = jnp.where(matched[..., None], l1, 0.0)
    giou = jnp.where(matched, giou, 0.0)

    best_class = jnp.argmax(pred_logits, axis=-1)  # [L, B, N]
    right = jnp.take_along_axis(best_class, jnp.maximum(query, 0), axis=2) == labels
    accuracy = jnp.sum(right & matched, axis=(1, 2)) / count
    detected = jnp.sum(best_class != num_classes - 1, axis=2, dtype=jnp.float32)
    cardinality = jnp.abs(detected - jnp.sum(valid, axis=1, dtype=jnp.float32))
    return {
        "loss_ce": jnp.sum(focal, axis=(1, 2, 3)) / count,
        "loss_bbox": jnp.sum(l1, axis=(1, 2, 3)) / count,
        "loss_giou": jnp.sum(giou, axis=(1, 2)) / count,
        "loss_xy": jnp.sum(l1[..., :2], axis=(1, 2, 3)) / count,
        "loss_hw": jnp.sum(l1[..., 2:], axis=(1, 2, 3)) / count,
        "class_error": 100.0 * (len(valid) / images) - 100.0 * accuracy,
        "cardinality_error": jnp.sum(cardinality, axis=1) / images,
    }


def weighted_total(
    terms: dict[str, jax.Array], *, weight_class: float, weight_bbox: float, weight_giou: float
) -> jax.Array:
    """Sum over decoder layers of the three weighted losses; other entries are metrics.

    Args:
      terms: from `set_criterion` or `denoising.reconstruction_loss`, each [L].
      weight_class: of `loss_ce`.
      weight_bbox: of `loss_bbox`.
      weight_giou: of `loss_giou`.
    """
    return jnp.sum(
        weight_class * terms["loss_ce"]
        + weight_bbox * terms["loss_bbox"]
        + weight_giou * terms["loss_giou"]
    )
