"""Losses against plain loops, on mixed and on empty batches and at extreme values."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fast_jit import fast_jit
from hypothesis import given
from hypothesis import strategies as st

from dn_detr_jax import losses

LAYERS, BATCH, QUERIES, CLASSES, OBJECTS = 2, 3, 6, 4, 5

criterion = fast_jit(losses.set_criterion)
gradient = fast_jit(
    jax.grad(
        lambda *args: losses.weighted_total(
            losses.set_criterion(*args), weight_class=1, weight_bbox=5, weight_giou=2
        ),
        argnums=(0, 1),
    )
)


def random_problem(seed, objects):
    """Draws outputs, targets with given numbers of objects, and an assignment."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (LAYERS, BATCH, QUERIES, CLASSES)).astype(np.float32)
    pred_boxes = oracle.random_boxes(rng, LAYERS, BATCH, QUERIES)
    labels = rng.integers(0, CLASSES, (BATCH, OBJECTS)).astype(np.int32)
    boxes = oracle.random_boxes(rng, BATCH, OBJECTS)
    valid = np.arange(OBJECTS) < np.array(objects)[:, None]
    assignment = np.full((BATCH, LAYERS, OBJECTS), -1, np.int32)
    for b, layer in np.ndindex(BATCH, LAYERS):
        assignment[b, layer, : objects[b]] = rng.permutation(QUERIES)[: objects[b]]
    return logits, pred_boxes, labels, boxes, valid, assignment


def slow_criterion(logits, pred_boxes, labels, boxes, valid, assignment):
    count = max(int(valid.sum()), 1)
    terms = {name: np.zeros(LAYERS) for name in criterion_names()}
    for layer, b in np.ndindex(LAYERS, BATCH):
        object_of = {q: m for m, q in enumerate(assignment[b, layer]) if q >= 0}
        detected = 0
        for q in range(QUERIES):
            target = labels[b, object_of[q]] if q in object_of else None
            for c in range(CLASSES):
                terms["loss_ce"][layer] += oracle.focal(logits[layer, b, q, c], c == target) / count
            detected += int(np.argmax(logits[layer, b, q]) != CLASSES - 1)
        for q, m in object_of.items():
            distance = np.abs(pred_boxes[layer, b, q].astype(np.float64) - boxes[b, m])
            terms["loss_xy"][layer] += distance[:2].sum() / count
            terms["loss_hw"][layer] += distance[2:].sum() / count
            terms["loss_giou"][layer] += (
                1 - oracle.giou(pred_boxes[layer, b, q], boxes[b, m])
            ) / count
            terms["class_error"][layer] += (
                100 * (np.argmax(logits[layer, b, q]) == labels[b, m]) / count
            )
        terms["cardinality_error"][layer] += abs(detected - valid[b].sum()) / BATCH
    terms["loss_bbox"] = terms["loss_xy"] + terms["loss_hw"]
    terms["class_error"] = 100 - terms["class_error"]
    return terms


