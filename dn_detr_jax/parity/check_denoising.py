"""The reference's denoising components: preparation, mask, split and losses of sets of targets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax import boxes as box_ops
from dn_detr_jax import denoising
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.comparison import ATOL, RTOL, Report
from dn_detr_jax.parity.contrastive import with_halves_of_the_batch


def check(report: Report, case: reference.Case, settings: dict[str, Any]) -> None:
    """Compares one set of targets, an entry of the manifest's `dn_cases`."""
    prefix = f"dn.{settings['name']}."
    counts = settings["gt_counts"]
    # Without any object the PyTorch code has no slot at all.
    labels, boxes, valid = reference.padded_targets(
        [case[f"{prefix}labels_{i}"] for i in range(len(counts))],
        [case[f"{prefix}boxes_{i}"] for i in range(len(counts))],
        max(counts),
    )
    contrastive = settings["contrastive"]
    copies = np.tile(valid, (1, 2)) if contrastive else valid
    # The PyTorch code turns a large number of groups into one of slots, which differs by batch.
    groups = settings["pad_size"] // copies.shape[1] if copies.size else settings["scalar"]
    noise = reference.stored_noise(
        case[prefix + "noise_label_u"],
        case[prefix + "noise_label_new"],
        case[prefix + "noise_box_u"],
        copies,
        groups,
        case[prefix + "noise_box_sign01"] if contrastive else None,
    )
    options = {
        "label_noise": settings["label_noise_scale"],
        "box_noise": settings["box_noise_scale"],
    }

    @jax.jit
    def prepare(*targets):
        return denoising.prepare(*targets, groups=groups, contrastive=contrastive, **options)

    dn = prepare(labels, boxes, valid, noise)
    rows = reference.slots_of(copies, groups)
    order = reference.official_order(copies, groups)
    official = with_halves_of_the_batch(dn, noise, rows, groups, **options) if contrastive else dn
    _check_queries(report, case, settings, official, order)
    report.equal(prefix + "batch_idx", rows[0][: len(rows[0]) // groups])
    report.equal(prefix + "map_known_indice", np.argsort(order)[rows])
    classes = np.where(dn.target_labels < 0, settings["num_classes"], dn.target_labels)
    report.equal(prefix + "known_labels", classes[rows])
    report.equal(prefix + "known_bboxs", np.asarray(dn.target_boxes)[rows])
    _check_loss(report, case, settings, dn, official, order)


def _check_queries(
    report: Report,
    case: reference.Case,
    settings: dict[str, Any],
    dn: denoising.Denoising,
    order: np.ndarray,
) -> None:
    """Content, anchors and attention mask; `order` is of the PyTorch code's slots."""
    prefix = f"dn.{settings['name']}."
    queries = settings["num_queries"] * max(1, settings["num_patterns"])

    @jax.jit
    def run(dn, table):
        content = denoising.query_content(table, dn)
        anchors = box_ops.inverse_sigmoid(denoising.query_boxes(dn))
        return content, anchors, denoising.attention_mask(dn, queries, attend_padding=True)

    content, anchors, allowed = map(np.asarray, run(dn, case["dn.label_enc"]))
    order = _with_matching(order, queries)
    ours = {"input_query_label": content, "input_query_bbox": anchors}
    for name, matching in _matching_queries(case, settings).items():
        values = ours[name]
        values = np.concatenate(
            [values, np.broadcast_to(matching, (len(values), *matching.shape))], 1
        )
        # The official code of the contrastive variant prepares its denoising queries alone.
        kept = dn.num_slots if settings["kind"] == "dino" else values.shape[1]
        values = np.take_along_axis(values, order[:, :kept, None], axis=1)
        values = values.swapaxes(0, 1) if settings["kind"] == "dab" else values
        report.array(prefix + name, values, atol=ATOL)
    allowed = np.take_along_axis(allowed, order[:, :, None], axis=1)
    allowed = np.take_along_axis(allowed, order[:, None, :], axis=2)
    report.equal(prefix + "attn_mask", ~allowed)


def _matching_queries(case: reference.Case, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Content [N, D] and anchors [N, 4] of the matching queries, the content with its indicator."""
    repeats = max(1, settings["num_patterns"])
    anchors = np.tile(case["dn.refpoint"], (repeats, 1))
    if settings["kind"] == "dab":
        content = np.broadcast_to(case["dn.label_enc"][-1], (len(anchors), settings["hidden"] - 1))
    else:
        content = np.tile(case["dn.tgt_weight"], (repeats, 1))
    content = np.concatenate([content, np.zeros((len(content), 1), np.float32)], axis=1)
    return {"input_query_label": content, "input_query_bbox": anchors}


def _with_matching(order: np.ndarray, queries: int) -> np.ndarray:
    """An order [B, S] of denoising slots, with the matching queries behind them in theirs."""
    slots = order.shape[1]
    matching = np.arange(slots, slots + queries)
    return np.concatenate([order, np.broadcast_to(matching, (len(order), queries))], axis=1)


def _check_loss(
    report: Report,
    case: reference.Case,
    settings: dict[str, Any],
    dn: denoising.Denoising,
    official: denoising.Denoising,
    order: np.ndarray,
) -> None:
    """Split, losses and gradients. The number of wrong classes does not take part in the slip."""
    prefix = f"dn.{settings['name']}."
    outputs = [jnp.asarray(case[prefix + name]) for name in ("out_logits", "out_boxes")]
    # Of the PyTorch code's slots for ours; the gradients come out in its order.
    inverse = _with_matching(np.argsort(order), outputs[0].shape[2] - dn.num_slots)

    def plain_sum(logits, boxes, dn, official):
        logits, boxes = (
            jnp.take_along_axis(x, inverse[None, ..., None], axis=2) for x in (logits, boxes)
        )
        (logits, rest), (boxes, _) = (denoising.split(x, dn) for x in (logits, boxes))
        terms = denoising.reconstruction_loss(logits, boxes, official)
        error = denoising.reconstruction_loss(logits, boxes, dn)["class_error"]
        total = sum(jnp.sum(terms[k]) for k in ("loss_ce", "loss_bbox", "loss_giou"))
        return total, (terms | {"class_error": error}, rest)

    gradient = jax.jit(jax.value_and_grad(plain_sum, (0, 1), has_aux=True))
    (_, (terms, rest)), grads = gradient(*outputs, dn, official)
    report.equal(prefix + "match_logits_shape", np.array(rest.shape))
    if settings["contrastive"] and dn.valid.any():
        # The PyTorch code counts all negatives, half of its queries, as wrong.
        terms["class_error"] = (100 + terms["class_error"]) / 2
    last = len(outputs[0]) - 1
    ours = {}
    for name in settings["loss_names"]:
        layer = 0 if name.endswith("_0") else last
        ours[name] = float(terms[name.removeprefix("tgt_").removesuffix("_0")][layer])
    if prefix + "dn_losses" in case:
        stored = case.by_name(prefix + "dn_losses", settings["loss_names"])
        report.scalars(prefix + "dn_losses", ours, stored, rtol=RTOL)
    if prefix + "grad_out_boxes" in case:
        report.array(prefix + "grad_out_boxes", grads[1], rtol=RTOL)
        sums = np.array([grads[0].sum(), jnp.abs(grads[0]).sum()])
        report.array(prefix + "grad_out_logits_sum", sums, rtol=RTOL)
