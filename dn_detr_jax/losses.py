"""Losses of the DETR family and the set criterion over all decoder layers.

Focal loss: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. Set
criterion: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1,
with a class loss to choose.

Losses are sums over the batch divided by counts over the batch. Under `jax.jit` with a sharded
batch both are global, so this module does not deal with devices. If the counts of a larger batch
are given instead, the results of its parts add up to those of the whole. All computations are in
float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dn_detr_jax import boxes as box_ops
from dn_detr_jax.arrays import Array, Bool, Float, Int, Shaped


def sigmoid_focal_loss(
    logits: Float[Array, "*queries C"],
    target_class: Int[Array, "*#queries"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*queries C"]:
    """Computes the binary focal loss of every class.

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


@runtime_checkable
class ClassLoss(Protocol):
    """What a detector says about classes: loss, matching cost and scores belong together."""

    def loss(
        self, logits: Float[Array, "... K"], target_class: Int[Array, "..."]
    ) -> Float[Array, "... _"]:
        """Computes the loss of every logit or query, [..., K], to be summed over the last axis.

        Args:
          logits: float32 [..., K].
          target_class: int, shape broadcasting to [...]; any value that is no class, such as -1 or
            K, stands for no object.
        """
        ...

    def divisor(self, num_objects: Shaped[Array, ""], num_queries: int) -> Float[jax.Array, ""]:
        """Returns what the summed loss of a batch is divided by.

        Args:
          num_objects: float32 scalar, objects of the batch, each with a query.
          num_queries: queries of the batch.
        """
        ...

    def cost(
        self, logits: Float[Array, "... N K"], labels: Int[Array, "... N M"]
    ) -> Float[jax.Array, "... N M"]:
        """Computes the class cost of assigning objects to queries.

        Args:
          logits: float32 [..., N, K] of N queries.
          labels: int [..., N, M], the class of each of M objects, repeated for every query.

        Returns:
          float32 [..., N, M].
        """
        ...

    def scores(self, logits: Float[Array, "*queries K"]) -> Float[jax.Array, "*queries C"]:
        """Maps logits [..., K] to the scores [..., C] of the C classes, in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True)
class SigmoidFocalLoss:
    """Independent classes with the focal loss, as in Deformable DETR and DN-DETR: K = C logits.

    Attributes:
      alpha: weight of the positive class, 1 - alpha of the negative.
      gamma: focusing exponent.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def loss(
        self, logits: Float[Array, "... K"], target_class: Int[Array, "..."]
    ) -> Float[Array, "... _"]:
        """See `sigmoid_focal_loss`."""
        return sigmoid_focal_loss(logits, target_class, alpha=self.alpha, gamma=self.gamma)

    def divisor(self, num_objects: Shaped[Array, ""], num_queries: int) -> Float[jax.Array, ""]:
        """Returns the number of objects, at least 1."""
        del num_queries
        return jnp.maximum(num_objects, 1.0)

    def cost(
        self, logits: Float[Array, "... N K"], labels: Int[Array, "... N M"]
    ) -> Float[jax.Array, "... N M"]:
        """Returns the difference between the focal losses of the class being right and wrong."""
        prob = jax.nn.sigmoid(jnp.take_along_axis(logits, labels, axis=-1))
        negative = (1 - self.alpha) * prob**self.gamma * -jnp.log(1 - prob + 1e-8)
        positive = self.alpha * (1 - prob) ** self.gamma * -jnp.log(prob + 1e-8)
        return positive - negative

    def scores(self, logits: Float[Array, "*queries K"]) -> Float[jax.Array, "*queries C"]:
        """Returns the sigmoid of every logit."""
        return jax.nn.sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss:
    """Cross-entropy over the classes and "no object", as in DETR: K = C + 1 logits.

    Carion et al., ECCV 2020, section 3.1 and appendix A.4. The last logit is that of no object.

    Attributes:
      no_object_weight: of the queries without object, against 1 for the others.
    """

    no_object_weight: float = 0.1

    def loss(
        self, logits: Float[Array, "... K"], target_class: Int[Array, "..."]
    ) -> Float[Array, "... _"]:
        """Returns the weighted cross-entropy of every query, [..., 1]."""
        no_object = logits.shape[-1] - 1
        is_object = (target_class >= 0) & (target_class < no_object)
        target = jnp.broadcast_to(jnp.where(is_object, target_class, no_object), logits.shape[:-1])
        log_prob = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_prob, target[..., None], axis=-1)
        return -picked * jnp.where(is_object, 1.0, self.no_object_weight)[..., None]

    def divisor(self, num_objects: Shaped[Array, ""], num_queries: int) -> Float[jax.Array, ""]:
        """Returns the sum of the weights of all queries, so that the loss is their mean."""
        return num_objects + self.no_object_weight * (num_queries - num_objects)

    def cost(
        self, logits: Float[Array, "... N K"], labels: Int[Array, "... N M"]
    ) -> Float[jax.Array, "... N M"]:
        """Returns the negative probability of the object's class."""
        return -jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), labels, axis=-1)

    def scores(self, logits: Float[Array, "*queries K"]) -> Float[jax.Array, "*queries C"]:
        """Returns the probabilities of the classes, without that of no object."""
        return jax.nn.softmax(logits, axis=-1)[..., :-1]


