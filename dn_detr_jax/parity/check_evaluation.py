"""The evaluation part of a detector's case: intermediate results, outputs, losses, detections."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.interceptors import selecting
from dn_detr_jax.parity.prepared import (
    BFLOAT16_LOSS_RTOL,
    ENCODER_ATOL,
    LOGIT_ATOL,
    POSITION_ATOL,
    TERM_RTOL,
    TOTAL_RTOL,
    PreparedCase,
    compare_proposals,
    compare_selection,
    compare_terms,
    reference_terms,
    sequence_as_stored,
    stored_selection,
)
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import criterion


def run(prepared: PreparedCase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the detector without denoising queries.

    Returns:
      Outputs (with losses and detections) and intermediate results.
    """
    mesh = make_mesh(1)
    config = prepared.config

    def forward(params, batch, selected):
        with nn.intercept_methods(selecting(selected)):
            outputs, collected = prepared.model.apply(
                {"params": params}, batch["image"], batch["size"], mutable=["intermediates"]
            )
        total, terms, _ = criterion(outputs, None, batch, config=config, mesh=mesh)
        last = (outputs["pred_logits"][-1], outputs["pred_boxes"][-1])
        detections = select_detections(*last, config.eval.num_select)
        return outputs | {"total": total, "terms": terms} | detections, collected

    compiled = jax.jit(forward, compiler_options=prepared.compiler_options)
    selected = stored_selection(prepared.case)
    outputs, collected = jax.device_get(compiled(prepared.params, prepared.batch, selected))
    return outputs, collected["intermediates"]


def compare(
    report: Report,
    prepared: PreparedCase,
    outputs: dict[str, Any],
    collected: dict[str, Any],
) -> None:
    """Compares all that the case has of the evaluation with what `run` returned."""
    check_intermediates(report, prepared, collected)
    check_references(report, prepared, outputs, collected)
    limits = prepared.limits
    bulk = None if limits.bulk is None else prepared.limit(limits.bulk)
    logits = prepared.limit(limits.logits)
    report.array("eval.logits", outputs["pred_logits"], atol=logits, bulk=bulk)
    report.array("eval.boxes", outputs["pred_boxes"], atol=prepared.limit(limits.boxes))
    check_losses(report, prepared, outputs)
    if "eval.post_scores" in prepared.case:
        check_detections(report, prepared, outputs)


def check_intermediates(report: Report, prepared: PreparedCase, collected: dict[str, Any]) -> None:
    """Compares backbone, encodings and the states of all layers.

    Values of padded pixels and tokens reach nothing and are not compared.
    """
    canvas, size = prepared.batch["image"].shape[1:3], jnp.asarray(prepared.batch["size"])
    backbone = prepared.limit(ENCODER_ATOL)
    for level, features in enumerate(collected["features"]):
        real = np.asarray(valid_tokens(size, canvas, features.shape[1:3]))
        report.equal(f"eval.backbone_mask{level}", ~real)
        report.array(f"eval.backbone{level}", features.transpose(0, 3, 1, 2), atol=backbone)
    tokens = []
    for level, values in enumerate(zip(collected["position"], collected["src"], strict=True)):
        real = np.asarray(valid_tokens(size, canvas, values[0].shape[1:3]))
        tokens.append(real.reshape(len(real), -1))
        for name, value, tolerance in zip(
            ("pos", "src"), values, (POSITION_ATOL, ENCODER_ATOL), strict=True
        ):
            ours, limit = value.transpose(0, 3, 1, 2), prepared.limit(tolerance)
            report.array(f"eval.{name}{level}", ours, atol=limit, where=real[:, None])
    real = np.concatenate(tokens, axis=1)[..., None]
    for name, state in _encoder_states(prepared, collected):
        report.array(
            name,
            sequence_as_stored(prepared.case, name, state),
            atol=prepared.limit(ENCODER_ATOL),
            where=sequence_as_stored(prepared.case, name, real),
        )
    limits = prepared.limits.logits
    for i, tolerance in enumerate(limits):
        name, state = f"eval.dec{i}", collected["decoder"][f"dec{i}"][0]
        ours = sequence_as_stored(prepared.case, name, state)
        report.array(name, ours, atol=prepared.limit(tolerance))
    report.array("eval.hs", collected["hs"][0], atol=prepared.limit(limits))


