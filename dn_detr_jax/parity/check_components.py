"""The reference's single components: boxes, encodings, denoising, matching, losses, detections."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax import boxes as box_ops
from dn_detr_jax import losses, matching
from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.models.deformable import sample_levels
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.position import box_encoding, image_encoding
from dn_detr_jax.parity import check_denoising, reference
from dn_detr_jax.parity.check_evaluation import to_pixels
from dn_detr_jax.parity.comparison import ATOL, RTOL, Report


def check(case: reference.Case) -> Report:
    """Compares every component that the case holds."""
    report = Report(case)
    parts: dict[str, Callable[[Report, reference.Case], None]] = {
        "focal.logits": _focal,
        "box.b1": _boxes,
        "pe.mask": _image_encodings,
        "msda.value": _deformable_sampling,
        "gse.pos": _box_encodings,
        "invsig.x": _inverse_sigmoid,
        "mask.in": _masks,
        "matcher.logits": _matcher,
        "crit.mixed.losses": _criterion,
        "post.sizes": _post_processing,
    }
    with jax.default_matmul_precision("highest"):
        for settings in case.manifest.get("dn_cases", ()):
            check_denoising.check(report, case, settings)
        for array, part in parts.items():
            if array in case:
                part(report, case)
    return report


def _focal(report: Report, case: reference.Case) -> None:
    onehot, logits = case["focal.onehot"], jnp.asarray(case["focal.logits"])
    count = float(case["focal.num_boxes"])
    target = jnp.asarray(np.where(onehot.any(-1), onehot.argmax(-1), onehot.shape[-1]))

    @functools.partial(jax.jit, static_argnames="alpha")
    def loss(logits, alpha=0.25):
        per_class = losses.sigmoid_focal_loss(logits, target, alpha=alpha)
        return per_class.mean(axis=1).sum() / count

    report.array("focal.loss", loss(logits), rtol=RTOL)
    report.array("focal.loss_noalpha", loss(logits, alpha=-1.0), rtol=RTOL)
    report.array("focal.loss_ce", loss(logits) * logits.shape[1], rtol=RTOL)
    report.array("focal.grad", jax.jit(jax.grad(loss))(logits), rtol=RTOL)


def _boxes(report: Report, case: reference.Case) -> None:
    first, second = (jnp.asarray(case[f"box.{name}"]) for name in ("b1", "b2"))
    a, b = box_ops.cxcywh_to_xyxy(first), box_ops.cxcywh_to_xyxy(second)
    report.array("box.b1_xyxy", a, atol=ATOL)
    report.array("box.b2_xyxy", b, atol=ATOL)
    report.array("box.xyxy_to_cxcywh", box_ops.xyxy_to_cxcywh(a), atol=ATOL)
    iou, union = jax.jit(box_ops.iou_and_union)(a[:, None], b[None])
    report.array("box.iou", iou, atol=ATOL)
    report.array("box.union", union, atol=ATOL)
    giou = jax.jit(box_ops.generalized_iou)
    report.array("box.giou", giou(a[:, None], b[None]), atol=ATOL)


def _image_encodings(report: Report, case: reference.Case) -> None:
    valid = jnp.asarray(~case["pe.mask"])
    real = ~case["pe.mask"][:, None]
    for name, features, temperatures in (("20_20", 256, (20, 20)), ("10_40", 32, (10, 40))):
        encode = jax.jit(image_encoding, static_argnums=1)
        ours = encode(valid, features, *map(float, temperatures)).transpose(0, 3, 1, 2)
        report.array(f"pe.hw_{name}", ours, atol=ATOL, where=real)
    half_pixel = functools.partial(image_encoding, half_pixel=True)
    ours = jax.jit(half_pixel, static_argnums=1)(valid, 256, 1e4, 1e4).transpose(0, 3, 1, 2)
    name = "pe.deformable_10000"
    if name in case:  # every other channel may be all there is
        ours = ours[:, :: ours.shape[1] // case.full_shape(name)[1]]
        report.array(name, ours, atol=ATOL, where=real)


def _deformable_sampling(report: Report, case: reference.Case) -> None:
    shapes = tuple(map(tuple, case["msda.shapes"].tolist()))
    names = ("value", "loc", "weights")
    inputs = [jnp.asarray(case[f"msda.{name}"]) for name in names]

    @jax.jit
    def run(value, locations, weights, cotangent):
        def sample(*inputs):
            return sample_levels(inputs[0], shapes, *inputs[1:])

        out, pull_back = jax.vjp(sample, value, locations, weights)
        return out, pull_back(cotangent)

    out, grads = run(*inputs, case["msda.cotangent"])
    report.array("msda.out", out, atol=ATOL)
    for name, grad in zip(names, grads, strict=True):
        report.array(f"msda.grad_{name}", grad, rtol=RTOL)


def _box_encodings(report: Report, case: reference.Case) -> None:
    boxes = jnp.asarray(case["gse.pos"])
    encode = jax.jit(box_encoding, static_argnums=1)
    report.array("gse.out4", encode(boxes, 128), atol=ATOL)
    report.array("gse.out2", encode(boxes[..., :2], 128), atol=ATOL)


def _inverse_sigmoid(report: Report, case: reference.Case) -> None:
    x = jnp.asarray(case["invsig.x"])
    report.array("invsig.y", box_ops.inverse_sigmoid(x), atol=ATOL)
    slope = jax.jit(jax.vmap(jax.grad(box_ops.inverse_sigmoid)))(x)
    # From 1 to 1001: each in units of itself.
    report.array("invsig.grad", slope, rtol=RTOL, each=True)


def _masks(report: Report, case: reference.Case) -> None:
    padding = case["mask.in"]
    size = np.stack([(~padding).any(2).sum(1), (~padding).any(1).sum(1)], axis=1)
    for name in case.names():
        if name.startswith("mask.out_"):
            shape = tuple(map(int, name.removeprefix("mask.out_").split("x")))
            ours = valid_tokens(jnp.asarray(size), padding.shape[1:], shape)
            report.equal(name, ~np.asarray(ours))


def _matcher_targets(case: reference.Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = range(len(case["matcher.logits"]))
    labels, boxes = (
        [case[f"matcher.target_{kind}_{i}"] for i in images] for kind in ("labels", "boxes")
    )
    return reference.padded_targets(labels, boxes, max(map(len, labels)))


@jax.jit
def _cost(logits, predicted, labels, boxes):
    return matching.matching_cost(logits[None], predicted[None], labels, boxes)


def _matcher(report: Report, case: reference.Case) -> None:
    labels, boxes, valid = _matcher_targets(case)
    cost = np.asarray(_cost(case["matcher.logits"], case["matcher.boxes"], labels, boxes))
    assignment = matching.solve_on_host(cost, valid)
    for i, real in enumerate(valid):
        report.array(f"matcher.cost_{i}", cost[i, 0][:, real], atol=10 * ATOL)
        queries = assignment[i, 0, real]
        order = np.argsort(queries)
        report.equal(f"matcher.indices_{i}", np.stack([queries[order], order]))


_CRITERION_TERMS = (
    "loss_ce",
    "class_error",
    "loss_bbox",
    "loss_giou",
    "loss_xy",
    "loss_hw",
    "cardinality_error",
)


def _criterion(report: Report, case: reference.Case) -> None:
    labels, boxes, valid = _matcher_targets(case)
    outputs = case["matcher.logits"], case["matcher.boxes"]

    def total(logits, predicted, valid, assignment):
        logits, predicted = logits[None], predicted[None]
        terms = losses.set_criterion(logits, predicted, labels, boxes, valid, assignment)
        weights = {"weight_class": 1.0, "weight_bbox": 5.0, "weight_giou": 2.0}
        return losses.weighted_total(terms, **weights), terms

    gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    cost = np.asarray(_cost(*outputs, labels, boxes))
    for name, real in (("mixed", valid), ("empty", np.zeros_like(valid))):
        assignment = matching.solve_on_host(cost, real)
        (_, terms), grads = gradient(*outputs, real, assignment)
        ours = {term: float(terms[term][0]) for term in _CRITERION_TERMS}
        stored = f"crit.{name}.losses"
        if stored in case:
            # The denoising terms behind them are 0: there are no denoising queries.
            names = [*_CRITERION_TERMS, *range(len(_CRITERION_TERMS), case.full_shape(stored)[0])]
            expected = case.by_name(stored, map(str, names))
            expected = {key: x for key, x in expected.items() if key in ours}
            report.scalars(stored, ours, expected, rtol=RTOL)
        report.array(f"crit.{name}.grad_logits", grads[0], rtol=RTOL)
        report.array(f"crit.{name}.grad_boxes", grads[1], rtol=RTOL)


def _post_processing(report: Report, case: reference.Case) -> None:
    found = select_detections(
        jnp.asarray(case["matcher.logits"]),
        jnp.asarray(case["matcher.boxes"]),
        case.full_shape("post.scores")[1],
    )
    report.array("post.scores", found["scores"], atol=ATOL)
    report.equal("post.labels", found["labels"])
    corners = to_pixels(np.asarray(found["boxes"]), case["post.sizes"])
    report.array("post.boxes", corners, atol=ATOL * float(case["post.sizes"].max()))
