"""The training part of a case of detrex: queries, losses and gradients of one step.

detrex differs from the official code in three points of the training. They are put into the
comparison here; as options of a training they would be worse or change nothing:

- The denoising loss of classes counts empty slots as background. An image then has the more
  background the fewer objects it has.
- The decoder of its DN-DETR attends to the padding of a batch, see `attending_to_padding`.
- Negatives of its DINO have the content of a class. Labels flip half as often as `label_noise`
  says, and the scale of the box noise is 1.
"""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.boxes import xyxy_to_cxcywh
from dn_detr_jax.interop.convert import gradients_to_torch
from dn_detr_jax.interop.sources import Source
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.registry import build_model, torch_names
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.check_queries import check_queries
from dn_detr_jax.parity.check_training import (
    check_matching,
    check_outputs,
    check_proposals,
    compare_gradients,
)
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.interceptors import attending_to_padding, selecting
from dn_detr_jax.parity.prepared import (
    BFLOAT16_LOSS_RTOL,
    ENCODER_ATOL,
    POSITION_ATOL,
    TERM_RTOL,
    TOTAL_RTOL,
    PreparedCase,
    PyTree,
    compare_selection,
    sequence_as_stored,
)
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import criterion

_LABEL_NOISE, _BOX_NOISE = 0.2, 0.4  # of detrex's DN-DETR
_CONTRASTIVE_LABEL_NOISE, _CONTRASTIVE_BOX_NOISE = 0.25, 1.0  # of its DINO
_NORM_RTOL = 1e-3


def prepare(
    case: reference.Case,
    config: ConfigDict,
    params: PyTree,
    images: np.ndarray,
    sizes: np.ndarray,
) -> PreparedCase:
    """Builds what a training step of a case needs.

    Args:
      case: of detrex, with inputs and noise of a training step.
      config: whole configuration, from the import; a copy is changed to train as detrex does.
      params: from the import.
      images: float32 [B, H, W, 3], standardized.
      sizes: int [B, 2], valid height and width.
    """
    config = config.copy_and_resolve_references()
    contrastive = "in.noise_box_sign01" in case
    config.dn.update(groups=case.setting("dn_groups"), contrastive=contrastive)
    config.dn.attend_padding = True
    config.loss.update(_weights(case))
    count = range(len(images))
    corners = [case[f"in.gt_boxes_{i}"].reshape(-1, 4) for i in count]
    scales = [np.asarray(sizes[i][[1, 0, 1, 0]], np.float32) for i in count]
    own_boxes = [
        np.asarray(xyxy_to_cxcywh(jnp.asarray(own / scale, jnp.float32)))
        for own, scale in zip(corners, scales, strict=True)
    ]
    own_labels = [case[f"in.gt_labels_{i}"] for i in count]
    slots = max(1, *map(len, own_labels))
    labels, boxes, valid = reference.padded_targets(own_labels, own_boxes, slots)
    batch = {"image": images, "size": sizes, "labels": labels, "boxes": boxes, "valid": valid}
    dn, order = _denoising(case, config.dn, batch)
    return PreparedCase(case, config, build_model(config.model), params, batch, dn, order)


def _weights(case: reference.Case) -> dict[str, float]:
    """The weights of the losses, which do not depend on the layer and the part."""
    stored = dict(zip(case.setting("loss_names"), case.setting("loss_weights"), strict=True))
    return {f"weight_{term}": float(stored[f"loss_{term}"]) for term in ("class", "bbox", "giou")}


def _denoising(
    case: reference.Case, options: ConfigDict, batch: dict[str, np.ndarray]
) -> tuple[denoising.Denoising | None, np.ndarray]:
    """Denoising queries from the stored noise, and the order of their slots there."""
    valid, groups, contrastive = batch["valid"], options.groups, options.contrastive
    if not valid.any():
        return None, np.zeros((len(valid), 0), int)
    # Positives of a group and then its negatives: twice as many groups of the objects.
    copies = groups * 2 if contrastive else groups
    noise = reference.stored_noise(
        case["in.noise_label_u"],
        case["in.noise_label_new"],
        case["in.noise_box_u"],
        valid,
        copies,
        case["in.noise_box_sign01"] if contrastive else None,
    )
    dn = denoising.prepare(
        jnp.asarray(batch["labels"]),
        jnp.asarray(batch["boxes"]),
        jnp.asarray(valid),
        noise,
        groups=groups,
        label_noise=_CONTRASTIVE_LABEL_NOISE if contrastive else _LABEL_NOISE,
        box_noise=_CONTRASTIVE_BOX_NOISE if contrastive else _BOX_NOISE,
        contrastive=contrastive,
    )
    return dn, reference.official_order(valid, copies)


def compare(report: Report, prepared: PreparedCase, source: Source) -> None:
    """Compares all that a case of detrex has of the training.

    Args:
      report: gets the comparisons.
      prepared: see `prepare`.
      source: of the names.
    """
    outputs, collected, grads = _run(prepared)
    for i, valid in enumerate(prepared.batch["valid"]):
        boxes = prepared.batch["boxes"][i, valid]
        report.array(f"train.target_boxes_{i}", boxes, atol=POSITION_ATOL)
    check_queries(report, prepared, names=("train.input_label", "train.input_box"))
    _check_encoder(report, prepared, collected)
    check_outputs(report, prepared, outputs)
    check_matching(report, prepared, outputs["assignment"])
    check_proposals(report, prepared, outputs)
    _check_losses(report, prepared, outputs)
    _check_gradients(report, prepared, source, grads)


