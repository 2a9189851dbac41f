"""The queries of a detector's case: contents, anchors, targets and the attention mask."""

import jax
import numpy as np

from dn_detr_jax import denoising
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.models.registry import num_matching_queries
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.prepared import POSITION_ATOL, PreparedCase, sequence_as_stored


def check_queries(
    report: Report,
    prepared: PreparedCase,
    names: tuple[str, str] = ("train.input_query_label", "train.input_query_bbox"),
) -> None:
    """Denoising queries, their targets and the attention mask, from the stored noise.

    Args:
      report: gets the comparisons.
      prepared: the case.
      names: of the stored contents and anchors.
    """
    count, images = num_matching_queries(prepared.config.model), len(prepared.batch["image"])
    # The case of DINO has denoising queries alone: its matching queries are proposals.
    queries = [_matching_queries(prepared, count)] if "anchors" in prepared.params else []
    allowed = np.ones((images, count, count), bool)
    if prepared.dn is not None:
        queries.insert(0, _denoising_queries(prepared, prepared.dn))
        allowed = _mask(prepared, prepared.dn, count)
        _check_targets(report, prepared, prepared.dn)
    for name, parts in zip(names, zip(*queries, strict=True), strict=False):
        values = sequence_as_stored(prepared.case, name, np.concatenate(parts, axis=1))
        report.array(name, values, atol=POSITION_ATOL)
    report.equal("train.attn_mask", ~allowed)


def _matching_queries(prepared: PreparedCase, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Content [B, N, D] and anchors [B, N, 4]; patterns come later."""
    params = jax.device_get(prepared.params)
    content = params["content"] if "content" in params else params["label_embedding"][-1:]
    content = np.pad(content, ((0, 0), (0, int(prepared.config.model.indicator))))
    repeated = (np.resize(x, (count, x.shape[1])) for x in (content, params["anchors"]))
    content, anchors = (np.stack([x] * len(prepared.batch["image"])) for x in repeated)
    return content, anchors


def _denoising_queries(
    prepared: PreparedCase, dn: denoising.Denoising
) -> tuple[np.ndarray, np.ndarray]:
    """Content [B, S, D] and anchors [B, S, 4]."""
    indicator = prepared.config.model.indicator
    content = denoising.query_content(prepared.params["label_embedding"], dn, indicator=indicator)
    anchors = inverse_sigmoid(denoising.query_boxes(dn))
    return (
        in_official_order(prepared, np.asarray(content)),
        in_official_order(prepared, np.asarray(anchors)),
    )


def _mask(prepared: PreparedCase, dn: denoising.Denoising, count: int) -> np.ndarray:
    attend_padding = prepared.config.dn.attend_padding
    mask = np.asarray(denoising.attention_mask(dn, count, attend_padding=attend_padding))
    mask = in_official_order(prepared, mask).swapaxes(1, 2)
    return in_official_order(prepared, mask).swapaxes(1, 2)


def _check_targets(report: Report, prepared: PreparedCase, dn: denoising.Denoising) -> None:
    valid, config = prepared.batch["valid"], prepared.config
    copies = np.tile(valid, (1, 2)) if config.dn.contrastive else valid
    rows = reference.slots_of(copies, config.dn.groups)
    labels = np.asarray(dn.target_labels)
    labels = np.where(labels < 0, config.model.num_classes, labels)  # of negatives
    report.equal("train.md_map_known_indice", np.argsort(prepared.slot_order)[rows])
    report.equal("train.md_known_labels", labels[rows])
    report.equal("train.md_known_bboxs", np.asarray(dn.target_boxes)[rows])


def in_official_order(prepared: PreparedCase, values: np.ndarray) -> np.ndarray:
    """Values of queries [..., B, Q, K] with the denoising slots in the PyTorch code's order."""
    order = prepared.slot_order
    index = order.reshape(*[1] * (values.ndim - 3), *order.shape, 1)
    moved = np.take_along_axis(values[..., : order.shape[1], :], index, axis=-2)
    return np.concatenate([moved, values[..., order.shape[1] :, :]], axis=-2)
