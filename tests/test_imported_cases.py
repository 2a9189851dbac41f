"""What a case of other code needs: detrex's ways of training, and tolerances by layer."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from oracle import focal

from dn_detr_jax import denoising
from dn_detr_jax.config import base_config
from dn_detr_jax.errors import UnsupportedCase
from dn_detr_jax.losses import SigmoidFocalLoss
from dn_detr_jax.models.pyramid import LastLevel
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.check_imported_training import count_empty_slots
from dn_detr_jax.parity.check_training import selections
from dn_detr_jax.parity.comparison import Report, clear_ranks
from dn_detr_jax.parity.interceptors import attending_to_padding, selecting
from dn_detr_jax.parity.prepared import DecoderLimits


def case_of(folder, described=None, **arrays):
    np.savez(folder / "case.npz", **arrays)
    (folder / "case.json").write_text(json.dumps({"case": "x", "arrays": described or {}}))
    return reference.Case(folder / "case.npz")


def test_empty_slots_count_as_background():
    """Catches an empty slot in a loss of boxes or in the divisor, and one without class loss."""
    rng = np.random.default_rng(0)
    logits, boxes = rng.normal(size=(1, 1, 4, 2)), rng.uniform(0.2, 0.4, (1, 1, 4, 4))
    # The second object is empty.
    valid, labels = np.array([[True, False]]), np.array([[1, 0]])
    noise = denoising.Noise(
        label_u=np.ones((1, 4)), label_new=np.zeros((1, 4), int), box_u=np.full((1, 4, 4), 0.5)
    )
    dn = denoising.prepare(
        labels, np.full((1, 2, 4), 0.5), valid, noise, groups=2, label_noise=0.0, box_noise=0.0
    )
    loss = {"class_loss": SigmoidFocalLoss(0.25, 2.0)}
    ours = denoising.reconstruction_loss(logits, boxes, dn, **loss)
    theirs = denoising.reconstruction_loss(logits, boxes, count_empty_slots(dn), **loss)
    for name in ("loss_bbox", "loss_giou"):
        np.testing.assert_allclose(theirs[name], ours[name])
    positive = {(0, 1), (2, 1)}  # slot and class
    of_slots = [
        sum(focal(logits[0, 0, slot, k], (slot, k) in positive) for k in range(2))
        for slot in range(4)
    ]
    np.testing.assert_allclose(ours["loss_ce"], (of_slots[0] + of_slots[2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(theirs["loss_ce"], sum(of_slots) / 2, rtol=1e-5)


def test_padding_is_encoded_as_in_pytorch():
    """Catches a row taken for a column. PyTorch counts the valid pixels of a pixel's own line."""
    model = LastLevel(16, 20.0, 20.0)
    features, size = (np.zeros((2, 4, 6, 3), np.float32),), np.array([[128, 192], [96, 64]])
    variables = model.init(jax.random.key(0), features, size, (128, 192))
    with nn.intercept_methods(attending_to_padding()):
        found = np.asarray(model.apply(variables, features, size, (128, 192)).position)
    valid = np.zeros((2, 4, 6), int)
    valid[0], valid[1, :3, :2] = 1, 1
    frequencies = 20.0 ** (2 * (np.arange(8) // 2) / 8)
    for axis, half in ((1, slice(0, 8)), (2, slice(8, 16))):
        count = valid.cumsum(axis)
        last = np.take(count, [-1], axis)
        angle = (count / (last + 1e-6) * 2 * np.pi)[..., None] / frequencies
        wanted = np.where(np.arange(8) % 2, np.cos(angle), np.sin(angle))
        np.testing.assert_allclose(found[..., half], wanted.reshape(2, 24, 8), atol=1e-5)


class _Ranks(nn.Module):
    def __call__(self, scores):
        return self.select(scores)

    def select(self, scores):
        return jax.lax.top_k(scores, 4)[1]


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ([2, 5, 7, 1], [2, 5, 7, 1]),
        ([2, -1, 7, -1], [2, 5, 7, 1]),  # ranks 0 and 1 are swapped
        ([2, -1, -1, 6], [2, 5, 7, 6]),  # and 6 takes the place of 1
        ([-1, -1, -1, -1], [5, 2, 7, 1]),
    ],
)
def test_stored_proposals_take_the_place_of_selected_ones(stored, wanted):
    """Catches a proposal that is used twice, or not at all, where others are not stored."""
    scores = np.array([[0.0, 3.0, 5.0, 1.0, 1.5, 6.0, 2.0, 4.0]] * 2, np.float32)
    with nn.intercept_methods(selecting(np.array([[5, 2, 7, 1], stored]))):
        found = _Ranks().apply({}, scores)
    np.testing.assert_array_equal(found, [[5, 2, 7, 1], wanted])