def _run(prepared: PreparedCase) -> tuple[dict[str, Any], dict[str, Any], PyTree]:
    """Outputs with losses, intermediate results and gradients of one step."""
    case, config, mesh = prepared.case, prepared.config, make_mesh(1)
    selected = case.completed("train.topk_idx")
    counted = None if prepared.dn is None else count_empty_slots(prepared.dn)

    def loss_of(params, batch, dn, counted):
        with contextlib.ExitStack() as stack:
            stack.enter_context(nn.intercept_methods(selecting(selected)))
            stack.enter_context(nn.intercept_methods(attending_to_padding()))
            outputs, collected = prepared.apply_in_training(
                params, batch, dn, mutable=["intermediates"]
            )
        total, terms, assignment = criterion(outputs, counted, batch, config=config, mesh=mesh)
        outputs |= {"total": total, "terms": terms, "assignment": assignment}
        return total, (outputs, collected["intermediates"])

    step = jax.jit(
        jax.value_and_grad(loss_of, has_aux=True), compiler_options=prepared.compiler_options
    )
    (_, (outputs, collected)), grads = step(prepared.params, prepared.batch, prepared.dn, counted)
    return jax.device_get((outputs, collected, grads))


def count_empty_slots(dn: denoising.Denoising) -> denoising.Denoising:
    """Empty slots as negatives: they enter the loss of classes, and no other."""
    return dn.replace(
        target_labels=jnp.where(dn.valid, dn.target_labels, denoising.NO_OBJECT),
        negative=dn.negative | ~dn.valid,
        valid=jnp.ones_like(dn.valid),
    )


def _check_encoder(report: Report, prepared: PreparedCase, collected: dict[str, Any]) -> None:
    """Compares masks and memory of valid tokens, and which proposals are selected."""
    size, canvas = jnp.asarray(prepared.batch["size"]), prepared.batch["image"].shape[1:3]
    tokens = []
    for level, features in enumerate(collected["src"]):
        valid = np.asarray(valid_tokens(size, canvas, features.shape[1:3]))
        report.equal(f"train.mask{level}", ~valid)
        tokens.append(valid.reshape(len(valid), -1))
    memory = collected["encoder"][f"enc{prepared.config.model.encoder_layers - 1}"][0]
    memory, valid = (
        sequence_as_stored(prepared.case, "train.memory", x)
        for x in (memory, np.concatenate(tokens, axis=1)[..., None])
    )
    report.array("train.memory", memory, atol=prepared.limit(ENCODER_ATOL), where=valid)
    if "encoder_scores" in collected:
        compare_selection(report, "train", collected, required=prepared.exact)


def _our_name(name: str) -> str:
    """Our name of a loss term.

    Examples:
      >>> _our_name("loss_class_dn_3"), _our_name("loss_giou_enc")
      ('dn_loss_ce_3', 'loss_giou_enc')
    """
    match = re.fullmatch(r"loss_(class|bbox|giou)(_dn|_enc)?(_\d+)?", name)
    if match is None:
        return name
    term, part, layer = match[1].replace("class", "ce"), match[2] or "", match[3] or ""
    return f"dn_loss_{term}{layer}" if part == "_dn" else f"loss_{term}{part}{layer}"


def _check_losses(report: Report, prepared: PreparedCase, outputs: dict[str, Any]) -> None:
    """Compares the loss terms, not weighted, and the total."""
    case, exact = prepared.case, prepared.exact
    terms = {
        name: outputs["terms"].get(_our_name(name), 0.0) for name in case.setting("loss_names")
    }
    for name, ours, rtol in (
        ("losses", terms, TERM_RTOL),
        ("total_loss", {"total": outputs["total"]}, TOTAL_RTOL[0]),
    ):
        if f"train.{name}" not in case:
            continue
        stored, noise = case.by_name(f"train.{name}", ours), None
        if f"f64.{name}" in case:
            noise = {k: x for k, x in case.by_name(f"f64.{name}", ours).items() if k in stored}
        limit = rtol if exact else None if name == "losses" else BFLOAT16_LOSS_RTOL
        report.scalars(f"train.{name}", ours, stored, rtol=limit, exact=noise)


def _check_gradients(report: Report, prepared: PreparedCase, source: Source, grads: PyTree) -> None:
    """Compares the gradients' norms, of every parameter and of all together."""
    case, names = prepared.case, prepared.case.setting("param_names")
    official = gradients_to_torch(grads, torch_names(prepared.config.model))

    def canonical(name: str) -> str:
        return reference.canonical_name(source.first_name(name))

    theirs = {canonical(name): value for name, value in source.from_official(official).items()}
    ours = {name: theirs[canonical(name)] for name in names}
    compare_gradients(report, prepared, ours)
    if "train.grad_total_norm" in case:
        norm = np.sqrt(sum(float(np.vdot(value, value)) for value in ours.values()))
        stored = float(case["train.grad_total_norm"][0])
        limit = prepared.limit(_NORM_RTOL)
        report.scalars("train.grad_total_norm", {"norm": norm}, {"norm": stored}, rtol=limit)
