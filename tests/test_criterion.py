"""The sum over output parts: their matching in one callback, their names, and class losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fast_jit import fast_jit

from dn_detr_jax import losses, matching
from dn_detr_jax.criterion import LossSettings, MatchedPart, Totals, total_loss
from dn_detr_jax.losses import SigmoidFocalLoss, SoftmaxLoss
from dn_detr_jax.sharding import make_mesh

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}
WEIGHTS = {"weight_class": 1.0, "weight_bbox": 5.0, "weight_giou": 2.0}
SETTINGS = LossSettings(SigmoidFocalLoss(), COSTS, WEIGHTS)
TWICE = LossSettings(SigmoidFocalLoss(), COSTS, {name: 2 * w for name, w in WEIGHTS.items()})


def targets_of(rng, counts=(3, 0, 2), slots=4, classes=5):
    """Returns objects of three images."""
    return {
        "labels": rng.integers(0, classes, (3, slots)).astype(np.int32),
        "boxes": oracle.random_boxes(rng, 3, slots),
        "valid": np.arange(slots) < np.array(counts)[:, None],
    }


def predictions(rng, layers, queries, classes=5):
    logits = rng.normal(0, 2, (layers, 3, queries, classes)).astype(np.float32)
    return logits, oracle.random_boxes(rng, layers, 3, queries)


@fast_jit
def losses_of_parts(predicted, targets):
    """Three parts: two of other shapes with targets of their own, one with a given assignment."""
    totals = Totals.of(targets[0], None)
    fixed = jnp.tile(jnp.where(targets[0]["valid"], jnp.arange(4), -1)[:, None], (1, 2, 1))
    parts = [
        MatchedPart(*predicted[0], targets[0], totals, SETTINGS),
        MatchedPart(*predicted[0], targets[0], totals, SETTINGS, "given_{}", fixed),
        MatchedPart(*predicted[1], targets[1], totals, TWICE, "{}_enc"),
    ]
    alone = [total_loss([part], None) for part in parts]
    return total_loss(parts, make_mesh(1)), alone, fixed


def test_parts_are_matched_together_and_summed_under_their_names():
    """Parts of different sizes, weights and targets give the same terms as each alone.

    Catches assignments that go to another part, and weights or names taken from the first one.
    """
    rng = np.random.default_rng(0)
    predicted = predictions(rng, 2, 7), predictions(rng, 1, 11, classes=1)
    targets = targets_of(rng), targets_of(rng, (2, 1, 5), slots=6, classes=1)
    (total, terms, assignments), alone, fixed = losses_of_parts(predicted, targets)
    assert total == pytest.approx(sum(float(one[0]) for one in alone), rel=1e-6)
    for _, own_terms, _ in alone:
        for name, value in own_terms.items():
            np.testing.assert_allclose(terms[name], value, rtol=1e-6, err_msg=name)
    assert set(terms) == {name for one in alone for name in one[1]}
    assert {"loss_ce_0", "loss_ce", "given_loss_giou_0", "loss_bbox_enc"} <= set(terms)
    assert "loss_ce_enc_0" not in terms
    assert assignments[1] is None and assignments[2].shape == (3, 1, 6)
    for one, together in ((alone[0], assignments[0]), (alone[2], assignments[2])):
        np.testing.assert_array_equal(together, one[2][0])
    # The given assignment is used: its terms are those of the criterion with it.
    want = losses.set_criterion(*predicted[0], **targets[0], assignment=fixed)
    np.testing.assert_allclose(terms["given_loss_bbox"], want["loss_bbox"][-1], rtol=1e-5)
    assert not np.allclose(terms["given_loss_bbox"], terms["loss_bbox"])


def test_all_parts_share_one_callback():
    """Catches a callback for every part; each callback stops the device."""
    rng = np.random.default_rng(1)
    targets = targets_of(rng)

    def loss(first, second):
        parts = [
            MatchedPart(*predicted, targets, Totals.of(targets, None), SETTINGS, names)
            for predicted, names in ((first, "{}"), (second, "{}_enc"))
        ]
        return total_loss(parts, make_mesh(1))[0]

    jaxpr = str(jax.make_jaxpr(loss)(predictions(rng, 2, 7), predictions(rng, 1, 11)))
    assert jaxpr.count("pure_callback[") == 1


def test_costs_that_are_not_finite_are_counted_over_all_parts():
    rng = np.random.default_rng(2)
    predicted = predictions(rng, 2, 7), predictions(rng, 1, 11, classes=1)
    targets = targets_of(rng), targets_of(rng, (2, 1, 5), slots=6, classes=1)
    predicted[0][1][0, 0, 0] = np.nan  # a box of an image with 3 objects, twice: a given
    predicted[1][1][0, 2, :2] = np.nan  # assignment has no costs; two of one with 5
    (_, terms, _), _, _ = losses_of_parts(predicted, targets)
    assert terms["nonfinite_costs"] == 3 + 2 * 5


def test_assignments_of_several_problems_are_those_of_each():
    """Catches a wrong split of the shared array, for different layers, queries and objects."""
    rng = np.random.default_rng(3)
    problems = []
    for layers, queries, objects in ((2, 5, 4), (1, 9, 4), (3, 2, 1)):
        cost = rng.normal(size=(2, layers, queries, objects)).astype(np.float32)
        problems.append((cost, rng.random((2, objects)) < 0.7))
    for mesh in (None, make_mesh(1)):
        found = fast_jit(lambda p, mesh=mesh: matching.assign_all(p, mesh))(problems)
        for problem, got in zip(problems, found, strict=True):
            np.testing.assert_array_equal(got, matching.solve_on_host(*problem))


# --- softmax, as in DETR --------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def test_softmax_loss_equals_a_plain_loop():
    """The weighted mean of `torch.nn.functional.cross_entropy` in DETR; the last logit is none."""
    rng = np.random.default_rng(4)
    logits, boxes = predictions(rng, 2, 7, classes=6)
    targets = targets_of(rng)
    settings = LossSettings(SoftmaxLoss(0.1), COSTS, WEIGHTS)

    @fast_jit
    def losses_and_cost(logits, boxes, targets):
        part = MatchedPart(logits, boxes, targets, Totals.of(targets, None), settings)
        only_class = {"cost_class": 1.0, "cost_bbox": 0.0, "cost_giou": 0.0}
        by_class = dataclasses.replace(settings, costs=only_class)
        return *total_loss([part], None)[1:], dataclasses.replace(part, settings=by_class).cost()

    terms, (assignment,), cost = losses_and_cost(logits, boxes, targets)
    for layer, name in enumerate(("loss_ce_0", "loss_ce")):
        total = weights = 0.0
        for b, q in np.ndindex(3, 7):
            hit = np.flatnonzero(assignment[b, layer] == q)
            target = targets["labels"][b, hit[0]] if len(hit) else 5
            weight = 1.0 if len(hit) else 0.1
            total -= weight * np.log(softmax(logits[layer, b, q])[target])
            weights += weight
        assert terms[name] == pytest.approx(total / weights, rel=1e-5)
    for b, layer, n, m in np.ndindex(cost.shape):
        want = -softmax(logits[layer, b, n])[targets["labels"][b, m]]
        assert cost[b, layer, n, m] == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", [-1, 5, 6, 99])
def test_softmax_takes_any_other_label_as_no_object(target):
    """Negatives of contrastive denoising are -1, unmatched queries the number of logits."""
    logits = np.float32([[0.3, -1.0, 2.0, 0.1, 0.5, 1.5]])
    got = SoftmaxLoss(0.25).loss(logits, jnp.array([target]))
    assert got.shape == (1, 1)
    assert got[0, 0] == pytest.approx(-0.25 * np.log(softmax(logits[0])[5]), rel=1e-5)


def test_scores_are_probabilities_of_classes():
    """Sigmoid of each class, or softmax with no object taken away."""
    logits = np.float32([[1.0, -2.0, 0.5]])
    np.testing.assert_allclose(
        SigmoidFocalLoss().scores(logits), 1 / (1 + np.exp(-logits)), rtol=1e-6
    )
    np.testing.assert_allclose(SoftmaxLoss().scores(logits)[0], softmax(logits[0])[:2], rtol=1e-6)
