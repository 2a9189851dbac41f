"""Query denoising, the part that makes DN-DETR learn fast, as free functions for any detector.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, sections
4.2 to 4.4. In training, noised copies of the true labels and boxes go through the decoder as extra
queries in front of the matching queries. Their outputs have to reconstruct the originals, so they
need no matching. The copies come in groups. An attention mask hides all of them from the matching
queries, and the groups from each other.

The contrastive variant (Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for
End-to-End Object Detection", ICLR 2023, section 3.3) gives every object a second copy in each
group, with more noise, which has to be recognized as no object. Its content is the label too, as
in DINO's code: only the box tells which of the two it is.

All shapes are static. B images, M slots for objects, G groups, S = G * M denoising slots (2 * G *
M if contrastive), N matching queries, C classes, L decoder layers, D channels. A slot of an absent
object is *empty*: no query attends to it, and it enters no loss.

Most images have far fewer objects than slots, so most of these S slots are empty. `pack` moves the
real ones into a smaller number of slots: each image gets as many whole groups as fit.

The calls around a decoder of your own, in their order:

>>> import jax, jax.numpy as jnp
>>> from dn_detr_jax import denoising
>>> labels = jnp.array([[3, 1], [2, 0]])                            # [B, M], contiguous
>>> boxes = jnp.full((2, 2, 4), 0.5)                                # [B, M, 4] cxcywh in [0, 1]
>>> valid = jnp.array([[True, True], [True, False]])                # the second image has one
>>> noise = denoising.draw_noise(jax.random.key(0), (2, 3 * 2), num_classes=5)
>>> dn = denoising.prepare(labels, boxes, valid, noise, groups=3, label_noise=0.2, box_noise=0.4)
>>> dn.boxes.shape, dn.valid.sum().item()                           # 3 groups of 2 + 1 objects
((2, 6, 4), 9)
>>> table = jax.random.normal(jax.random.key(1), (5 + 1, 16 - 1))   # labels, then no object
>>> content = denoising.query_content(table, dn)                    # [B, S, D] queries ...
>>> mask = denoising.attention_mask(dn, num_queries=10)             # ... and who may see whom
>>> content.shape, mask.shape
((2, 6, 16), (2, 16, 16))
>>> pred_logits = jnp.zeros((4, 2, 6 + 10, 5))                      # your decoder: [L, B, S + N, C]
>>> pred_boxes = jnp.full((4, 2, 6 + 10, 4), 0.5)
>>> (dn_logits, match_logits), (dn_boxes, match_boxes) = (
...     denoising.split(x, dn) for x in (pred_logits, pred_boxes))
>>> losses = denoising.reconstruction_loss(dn_logits, dn_boxes, dn)
>>> match_logits.shape, losses["loss_bbox"].shape                   # one value per decoder layer
((4, 2, 10, 5), (4,))

A target of another form needs a box that stands for it. A point is a box of a fixed size, with
noise of its center alone:

>>> points = jnp.array([[[0.25, 0.5], [0.75, 0.5]]])                # [B, M, 2]
>>> around = jnp.concatenate([points, jnp.full_like(points, 0.1)], axis=-1)
>>> noise = denoising.draw_noise(jax.random.key(0), (1, 3 * 2), num_classes=5)
>>> dn = denoising.prepare(labels[:1], around, valid[:1], noise, groups=3, label_noise=0.2,
...                        box_noise=0.8, parts="center")
>>> noised, targets = dn.boxes[..., :2], dn.target_boxes[..., :2]   # [B, S, 2] points
>>> bool(jnp.all(jnp.abs(noised - targets) <= 0.8 * 0.1 / 2)), bool(jnp.all(noised != targets))
(True, True)
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from dn_detr_jax import losses
from dn_detr_jax.arrays import Array, Bool, Float, Int, Leaf, Shaped
from dn_detr_jax.noise import Noise as Noise
from dn_detr_jax.noise import add_box_noise as add_box_noise
from dn_detr_jax.noise import add_contrastive_box_noise as add_contrastive_box_noise
from dn_detr_jax.noise import add_label_noise as add_label_noise
from dn_detr_jax.noise import draw_noise as draw_noise
from dn_detr_jax.noise import over_groups as over_groups

# No class. As a label it selects the last row of the label table; as a target it is a negative's.
NO_OBJECT = -1


class Denoising(flax.struct.PyTreeNode):
    """Denoising queries and their targets: the state from `prepare` to the loss.

    Attributes:
      labels: int32 [B, S] noised labels; `NO_OBJECT` if they are not known, see below.
      boxes: float32 [B, S, 4] noised boxes, cxcywh in [0, 1].
      group: int32 [B, S] denoising group of every slot, also of empty ones; -1 for a slot without
        group.
      valid: bool [B, S], False for empty slots.
      target_labels: int32 [B, S] true labels, `NO_OBJECT` for negatives.
      target_boxes: float32 [B, S, 4] true boxes, cxcywh in [0, 1].
      negative: bool [B, S], True for copies without a box to reconstruct.
      label_denoising: False: queries do not know their label and have no class loss.
      mask: False: every query attends to all real queries, see `attention_mask`.
    """

    labels: Leaf
    boxes: Leaf
    group: Leaf
    valid: Leaf
    target_labels: Leaf
    target_boxes: Leaf
    negative: Leaf
    label_denoising: bool = flax.struct.field(pytree_node=False, default=True)
    mask: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def num_slots(self) -> int:
        """Number of denoising slots per image, S."""
        return self.valid.shape[-1]

    @property
    def num_targets(self) -> Int[jax.Array, ""]:
        """Number of slots of the batch with an object to reconstruct, int32; divides the losses."""
        return jnp.sum(self.valid & ~self.negative, dtype=jnp.int32)


def prepare(
    labels: Int[Array, "B M"],
    boxes: Float[Array, "B M 4"],
    valid: Bool[Array, "B M"],
    noise: Noise,
    *,
    groups: int,
    label_noise: float | Sequence[float],
    box_noise: float | Sequence[float],
    contrastive: bool = False,
    distribution: str = "uniform",
    parts: str = "both",
    label_denoising: bool = True,
    mask: bool = True,
) -> Denoising:
    """Lays out the groups and applies the noise: slot `g * M + m` is object m in group g.

    With `contrastive` a group is twice as long: the negative of slot `g * 2M + m` is slot
    `g * 2M + M + m`.

    Args:
      labels: int [B, M] contiguous labels; any value at padding.
      boxes: float [B, M, 4] cxcywh in [0, 1]; any value at padding.
      valid: bool [B, M], True for real objects.
      noise: draws for `slots_needed(M, groups, contrastive)` slots.
      groups: G, at least 1.
      label_noise: probability that a label flips; G values are one for each group.
      box_noise: scale of the box noise, in [0, 1]; G values are one for each group.
      contrastive: add negatives, and use `add_contrastive_box_noise`.
      distribution: of the box noise, see `noise.displacement`.
      parts: what the box noise changes: "both", "center" or "size".
      label_denoising: False: only boxes are reconstructed. Queries have the content of "no object",
        as the matching queries of DN-DAB-DETR, and no class loss.
      mask: False: only for measuring what the attention mask is worth. Matching queries then see
        the noised objects, which are missing at inference.

    Raises:
      ValueError: the noise has another number of slots, or no signs for contrastive denoising; a
        number of scales that is not G; unknown distribution or parts.
    """
    batch, num_objects = labels.shape
    slots = slots_needed(num_objects, groups, contrastive)
    _check_slots(noise, slots, f"{groups} groups of {num_objects} objects", contrastive)
    repeats = slots // max(num_objects, 1)
    target_labels = jnp.tile(labels, (1, repeats))
    target_boxes = jnp.tile(boxes, (1, repeats, 1))
    slot = jnp.arange(slots, dtype=jnp.int32)
    group = slot // max(slots // groups, 1)
    negative = jnp.zeros((batch, slots), bool)
    scale = _by_slot(box_noise, group, groups)
    scale = scale if isinstance(scale, float | int) else scale[:, None]
    shape = {"distribution": distribution, "parts": parts}
    noised_labels = add_label_noise(target_labels, noise, _by_slot(label_noise, group, groups))
    if contrastive:
        negative = jnp.broadcast_to(slot // max(num_objects, 1) % 2 == 1, (batch, slots))
        target_labels = jnp.where(negative, NO_OBJECT, target_labels)
        noised_boxes = add_contrastive_box_noise(target_boxes, noise, scale, negative, **shape)
    else:
        noised_boxes = add_box_noise(target_boxes, noise, scale, **shape)
    return Denoising(
        labels=noised_labels if label_denoising else jnp.full_like(noised_labels, NO_OBJECT),
        boxes=noised_boxes,
        group=jnp.broadcast_to(group, (batch, slots)),
        valid=jnp.tile(valid, (1, repeats)),
        target_labels=target_labels,
        target_boxes=target_boxes,
        negative=negative,
        label_denoising=label_denoising,
        mask=mask,
    )


def _check_slots(noise: Noise, slots: int, of: str, contrastive: bool) -> None:
    if noise.label_u.shape[1] != slots:
        copies = ", positive and negative," if contrastive else ""
        raise ValueError(f"noise for {noise.label_u.shape[1]} slots, but {of}{copies} need {slots}")


def _by_slot(
    scale: float | Sequence[float], group: Int[Array, " S"], groups: int
) -> float | Float[jax.Array, " S"]:
    """Returns the scale of every slot; a scale for all stays a number."""
    if isinstance(scale, float | int):
        return scale
    if len(scale) != groups:
        raise ValueError(f"noise scales {tuple(scale)}: expected {groups}, one for each group")
    return jnp.asarray(scale, jnp.float32)[group]


def slots_needed(num_objects: int, groups: int, contrastive: bool = False) -> int:
    """Returns the denoising slots per image, S, for M slots for objects and G groups."""
    return num_objects * groups * (2 if contrastive else 1)


def limit_objects(
    valid: Bool[Array, "B M"], priority: Float[Array, "B M"], most: int
) -> Bool[jax.Array, "B M"]:
    """Keeps at most `most` objects of each image, those with the lowest priorities.

    Args:
      valid: bool [B, M], True for real objects.
      priority: float [B, M], see `Noise`.
      most: number of objects to keep.

    Returns:
      bool [B, M].
    """
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, priority, jnp.inf), axis=1), axis=1)
    return valid & (rank < most)


def pack(dn: Denoising, slots: int) -> Denoising:
    """Moves the real slots of each image together, as many whole groups as fit, in their order.

    The content of a slot stays the same, so an image whose groups all fit has the same losses as
    before. Masks and losses need no change, since they use the group and validity of each slot.

    Args:
      dn: from `prepare`, with at most `slots` real slots in a group, see `limit_objects`.
      slots: number of slots per image.

    Returns:
      The same with at most `slots` slots; empty ones are at the end and have no group.
    """
    group_size = jnp.sum(dn.valid & (dn.group == 0), axis=1, keepdims=True)
    kept = dn.valid & (dn.group < slots // jnp.maximum(group_size, 1))
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :slots]

    def move(x):  # [B, S, ...]
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    moved = jax.tree.map(move, dn.replace(valid=kept))
    return moved.replace(group=jnp.where(moved.valid, moved.group, -1))


def query_content(
    label_table: Float[Array, "_ _"], dn: Denoising, *, indicator: bool = True
) -> Float[jax.Array, "B S D"]:
    """Embeds the noised labels as the content of the denoising queries.

    Args:
      label_table: float [C + 1, D - 1], or [C + 1, D] without indicator. The last row, no object,
        belongs to queries without label denoising, and may serve matching queries too.
      dn: from `prepare`.
      indicator: append a channel of ones, which tells denoising queries from matching queries.

    Returns:
      float [B, S, D]; zero for empty slots, as in the PyTorch code.
    """
    content = label_table[dn.labels]
    if indicator:
        ones = jnp.ones((*content.shape[:-1], 1), content.dtype)
        content = jnp.concatenate([content, ones], axis=-1)
    return jnp.where(dn.valid[..., None], content, 0)


def query_boxes(dn: Denoising) -> Float[jax.Array, "B S 4"]:
    """Returns the anchors float [B, S, 4] cxcywh of denoising queries; 0.5 for empty slots."""
    return jnp.where(dn.valid[..., None], dn.boxes, 0.5)


def attention_mask(
    dn: Denoising, num_queries: int, *, attend_padding: bool = False
) -> Bool[jax.Array, "B Q Q"]:
    """Masks the decoder's self-attention: which query (row) may attend to which (column).

    Matching queries attend to matching queries only. Denoising queries attend to the matching
    queries and the real slots of their own group. If `dn.mask` is False, all attend to all real
    slots, and the noised objects leak into the matching queries.

    Args:
      dn: from `prepare`.
      num_queries: N.
      attend_padding: denoising queries also attend to the empty slots of their group, as in the
        PyTorch code. Results of an image then depend on the rest of its batch.

    Returns:
      bool [B, S + N, S + N], True: may attend. Every row has at least one True for N > 0.
    """
    batch, slots = dn.valid.shape
    same_group = dn.group[:, :, None] == dn.group[:, None, :]
    visible = (dn.group >= 0) if attend_padding else dn.valid
    if not dn.mask:
        columns = jnp.concatenate([visible, jnp.ones((batch, num_queries), bool)], axis=1)
        return jnp.broadcast_to(columns[:, None], (batch, *[slots + num_queries] * 2))
    dn_to_dn = same_group & visible[:, None, :]
    to_dn = jnp.concatenate([dn_to_dn, jnp.zeros((batch, num_queries, slots), bool)], axis=1)
    to_match = jnp.ones((batch, slots + num_queries, num_queries), bool)
    return jnp.concatenate([to_dn, to_match], axis=2)


def split(
    outputs: Shaped[Array, "*batch Q K"], dn: Denoising | None
) -> tuple[Shaped[Array, "*batch S K"], Shaped[Array, "*batch N K"]]:
    """Splits decoder outputs [..., S + N, K] into the denoising and the matching part.

    Split before matching: no denoising query may be matched. Without denoising the first part is
    empty.
    """
    slots = 0 if dn is None else dn.num_slots
    return outputs[..., :slots, :], outputs[..., slots:, :]


def reconstruction_loss(
    pred_logits: Float[Array, "L B S K"],
    pred_boxes: Float[Array, "L B S 4"],
    dn: Denoising,
    *,
    class_loss: losses.ClassLoss = losses.DEFAULT_CLASS_LOSS,
    num_targets: Shaped[Array, ""] | None = None,
) -> dict[str, Float[jax.Array, " L"]]:
    """Computes the class, L1 and GIoU losses of the reconstruction, by decoder layer (section 4.3).

    Args:
      pred_logits: float [L, B, S, K], the denoising part.
      pred_boxes: float [L, B, S, 4] cxcywh.
      dn: from `prepare`.
      class_loss: for `loss_ce`.
      num_targets: of the batch that `dn` is a part of; None: its own.

    Returns:
      `loss_ce`, `loss_bbox`, `loss_giou` and the metric `class_error` (percent), each float32 [L].
      They are sums over the batch, divided by the number of real slots, at least 1; under `jit`
      with a sharded batch that is the global number. All are 0 for a batch without objects.
      Negatives enter only `loss_ce`, and do not count. Without `dn.label_denoising` `loss_ce` is 0.
    """
    positive = dn.valid & ~dn.negative
    num_targets = dn.num_targets if num_targets is None else num_targets
    count = jnp.maximum(num_targets, 1).astype(jnp.float32)
    pred_logits = pred_logits.astype(jnp.float32)
    by_class = class_loss.loss(pred_logits, dn.target_labels)
    l1, giou = losses.box_losses(pred_boxes.astype(jnp.float32), dn.target_boxes)
    wrong = jnp.argmax(pred_logits, axis=-1) != dn.target_labels

    def mean(per_slot, where):  # [L, B, S] -> [L]
        return jnp.sum(jnp.where(where, per_slot, 0.0), axis=(1, 2)) / count

    with_class = dn.valid if dn.label_denoising else jnp.zeros_like(dn.valid)
    return {
        "loss_ce": mean(jnp.sum(by_class, axis=-1), with_class),
        "loss_bbox": mean(jnp.sum(l1, axis=-1), positive),
        "loss_giou": mean(giou, positive),
        "class_error": mean(100.0 * wrong, positive),
    }