DEFAULT_CLASS_LOSS = SigmoidFocalLoss()


def box_losses(
    pred_boxes: Float[Array, "*#pairs 4"], target_boxes: Float[Array, "*#pairs 4"]
) -> tuple[Float[jax.Array, "*pairs 4"], Float[jax.Array, "*pairs"]]:
    """Computes the L1 and generalized IoU losses of pairs of boxes.

    Args:
      pred_boxes: float [..., 4] cxcywh.
      target_boxes: float, broadcasting to [..., 4], cxcywh.

    Returns:
      Absolute difference of each coordinate [..., 4], and 1 - GIoU [...].
    """
    l1 = jnp.abs(pred_boxes - target_boxes)
    giou = box_ops.generalized_iou(
        box_ops.cxcywh_to_xyxy(pred_boxes), box_ops.cxcywh_to_xyxy(target_boxes)
    )
    return l1, 1.0 - giou


def classes_of_queries(
    assignment: Int[Array, "B L M"], labels: Int[Array, "B M"], num_queries: int, num_classes: int
) -> Int[jax.Array, "L B {num_queries}"]:
    """Returns the target class of every query: that of its object, or `num_classes` for no object.

    Args:
      assignment: int [B, L, M], query of every object or -1.
      labels: int [B, M].
      num_queries: N.
      num_classes: C.

    Returns:
      int32 [L, B, N].
    """
    # By comparison, not by scattering: a scatter into sharded images makes the compiler gather.
    matched = assignment[:, :, None, :] == jnp.arange(num_queries)[:, None]  # [B, L, N, M]
    classes = jnp.where(matched, labels[:, None, None, :], num_classes)
    return jnp.min(classes, axis=-1, initial=num_classes).astype(jnp.int32).swapaxes(0, 1)


def set_criterion(
    pred_logits: Float[Array, "L B N K"],
    pred_boxes: Float[Array, "L B N 4"],
    labels: Int[Array, "B M"],
    boxes: Float[Array, "B M 4"],
    valid: Bool[Array, "B M"],
    assignment: Int[Array, "B L M"],
    *,
    class_loss: ClassLoss = DEFAULT_CLASS_LOSS,
    num_objects: Shaped[Array, ""] | None = None,
    num_images: int | None = None,
) -> dict[str, Float[jax.Array, " L"]]:
    """Computes the losses of matched predictions, for every decoder layer.

    Args:
      pred_logits: float [L, B, N, K], the matching part.
      pred_boxes: float [L, B, N, 4] cxcywh.
      labels: int [B, M].
      boxes: float [B, M, 4] cxcywh.
      valid: bool [B, M].
      assignment: int [B, L, M], query of every object or -1.
      class_loss: for `loss_ce`.
      num_objects: to divide by; None: those of this batch.
      num_images: to divide means over images by; None: those of this batch.

    Returns:
      The losses `loss_ce`, `loss_bbox`, `loss_giou` and the metrics `loss_xy`, `loss_hw` (parts of
      loss_bbox), `class_error` (percent of matched queries whose best class is wrong) and
      `cardinality_error` (published as the mean difference between the number of objects and of
      queries whose best class is not the last one), each float32 [L]. Losses are divided by the
      number of objects, at least 1; `loss_ce` by `ClassLoss.divisor`. `class_error` is 100 for a
      batch without objects.
    """
    num_queries, num_classes = pred_logits.shape[2:]
    pred_logits = pred_logits.astype(jnp.float32)
    pred_boxes = pred_boxes.astype(jnp.float32)
    num_objects = jnp.sum(valid, dtype=jnp.float32) if num_objects is None else num_objects
    count = jnp.maximum(num_objects, 1.0)
    images = num_images or len(valid)

    target_class = classes_of_queries(assignment, labels, num_queries, num_classes)
    by_class = class_loss.loss(pred_logits, target_class)
    ce_count = class_loss.divisor(num_objects, images * num_queries)

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
        "loss_ce": jnp.sum(by_class, axis=(1, 2, 3)) / ce_count,
        "loss_bbox": jnp.sum(l1, axis=(1, 2, 3)) / count,
        "loss_giou": jnp.sum(giou, axis=(1, 2)) / count,
        "loss_xy": jnp.sum(l1[..., :2], axis=(1, 2, 3)) / count,
        "loss_hw": jnp.sum(l1[..., 2:], axis=(1, 2, 3)) / count,
        "class_error": 100.0 * (len(valid) / images) - 100.0 * accuracy,
        "cardinality_error": jnp.sum(cardinality, axis=1) / images,
    }


def weighted_total(
    terms: Mapping[str, Float[Array, " L"]],
    *,
    weight_class: float,
    weight_bbox: float,
    weight_giou: float,
) -> Float[jax.Array, ""]:
    """Sums the three weighted losses over the decoder layers; other entries are metrics.

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