def test_the_first_step_selects_what_is_stored(tmp_path):
    """Catches a training that selects others than PyTorch did, or in later steps still the same."""
    assert selections(case_of(tmp_path), 2) == [None, None]
    described = {"eval.topk_idx": {"step": [1, 2], "full_shape": [1, 3]}}
    case = case_of(tmp_path, described, **{"eval.topk_idx": np.array([[8, 6]])})
    found = [x.tolist() for x in selections(case, 3)]
    assert found == [[[8, -1, 6]], [[-1, -1, -1]], [[-1, -1, -1]]]


def test_tolerances_by_layer(tmp_path):
    """Catches one tolerance for all layers, also where the layers are stored in part."""
    limits = DecoderLimits.of(base_config("dn_dino_detr").model)
    assert limits.logits.shape == (6, 1, 1, 1) and np.all(np.diff(limits.boxes[:, 0, 0, 0]) > 0)
    official = base_config("dn_dino_detr").model
    official.proposal_score = "objectness"
    loosest = np.maximum(limits.logits, 1e-3)  # tighter nowhere than for the other models
    np.testing.assert_array_equal(DecoderLimits.of(official).logits, loosest)
    stored, ours = np.zeros((6, 1, 2, 3)), np.zeros((6, 1, 2, 3))
    ours[5, 0, 0, 0] = 9e-3
    described = {"a": {"step": [2, 1, 1, 1], "full_shape": [6, 1, 2, 3]}}
    for layer, failures in ((0, ["a"]), (4, []), (5, [])):  # layer 5 is not stored
        changed = ours.copy()
        changed[layer, 0, 1, 1] = 3e-3
        report = Report(case_of(tmp_path, described, a=stored[::2]))
        report.array("a", changed, atol=limits.logits)
        assert report.failures == failures, layer
    report = Report(case_of(tmp_path, a=stored))
    report.array("a", ours, atol=limits.logits, bulk=limits.bulk)
    assert report.failures == ["a"]  # one of 36 is more than 0.1%


def test_numbers_by_name(tmp_path):
    case = case_of(
        tmp_path,
        {"b": {"step": [2, 3], "full_shape": [3, 4]}, "c": {"step": [2], "full_shape": [4]}},
        a=np.arange(3),
        b=np.array([[0, 3], [8, 11]]),
        c=np.array([1, 3]),
    )
    assert case.by_name("a", "xyz") == {"x": 0, "y": 1, "z": 2}
    assert case.by_name("b", "wxyz", row=2) == {"w": 8, "z": 11}
    assert case.by_name("b", "wxyz", row=1) == {}
    assert case.by_name("c", "wxyz") == {"w": 1, "y": 3}
    assert case.whole("c") is None and case.whole("d") is None
    with pytest.raises(UnsupportedCase, match="a has 3 rows, not 4"):
        case.by_name("a", "wxyz")


def test_ranks_of_close_scores_are_not_clear():
    """The last score is the best that is not kept."""
    scores = np.array([[1.0, 0.9, 0.8999, 0.5, 0.4999]])
    np.testing.assert_array_equal(clear_ranks(scores, 1e-3), [[True, False, False, False]])