def criterion_names():
    parts = ("loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw")
    return (*parts, "class_error", "cardinality_error")


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, OBJECTS), min_size=3, max_size=3))
def test_set_criterion_equals_a_plain_loop(seed, objects):
    """Catches mixed-up layers and images, targets on wrong queries, normalizing per image."""
    problem = random_problem(seed, objects)
    got, want = criterion(*problem), slow_criterion(*problem)
    assert set(got) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_stands_at_padding_does_not_matter():
    """Catches the use of padded objects, whose labels and boxes may be out of range."""
    logits, pred_boxes, labels, boxes, valid, assignment = random_problem(0, (2, 0, 4))
    other_labels = np.where(valid, labels, 999)
    other_boxes = np.where(valid[..., None], boxes, -77.0).astype(np.float32)
    rest = (valid, assignment)
    want = criterion(logits, pred_boxes, labels, boxes, *rest)
    got = criterion(logits, pred_boxes, other_labels, other_boxes, *rest)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    want = gradient(logits, pred_boxes, labels, boxes, *rest)
    got = gradient(logits, pred_boxes, other_labels, other_boxes, *rest)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_object_without_query_counts_but_has_no_box_loss():
    """Catches -1, for objects beyond the queries, as an index of the last query."""
    problem = random_problem(1, (3, 2, 0))
    problem[-1][0, :, 1] = -1
    got, want = criterion(*problem), slow_criterion(*problem)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_batch_without_objects_trains_the_background_alone():
    """Catches 0 / 0; DETR trains on such batches too."""
    problem = random_problem(2, (0, 0, 0))
    got = criterion(*problem)
    for name in ("loss_bbox", "loss_giou", "loss_xy", "loss_hw"):
        np.testing.assert_array_equal(got[name], 0)
    background = sum(oracle.focal(x, False) for x in problem[0][0].ravel())
    assert got["loss_ce"][0] == pytest.approx(background, rel=1e-5)
    np.testing.assert_array_equal(got["class_error"], 100)
    by_logits, by_boxes = gradient(*problem)
    assert np.isfinite(by_logits).all() and np.all(by_logits > 0) and not np.any(by_boxes)


def test_classes_of_queries_equal_a_plain_loop():
    _, _, labels, _, _, assignment = random_problem(3, (5, 0, 2))
    got = losses.classes_of_queries(assignment, labels, QUERIES, CLASSES)
    want = np.full((LAYERS, BATCH, QUERIES), CLASSES)
    for b, layer, m in np.ndindex(assignment.shape):
        if assignment[b, layer, m] >= 0:
            want[layer, b, assignment[b, layer, m]] = labels[b, m]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.4, 1.5), (-1.0, 0.0)])
def test_focal_loss_equals_its_formula(alpha, gamma):
    """Extreme logits included: log(sigmoid(-80)) written naively is -inf in float32."""
    logits = np.float32([-80, -20, -3, -0.5, 0, 0.5, 3, 20, 80])[:, None].repeat(2, axis=1)
    for target in (0, 1, 2, -1):  # the last two stand for no object
        got = losses.sigmoid_focal_loss(logits, jnp.array(target), alpha=alpha, gamma=gamma)
        want = [[oracle.focal(x, c == target, alpha, gamma) for c in (0, 1)] for x in logits[:, 0]]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("logit", [-80.0, 80.0, -1e4, 1e4])
def test_focal_loss_has_finite_gradients_far_out(logit):
    """Catches a NaN or vanishing gradient for a confident mistake."""

    def loss(x, target):
        return losses.sigmoid_focal_loss(jnp.array([x]), jnp.array(target))[0]

    slopes = [float(jax.grad(loss)(logit, target)) for target in (0, 1)]
    assert np.isfinite(slopes).all()
    positive, negative = slopes
    if logit < 0:
        assert positive == pytest.approx(-0.25, rel=1e-4) and abs(negative) < 1e-6
    else:
        assert negative == pytest.approx(0.75, rel=1e-4) and abs(positive) < 1e-6


def test_box_losses_equal_a_plain_loop():
    rng = np.random.default_rng(4)
    a, b = oracle.random_boxes(rng, 5), oracle.random_boxes(rng, 5)
    l1, giou = losses.box_losses(a, b)
    np.testing.assert_allclose(l1, np.abs(a.astype(np.float64) - b), atol=1e-6)
    want = [1 - oracle.giou(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(giou, want, atol=1e-5)


def test_weighted_total_is_the_sum_over_layers_of_three_terms():
    """Catches metrics that leak into the loss, and auxiliary layers left out."""
    terms = {"loss_ce": [1, 2], "loss_bbox": [10, 20], "loss_giou": [100, 200]}
    terms |= {"loss_xy": [1e5, 1e5], "loss_hw": [1e5, 1e5], "class_error": [1e6, 1e6]}
    terms = {name: jnp.float32(values) for name, values in terms.items()}
    total = losses.weighted_total(terms, weight_class=2, weight_bbox=3, weight_giou=0.5)
    assert total == 2 * 3 + 3 * 30 + 0.5 * 300
