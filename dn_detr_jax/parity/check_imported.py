"""The check of a case of other code, such as detrex: import, evaluation of images, detections.

A case has two images: `a` is the first alone, `b` the second alone, and `batch` both, padded to one
size. detrex evaluates a batch without masks: padding counts as image there, and so it does here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import UnsupportedCase
from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.interop.import_torch import convert
from dn_detr_jax.interop.names.backbones import backbone_config
from dn_detr_jax.interop.names.elsewhere import source_of
from dn_detr_jax.interop.sources import Source
from dn_detr_jax.models.images import normalize_images, valid_tokens
from dn_detr_jax.models.registry import build_model
from dn_detr_jax.parity import check_imported_training, reference
from dn_detr_jax.parity.check_evaluation import to_pixels
from dn_detr_jax.parity.comparison import Report, Tolerance, clear_ranks, largest_error
from dn_detr_jax.parity.interceptors import selecting
from dn_detr_jax.parity.prepared import (
    ENCODER_ATOL,
    LOGIT_ATOL,
    POSITION_ATOL,
    DecoderLimits,
    compare_selection,
    sequence_as_stored,
)

_RUNS = {"a": (0,), "b": (1,), "batch": (0, 1)}  # images of each run


def state_dict(case: reference.Case) -> tuple[dict[str, np.ndarray], Source]:
    """The state dict of a case in the names of its source.

    Raises:
      UnsupportedCase: names of no source, or weights by another recipe.
    """
    # Integers are positions in the windows of a Swin Transformer, which are no weights.
    entries = [e for e in case.setting("state_dict") if not e.get("dtype", "").startswith("int")]
    shapes = {entry["name"]: np.broadcast_to(np.float32(0), entry["shape"]) for entry in entries}
    source = source_of(shapes)
    if source.name == "official":
        raise UnsupportedCase(f"{case.name}: its names are of no source that this package has")
    seed, by_official_name = case.setting("seed"), "recipe" in case.manifest
    state = {}
    for entry in entries:
        name, shape = entry["name"], tuple(entry["shape"])
        official = entry.get("official") or source.official_name(name)
        if (part := entry.get("part")) is not None:  # of a packed tensor
            whole = reference.weight(official, (3 * shape[0], *shape[1:]), seed)
            state[name] = np.split(whole, 3)[part]
        elif by_official_name:
            state[name] = reference.weight(official, shape, seed)
        else:
            stream = reference.canonical_name(source.first_name(name))
            state[name] = reference.weight(official, shape, seed, stream)
    return state, source


def check(case: reference.Case, dtype: str = "float32") -> Report:
    """Compares the evaluation of a case with what this package computes from imported weights.

    Raises:
      UnsupportedCase, ConversionError: see `state_dict` and `import_torch.convert`.
    """
    state, source = state_dict(case)
    config = base_config(source.variant)
    config.model.update(num_classes=0, dtype=dtype)
    config.model.backbone.mask_padding = False  # the PyTorch code computes on padding too
    config.update_from_flattened_dict(backbone_config(source.to_official(state)))
    found = convert(state, config)
    validate(found.config)
    report = Report(case)
    runner = _Runner(case, found.config, found.params, masked=source.name != "detrex")
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        for run in _RUNS:
            if case.has_outputs(f"{run}."):
                _compare(report, run, runner)
        if case.has_outputs("train.") and source.name == "detrex":
            prepared = check_imported_training.prepare(
                case, found.config, runner.params, *runner.images("batch")
            )
            check_imported_training.compare(report, prepared, source)
    return report


class _Runner:
    """Runs the model on images of a case.

    Attributes:
      case: the data.
      config: whole configuration.
      params: of the model.
      masked: padding of a batch is masked.
      limits: tolerances of the decoder's outputs.
    """

    def __init__(self, case: reference.Case, config: Any, params: Any, *, masked: bool):
        self.case, self.config, self.masked = case, config, masked
        self.params = jax.tree.map(jnp.asarray, params)
        self.limits = DecoderLimits.of(config.model)
        model = build_model(config.model)

        @jax.jit
        def forward(params, image, size, selected):
            with nn.intercept_methods(selecting(selected)):
                outputs, collected = model.apply(
                    {"params": params}, image, size, mutable=["intermediates"]
                )
            last = outputs["pred_logits"][-1], outputs["pred_boxes"][-1]
            detections = select_detections(*last, config.eval.num_select)
            return outputs | detections, collected["intermediates"]

        self._forward = forward

    @property
    def exact(self) -> bool:
        """Whether the tolerances for float32 apply."""
        return self.config.model.dtype == "float32"

    def limit(self, tolerance: Tolerance) -> Tolerance | None:
        """The tolerance for float32 compute, None (report only) for lower precision."""
        return tolerance if self.exact else None

    def images(self, run: str) -> tuple[np.ndarray, np.ndarray]:
        """The standardized images of a run, padded with zeros, and their sizes."""
        images = [self.case[f"in.image_{i}"] for i in _RUNS[run]]
        sizes = np.array([image.shape[:2] for image in images], np.int32)
        batch = np.zeros((len(images), *sizes.max(axis=0), 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        return np.asarray(normalize_images(jnp.asarray(batch), jnp.asarray(sizes))), sizes

    def __call__(
        self, images: np.ndarray, sizes: np.ndarray, selected: np.ndarray | None
    ) -> tuple[dict, dict]:
        """Outputs with detections, and intermediate results; `selected`: see `selecting`."""
        if not self.masked:
            sizes = np.broadcast_to(np.array(images.shape[1:3], np.int32), sizes.shape)
        return jax.device_get(self._forward(self.params, images, sizes, selected))


def _compare(report: Report, run: str, runner: _Runner) -> None:
    images, sizes = runner.images(run)
    case = runner.case
    outputs, collected = runner(images, sizes, case.completed(f"{run}.topk_idx"))
    report.array(f"{run}.images", images.transpose(0, 3, 1, 2), atol=POSITION_ATOL)
    canvas = images.shape[1:3]
    report.equal(f"{run}.pixel_mask", np.asarray(valid_tokens(jnp.asarray(sizes), canvas, canvas)))
    features = collected["features"]
    # The last one of a ResNet is res5 there, that of a Swin Transformer p3.
    for number, level in zip(range(-len(features), 0), features, strict=True):
        for name in (f"{run}.backbone_res{6 + number}", f"{run}.backbone_p{4 + number}"):
            _array(report, name, level.transpose(0, 3, 1, 2), runner)
    for name in ("src", "pos"):
        for i, level in enumerate(collected["position" if name == "pos" else name]):
            _array(report, f"{run}.{name}{i}", level.transpose(0, 3, 1, 2), runner)
    layers = runner.config.model.encoder_layers
    for i in range(layers):
        _array(report, f"{run}.enc{i}", collected["encoder"][f"enc{i}"][0], runner)
    tokens = None
    if runner.masked:
        grid = collected["features"][-1].shape[1:3]
        tokens = np.asarray(valid_tokens(jnp.asarray(sizes), canvas, grid))
        tokens = tokens.reshape(len(sizes), -1, 1)
    memory = collected["encoder"][f"enc{layers - 1}"][0]
    _array(report, f"{run}.memory", memory, runner, where=tokens)
    if "encoder_scores" in collected:
        _compare_proposals(report, run, runner, outputs, collected)
    limits = runner.limits
    for i, tolerance in enumerate(limits.logits):
        state = collected["decoder"][f"dec{i}"][0]
        _array(report, f"{run}.dec{i}", state, runner, float(tolerance.item()))
    _array(report, f"{run}.hs", collected["hs"][0], runner, limits.logits)
    _compare_references(report, run, runner, outputs, collected)
    bulk = None if limits.bulk is None else runner.limit(limits.bulk)
    tolerance = runner.limit(limits.logits)
    report.array(f"{run}.logits", outputs["pred_logits"], atol=tolerance, bulk=bulk)
    _array(report, f"{run}.boxes", outputs["pred_boxes"], runner, limits.boxes)
    if f"{run}.post_scores" in case:
        _compare_detections(report, run, runner, outputs, sizes)


def _compare_proposals(
    report: Report, run: str, runner: _Runner, outputs: dict[str, Any], collected: dict[str, Any]
) -> None:
    """Compares scores and classes of proposals, and which are selected where no score is close."""
    scores, exact = collected["encoder_scores"][0], runner.exact
    _array(report, f"{run}.enc_scores", scores, runner, LOGIT_ATOL)
    compare_selection(report, run, collected, required=exact)
    # The model returns the classes of those that are selected.
    used = collected["selected"][0]
    logits = np.zeros((*scores.shape, outputs["encoder_logits"].shape[-1]), np.float32)
    np.put_along_axis(logits, used[..., None], outputs["encoder_logits"][0], axis=1)
    selected = np.zeros((*scores.shape, 1), bool)
    np.put_along_axis(selected, used[..., None], True, axis=1)
    _array(report, f"{run}.enc_logits", logits, runner, LOGIT_ATOL, where=selected)


def _compare_references(
    report: Report, run: str, runner: _Runner, outputs: dict[str, Any], collected: dict[str, Any]
) -> None:
    """Compares the boxes that enter the layers, of deformable decoders those that leave them."""
    references, compared = collected["references"][0], None
    if "decoder_points" in runner.config.model:
        _array(report, f"{run}.init_ref", references[0], runner, runner.limits.boxes[0])
        # Those that leave the last layer are its predictions. With a norm in front of the heads
        # they are not, nothing is computed from them, and they have no counterpart here.
        references = np.concatenate([references[1:], outputs["pred_boxes"][-1:]])
        if runner.config.model.get("decoder_norm", False):
            compared = np.arange(len(references)).reshape(-1, 1, 1, 1) < len(references) - 1
    _array(report, f"{run}.ref", references, runner, runner.limits.boxes, where=compared)


def _array(
    report: Report,
    name: str,
    ours: np.ndarray,
    runner: _Runner,
    tolerance: float | np.ndarray = ENCODER_ATOL,
    where: np.ndarray | None = None,
) -> None:
    """Compares an array [batch, tokens, ...], which may be stored as [tokens, batch, ...]."""
    if name not in report.case:
        return
    ours = sequence_as_stored(report.case, name, ours)
    where = None if where is None else sequence_as_stored(report.case, name, where)
    report.array(name, ours, atol=tolerance if runner.exact else None, where=where)


def _compare_detections(
    report: Report, run: str, runner: _Runner, outputs: dict[str, Any], sizes: np.ndarray
) -> None:
    """Compares scores, and the rest of the detections where no other score is close."""
    case, scores = runner.case, outputs["scores"]
    score_atol, box_atol = runner.limits.last
    report.array(f"{run}.post_scores", scores, atol=runner.limit(score_atol))
    probabilities = 1 / (1 + np.exp(-outputs["pred_logits"][-1].astype(np.float64)))
    flat = probabilities.reshape(len(probabilities), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, : scores.shape[1] + 1]
    error = largest_error(case, f"{run}.post_scores", scores)
    clear = clear_ranks(np.take_along_axis(flat, order, axis=1), error)
    exact = runner.exact
    report.equal(f"{run}.post_labels", outputs["labels"], where=clear, required=exact)
    queries = order[:, :-1] // probabilities.shape[-1]
    report.equal(f"{run}.post_queries", queries, where=clear, required=exact)
    boxes = to_pixels(outputs["boxes"], sizes)
    limit = runner.limit(box_atol * float(sizes.max()))
    report.array(f"{run}.post_boxes", boxes, atol=limit, where=clear[..., None])
    for i, image in enumerate(_RUNS[run]):
        if f"{run}.final_scores_{i}" not in case:
            continue
        original = case["in.orig_sizes"][image]
        final = to_pixels(outputs["boxes"][i : i + 1], original[None])[0]
        final = final.clip(0, original[[1, 0, 1, 0]])
        kept = (final[:, 2:] > final[:, :2]).all(axis=1)
        certain = clear[i, kept]
        report.array(f"{run}.final_scores_{i}", scores[i, kept], atol=runner.limit(score_atol))
        labels = outputs["labels"][i, kept]
        report.equal(f"{run}.final_labels_{i}", labels, where=certain, required=exact)
        limit = runner.limit(box_atol * float(original.max()))
        report.array(f"{run}.final_boxes_{i}", final[kept], atol=limit, where=certain[:, None])