def check_references(
    report: Report, prepared: PreparedCase, outputs: dict[str, Any], collected: dict[str, Any]
) -> None:
    """Compares references, and the scores of proposals and which of them were selected."""
    references, limits = collected["references"][0], prepared.limits.boxes
    if "decoder_points" in prepared.config.model:
        # Decoders with deformable attention return the boxes that leave a layer there; those of
        # the last one are its predictions.
        report.array("eval.init_ref", references[0], atol=prepared.limit(limits[0]))
        references = np.concatenate([references[1:], outputs["pred_boxes"][-1:]])
    report.array("eval.ref", references, atol=prepared.limit(limits))
    if "encoder_scores" in collected:
        atol = prepared.limit(LOGIT_ATOL)
        compare_proposals(report, "eval", prepared, outputs)
        for part in ("eval", "train"):  # the encoder gives the same in both
            report.array(f"{part}.enc_scores", collected["encoder_scores"][0], atol=atol)
            compare_selection(report, part, collected, required=prepared.exact)


def _encoder_states(
    prepared: PreparedCase, collected: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value [batch, tokens, channels] of every layer's output."""
    layers = prepared.config.model.encoder_layers
    for i in range(layers):
        yield f"eval.enc{i}", collected["encoder"][f"enc{i}"][0]
    yield "eval.memory", collected["encoder"][f"enc{layers - 1}"][0]


def check_losses(report: Report, prepared: PreparedCase, outputs: dict[str, Any]) -> None:
    """Compares the loss terms and the total loss without denoising."""
    case, exact = prepared.case, prepared.exact
    if "eval.losses" in case:
        names = case.setting("eval_loss_names")
        ours = reference_terms(outputs["terms"], names)
        stored = case.by_name("eval.losses", names)
        if exact:
            report.scalars("eval.losses", ours, stored, rtol=TERM_RTOL)
        else:
            compare_terms(report, "eval.losses", ours, stored)
    if "eval.total_loss" in case:
        expected = case.by_name("eval.total_loss", ["total"])
        rtol = TOTAL_RTOL[0] if exact else BFLOAT16_LOSS_RTOL
        report.scalars("eval.total_loss", {"total": outputs["total"]}, expected, rtol=rtol)


def check_detections(report: Report, prepared: PreparedCase, outputs: dict[str, Any]) -> None:
    """Compares sorted scores, and labels and boxes of detections with a unique rank.

    Two detections whose scores differ by less than twice the error may swap their ranks.
    """
    case = prepared.case
    scores = outputs["scores"]
    score_atol, box_atol = prepared.limits.last
    report.array("eval.post_scores", scores, atol=prepared.limit(score_atol))
    stored = case.stored("eval.post_scores")
    error = np.abs(case.part("eval.post_scores", scores) - stored).max(initial=0.0)
    # The gaps of all stored scores; of our own, which differ by the error, if some are left out.
    margin, ranked = (4, scores) if case.step("eval.post_scores") else (2, stored)
    gap = -np.diff(ranked, axis=1)
    cut = np.array(case.manifest.get("conditioning", {}).get("post_topk_boundary_gap", 0.0))
    below = np.concatenate([gap, np.broadcast_to(cut, len(gap))[:, None]], axis=1)
    above = np.concatenate([np.full((len(gap), 1), np.inf), gap], axis=1)
    clear = np.minimum(below, above) > margin * error
    report.equal("eval.post_labels", outputs["labels"], where=clear, required=prepared.exact)
    if "eval.post_boxes" in case:
        sizes = case["in.orig_sizes"]
        boxes = to_pixels(outputs["boxes"], sizes)
        atol = prepared.limit(box_atol * float(sizes.max()))
        report.array("eval.post_boxes", boxes, atol=atol, where=clear[..., None])


def to_pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Normalized cxcywh boxes [B, K, 4] as corners in pixels of images of `sizes` (h, w)."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.concatenate([center - half, center + half], axis=-1)
    return corners * sizes[:, None, [1, 0, 1, 0]]
