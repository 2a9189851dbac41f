"""The check of a case of other code, such as detrex: import, evaluation of images, detections.

A case has two images: `a` is the first alone, `b` the second alone, and `batch` both, padded to one
size. detrex evaluates a batch without masks: padding counts as image there, and so it does here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import UnsupportedCase
from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.interop.import_torch import convert
from dn_detr_jax.interop.names.elsewhere import source_of
from dn_detr_jax.interop.sources import Source
from dn_detr_jax.models.images import normalize_images, valid_tokens
from dn_detr_jax.models.registry import build_model
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.check_evaluation import to_pixels
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.prepared import BOX_ATOL, ENCODER_ATOL, LOGIT_ATOL, POSITION_ATOL

_RUNS = {"a": (0,), "b": (1,), "batch": (0, 1)}  # images of each run
_NOT_TRAINED = (
    "the training of other code is not checked: its denoising loss counts empty slots, and the "
    "decoder of some models attends to padding"
)


def state_dict(case: reference.Case) -> tuple[dict[str, np.ndarray], Source]:
    """The state dict of a case in the names of its source.

    Raises:
      UnsupportedCase: names of no source, or weights by another recipe.
    """
    entries = case.setting("state_dict")
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
    found = convert(state, config)
    validate(found.config)
    report = Report(case)
    report.reasons = {name: _NOT_TRAINED for name in case.names() if name.startswith("train.")}
    runner = _Runner(case, found.config, found.params, masked=source.name != "detrex")
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        for run in _RUNS:
            if case.has_outputs(f"{run}."):
                _compare(report, run, runner)
    return report


class _Runner:
    """Runs the model on images of a case.

    Attributes:
      case: the data.
      config: whole configuration.
      masked: padding of a batch is masked.
    """

    def __init__(self, case: reference.Case, config: Any, params: Any, *, masked: bool):
        self.case, self.config, self.masked = case, config, masked
        self._params = jax.tree.map(jnp.asarray, params)
        model = build_model(config.model)

        @jax.jit
        def forward(params, image, size):
            outputs, collected = model.apply(
                {"params": params}, image, size, mutable=["intermediates"]
            )
            last = outputs["pred_logits"][-1], outputs["pred_boxes"][-1]
            detections = select_detections(*last, config.eval.num_select)
            return outputs | detections, collected["intermediates"]

        self._forward = forward

    def limit(self, tolerance: float) -> float | None:
        """The tolerance for float32 compute, None (report only) for lower precision."""
        return tolerance if self.config.model.dtype == "float32" else None

    def images(self, run: str) -> tuple[np.ndarray, np.ndarray]:
        """The standardized images of a run, padded with zeros, and their sizes."""
        images = [self.case[f"in.image_{i}"] for i in _RUNS[run]]
        sizes = np.array([image.shape[:2] for image in images], np.int32)
        batch = np.zeros((len(images), *sizes.max(axis=0), 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        return np.asarray(normalize_images(jnp.asarray(batch), jnp.asarray(sizes))), sizes

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> tuple[dict, dict]:
        """Outputs with detections, and intermediate results."""
        if not self.masked:
            sizes = np.broadcast_to(np.array(images.shape[1:3], np.int32), sizes.shape)
        return jax.device_get(self._forward(self._params, images, sizes))


def _compare(report: Report, run: str, runner: _Runner) -> None:
    images, sizes = runner.images(run)
    outputs, collected = runner(images, sizes)
    case = runner.case
    report.array(f"{run}.images", images.transpose(0, 3, 1, 2), atol=POSITION_ATOL)
    canvas = images.shape[1:3]
    report.equal(f"{run}.pixel_mask", np.asarray(valid_tokens(jnp.asarray(sizes), canvas, canvas)))
    features = collected["features"]
    for number, level in zip(range(6 - len(features), 6), features, strict=True):
        _array(report, f"{run}.backbone_res{number}", level.transpose(0, 3, 1, 2), runner)
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
    for i in range(runner.config.model.decoder_layers):
        state = collected["decoder"][f"dec{i}"][0]
        _array(report, f"{run}.dec{i}", state, runner, LOGIT_ATOL)
    _array(report, f"{run}.hs", collected["hs"][0], runner, LOGIT_ATOL)
    _compare_references(report, run, runner, outputs, collected)
    _array(report, f"{run}.logits", outputs["pred_logits"], runner, LOGIT_ATOL)
    _array(report, f"{run}.boxes", outputs["pred_boxes"], runner, BOX_ATOL)
    if f"{run}.post_scores" in case:
        _compare_detections(report, run, runner, outputs, sizes)


def _compare_references(
    report: Report, run: str, runner: _Runner, outputs: dict[str, Any], collected: dict[str, Any]
) -> None:
    """Compares the boxes that enter the layers, of deformable decoders those that leave them."""
    references = collected["references"][0]
    if "decoder_points" in runner.config.model:
        _array(report, f"{run}.init_ref", references[0], runner, BOX_ATOL)
        # Those that leave the last layer are its predictions.
        references = np.concatenate([references[1:], outputs["pred_boxes"][-1:]])
    _array(report, f"{run}.ref", references, runner, BOX_ATOL)


def _array(
    report: Report,
    name: str,
    ours: np.ndarray,
    runner: _Runner,
    tolerance: float = ENCODER_ATOL,
    where: np.ndarray | None = None,
) -> None:
    """Compares an array [batch, tokens, ...], which may be stored as [tokens, batch, ...]."""
    if name not in report.case:
        return
    swapped = (ours.shape[1], ours.shape[0], *ours.shape[2:])
    if ours.shape != report.case.full_shape(name) == swapped:
        ours = ours.swapaxes(0, 1)
        where = None if where is None else where.swapaxes(0, 1)
    report.array(name, ours, atol=runner.limit(tolerance), where=where)


def _compare_detections(
    report: Report, run: str, runner: _Runner, outputs: dict[str, Any], sizes: np.ndarray
) -> None:
    """Compares scores, and the rest of the detections where no other score is close."""
    case = runner.case
    stored = case[f"{run}.post_scores"]
    scores = outputs["scores"]
    report.array(f"{run}.post_scores", scores, atol=runner.limit(LOGIT_ATOL / 4))
    probabilities = 1 / (1 + np.exp(-outputs["pred_logits"][-1].astype(np.float64)))
    flat = probabilities.reshape(len(probabilities), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, : scores.shape[1] + 1]
    error = np.abs(scores - stored).max(initial=0.0)
    gaps = -np.diff(np.take_along_axis(flat, order, axis=1), axis=1)  # to the next one, kept or not
    before = np.concatenate([np.full((len(gaps), 1), np.inf), gaps[:, :-1]], axis=1)
    clear = np.minimum(gaps, before) > 4 * error
    exact = runner.limit(1.0) is not None
    report.equal(f"{run}.post_labels", outputs["labels"], where=clear, required=exact)
    queries = order[:, :-1] // probabilities.shape[-1]
    report.equal(f"{run}.post_queries", queries, where=clear, required=exact)
    boxes = to_pixels(outputs["boxes"], sizes)
    limit = runner.limit(BOX_ATOL * float(sizes.max()))
    report.array(f"{run}.post_boxes", boxes, atol=limit, where=clear[..., None])
    for i, image in enumerate(_RUNS[run]):
        if f"{run}.final_scores_{i}" not in case:
            continue
        original = case["in.orig_sizes"][image]
        final = to_pixels(outputs["boxes"][i : i + 1], original[None])[0]
        final = final.clip(0, original[[1, 0, 1, 0]])
        kept = (final[:, 2:] > final[:, :2]).all(axis=1)
        certain = clear[i, kept]
        report.array(f"{run}.final_scores_{i}", scores[i, kept], atol=runner.limit(LOGIT_ATOL / 4))
        labels = outputs["labels"][i, kept]
        report.equal(f"{run}.final_labels_{i}", labels, where=certain, required=exact)
        limit = runner.limit(BOX_ATOL * float(original.max()))
        report.array(f"{run}.final_boxes_{i}", final[kept], atol=limit, where=certain[:, None])
