"""Noise beyond the published one, against plain NumPy formulas, and its way from the config."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import tiny
from fast_jit import fast_jit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from dn_detr_jax import denoising, noise
from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.queries import LabelQueries
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.training.setup import warn_of_leak
from dn_detr_jax.training.step import denoising_queries

BATCH, OBJECTS, GROUPS, CLASSES = 2, 3, 4, 5
KINDS = list(itertools.product(noise.DISTRIBUTIONS, noise.PARTS))
SHAPE = ("distribution", "parts")
add_box_noise = fast_jit(noise.add_box_noise, static_argnames=SHAPE)
add_contrastive = fast_jit(noise.add_contrastive_box_noise, static_argnames=SHAPE)
BOXES = oracle.random_boxes(np.random.default_rng(0), BATCH, GROUPS * OBJECTS)
NEGATIVE = np.arange(GROUPS * OBJECTS) % 2 * np.ones((BATCH, 1)) == 1


def draws(slots=GROUPS * OBJECTS, seed=0):
    return noise.draw_noise(
        jax.random.key(seed), (BATCH, slots), CLASSES, contrastive=True, num_objects=OBJECTS
    )


def quantiles(share, distribution):
    """Returns SciPy's quantiles of a distribution, for shares of its probability in [0, 1]."""
    return {
        "uniform": stats.uniform(-1, 2),
        "normal": stats.norm(scale=0.5),
        "truncated_normal": stats.truncnorm(-2, 2, scale=0.5),
    }[distribution].ppf(share)


# Distributions and parts


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_displacements_have_the_quantiles_of_their_distribution(distribution):
    """Catches a wrong standard deviation, a wrong cut, and an infinite displacement of a draw."""
    share = np.linspace(0.001, 0.999, 999).reshape(-1, 1).repeat(4, axis=1)
    got = noise.displacement(np.float32(2 * share - 1), distribution)
    np.testing.assert_allclose(got, quantiles(share, distribution), atol=1e-4)
    ends = np.asarray(noise.displacement(np.float32([-1, -0.0, 0, 1]), distribution))
    assert np.isfinite(ends).all() and ends[0] == -ends[3] and not ends[1:3].any()
    assert 2 < ends[3] < 3 if distribution == "normal" else 0.999999 < ends[3] <= 1


def test_the_published_noise_keeps_its_bits():
    """Catches another order of the float32 operations, by which runs would not repeat."""
    drawn, half = draws(), BOXES[..., 2:] / 2
    u, sign = np.asarray(drawn.box_u), np.asarray(drawn.box_sign)
    want = BOXES + (np.float32(2) * u - 1) * np.concatenate([half, 2 * half], -1) * np.float32(0.4)
    got = noise.add_box_noise(BOXES, drawn, 0.4)
    np.testing.assert_array_equal(got, np.clip(want, 0, 1))
    corners = np.concatenate([BOXES[..., :2] - half, BOXES[..., :2] + half], -1)
    distance = u + NEGATIVE[..., None].astype(np.float32)
    corners += sign * distance * np.concatenate([half, half], -1) * np.float32(0.4)
    low, high = np.split(np.clip(corners, 0, 1), 2, axis=-1)
    want = np.maximum(np.concatenate([(low + high) / 2, high - low], -1), 0)
    got = noise.add_contrastive_box_noise(BOXES, drawn, 0.4, NEGATIVE)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("distribution", "parts"), KINDS)
def test_box_noise_equals_a_plain_formula(distribution, parts):
    """Catches a part that moves although it should not, and another distribution than named."""
    drawn, scale = draws(), 0.7
    got = add_box_noise(BOXES, drawn, scale, distribution=distribution, parts=parts)
    x, y, w, h = np.moveaxis(BOXES.astype(np.float64), -1, 0)
    dx, dy, dw, dh = np.moveaxis(quantiles(np.asarray(drawn.box_u, float), distribution), -1, 0)
    if parts != "size":
        x, y = x + scale * dx * w / 2, y + scale * dy * h / 2
    if parts != "center":
        w, h = w * (1 + scale * dw), h * (1 + scale * dh)
    np.testing.assert_allclose(got, np.clip(np.stack([x, y, w, h], -1), 0, 1), atol=1e-5)


@pytest.mark.parametrize(("distribution", "parts"), KINDS)
def test_contrastive_box_noise_equals_a_plain_formula(distribution, parts):
    """Opposite sides are independent, move together (center), or mirror each other (size)."""
    drawn, scale = draws(), 0.7
    got = add_contrastive(BOXES, drawn, scale, NEGATIVE, distribution=distribution, parts=parts)
    u, sign = np.asarray(drawn.box_u, float), np.asarray(drawn.box_sign)
    # The absolute value of a symmetric variable has the quantiles of its upper half.
    distance = quantiles((1 + u) / 2, distribution) + NEGATIVE[..., None]
    left, top, right, bottom = np.moveaxis(sign * distance * scale, -1, 0)
    right, bottom = {
        "both": (right, bottom),
        "center": (left, top),
        "size": (-left, -top),
    }[parts]
    x, y, w, h = np.moveaxis(BOXES.astype(np.float64), -1, 0)
    sides = [x - w / 2 + left * w / 2, y - h / 2 + top * h / 2]
    sides += [x + w / 2 + right * w / 2, y + h / 2 + bottom * h / 2]
    left, top, right, bottom = np.clip(sides, 0, 1)
    want = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    np.testing.assert_allclose(got, np.maximum(np.stack(want, -1), 0), atol=1e-5)


any_draws = hnp.arrays(np.float32, (1, 4, 4), elements=st.floats(0, 1, width=32))
signs = hnp.arrays(bool, (1, 4, 4))
few_scales = st.sampled_from([0.0, 0.4, 0.99, 1.0, 3.0, 1e6])


@pytest.mark.parametrize(("distribution", "parts"), KINDS)
@given(any_draws, signs, st.integers(0, 99), few_scales)
def test_no_scale_gives_a_box_without_meaning(distribution, parts, box_u, positive, seed, scale):
    """Positives and negatives have sides of at least 0 and no NaN, far above the allowed scales."""
    boxes = oracle.random_boxes(np.random.default_rng(seed), 1, 4)
    sign = np.where(positive, 1, -1).astype(np.float32)
    drawn = noise.Noise(label_u=None, label_new=None, box_u=box_u, box_sign=sign)
    shape = {"distribution": distribution, "parts": parts}
    plain = add_box_noise(boxes, drawn, scale, **shape)
    contrastive = add_contrastive(boxes, drawn, scale, np.arange(4)[None] % 2 == 1, **shape)
    for got in map(np.asarray, (plain, contrastive)):
        assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("add", [noise.add_box_noise, noise.add_contrastive_box_noise])
def test_unknown_kinds_are_refused(add):
    negative = () if add is noise.add_box_noise else (NEGATIVE,)
    with pytest.raises(ValueError, match="'gauss': expected one of uniform, normal, trunc"):
        add(BOXES, draws(), 0.4, *negative, distribution="gauss")
    with pytest.raises(ValueError, match="'width': expected one of both, center, size"):
        add(BOXES, draws(), 0.4, *negative, parts="width")


# Groups


def config_of(**dn):
    config = base_config()
    config.model.num_classes = CLASSES
    config.dn.update(groups=GROUPS, slots=100)
    config.dn.update(dn)
    validate(config)
    return config


def batch_of_boxes():
    return {
        "labels": np.arange(BATCH * OBJECTS, dtype=np.int32).reshape(BATCH, OBJECTS) % CLASSES,
        "boxes": BOXES[:, :OBJECTS],
        "valid": np.arange(OBJECTS) < np.array([[3], [2]]),
    }


def queries(layout="paper", **dn):
    config = config_of(layout=layout, **dn)
    batch = jax.tree.map(jnp.asarray, batch_of_boxes())
    return denoising_queries(batch, jax.random.key(1), config)


@pytest.mark.parametrize("layout", ["paper", "packed"])
@pytest.mark.parametrize("contrastive", [False, True])
def test_every_group_has_the_noise_of_its_own_scale(contrastive, layout):
    """Compares each group with the same group of a config with that scale for all.

    Catches scales that follow objects or slots, and draws that change with the settings.
    """
    same = {"layout": layout, "contrastive": contrastive, "box_distribution": "truncated_normal"}
    got = queries(**same, box_noise_by_group=(0.1, 0.7), label_noise_by_group=(1.0, 0.0))
    assert got.valid.sum() == GROUPS * 5 * (2 if contrastive else 1)
    for group, scales in enumerate([(0.1, 1.0), (0.3, 2 / 3), (0.5, 1 / 3), (0.7, 0.0)]):
        want = queries(**same, box_noise=scales[0], label_noise=scales[1])
        here = np.asarray(got.group == group)
        np.testing.assert_array_equal(got.boxes[here], want.boxes[here])
        np.testing.assert_array_equal(got.labels[here], want.labels[here])


def test_a_number_of_scales_that_is_not_that_of_groups_is_refused():
    batch, options = batch_of_boxes(), {"groups": GROUPS, "label_noise": 0.2}
    with pytest.raises(ValueError, match=r"\(0\.1, 0\.2\): expected 4, one for each group"):
        denoising.prepare(*batch.values(), draws(), box_noise=(0.1, 0.2), **options)
    np.testing.assert_allclose(denoising.over_groups((0.3,), 3), [0.3] * 3)
    np.testing.assert_allclose(denoising.over_groups((0.5, 0.1), 1), [0.5])


# Labels, mask and indicator


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_labels_flip_never_or_always(rate):
    """Catches a comparison that lets the extreme probabilities keep or flip some labels."""
    drawn = draws()
    labels = np.full((BATCH, GROUPS * OBJECTS), 2, np.int32)
    got = denoising.add_label_noise(labels, drawn, rate)
    np.testing.assert_array_equal(got, drawn.label_new if rate else labels)


def test_without_label_denoising_labels_are_neither_shown_nor_asked_for():
    """The loss of boxes stays the same. Catches a label that stays in the content."""
    dn, plain = queries(label_denoising=False), queries()
    np.testing.assert_array_equal(dn.labels, denoising.NO_OBJECT)
    np.testing.assert_array_equal(dn.boxes, plain.boxes)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, BATCH, dn.num_slots, CLASSES)).astype(np.float32)
    pred = logits, oracle.random_boxes(rng, 2, BATCH, dn.num_slots)
    got, want = (fast_jit(denoising.reconstruction_loss)(*pred, x) for x in (dn, plain))
    np.testing.assert_array_equal(got.pop("loss_ce"), 0)
    assert np.all(want.pop("loss_ce") > 0)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("layout", ["paper", "packed"])
def test_without_mask_all_see_all_real_queries(layout):
    """Catches an ablation that still hides groups, and one that attends to empty slots."""
    dn = queries(layout, mask=False)
    mask = np.asarray(denoising.attention_mask(dn, 6))
    columns = np.concatenate([dn.valid, np.ones((BATCH, 6), bool)], axis=1)
    np.testing.assert_array_equal(mask, np.broadcast_to(columns[:, None], mask.shape))
    assert not columns.all()
    padded = denoising.attention_mask(dn, 6, attend_padding=True)
    np.testing.assert_array_equal(
        padded[..., : dn.num_slots], (dn.group >= 0)[:, None] & padded[..., -1:]
    )


def test_a_training_without_mask_is_warned_of(caplog):
    warn_of_leak(config_of())
    warn_of_leak(config_of(mask=False, groups=0))
    assert not caplog.records
    warn_of_leak(config_of(mask=False))
    assert "dn.mask is False" in caplog.text


@pytest.mark.parametrize("indicator", [False, True])
def test_the_indicator_is_a_channel_of_its_own_or_absent(indicator):
    """Catches a table of another width, and an indicator in one kind of queries alone."""
    model = LabelQueries(CLASSES, hidden_dim=8, num_queries=6, indicator=indicator)
    tokens = np.zeros((BATCH, 1, 8), np.float32)
    whole = np.ones((BATCH, 1, 2), np.float32)
    levels = Levels(tokens, tokens, np.ones((BATCH, 1), bool), whole, ((1, 1),))
    dn = queries()
    found, params = fast_jit(model.init_with_output)(jax.random.key(0), levels, dn)
    table = params["params"]["label_embedding"]
    assert table.shape == (CLASSES + 1, 8 - indicator)
    content = np.split(np.asarray(found.content), [dn.num_slots], axis=1)
    labels = np.where(dn.valid[..., None], table[dn.labels], 0)
    matching = np.broadcast_to(table[-1], (BATCH, 6, 8 - indicator))
    if indicator:
        labels = np.concatenate([labels, dn.valid[..., None]], axis=-1)
        matching = np.concatenate([matching, np.zeros((BATCH, 6, 1))], axis=-1)
    np.testing.assert_array_equal(content[0], labels)
    np.testing.assert_array_equal(content[1], matching)


# The config


@pytest.mark.parametrize(
    ("dn", "message"),
    [
        ({"box_noise_by_group": (0.1,) * 5}, "at most dn.groups = 4 values"),
        ({"label_noise_by_group": (0.1, 1.1)}, "each a number from 0 to 1"),
        ({"box_noise_by_group": (0.1, 1.1)}, "each a number from 0 to 1"),
        ({"box_noise": 1.1}, "a number from 0 to 1"),
        ({"box_distribution": "gauss"}, "'uniform', 'normal', 'truncated_normal'"),
        ({"box_parts": "width"}, "'both', 'center', 'size'"),
        ({"label_denoising": False, "contrastive": True}, "negatives have a class loss alone"),
    ],
)
def test_wrong_settings_are_refused(dn, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**dn)


@pytest.mark.parametrize(("distribution", "parts"), KINDS)
def test_every_kind_of_noise_has_a_value_in_the_config(distribution, parts):
    """Catches names of the config that the functions do not know, and keys that do nothing."""
    dn = queries(box_distribution=distribution, box_parts=parts)
    drawn = noise.draw_noise(jax.random.key(1), (BATCH, GROUPS * OBJECTS), CLASSES)
    boxes = np.tile(batch_of_boxes()["boxes"], (1, GROUPS, 1))
    want = noise.add_box_noise(boxes, drawn, 0.4, distribution=distribution, parts=parts)
    np.testing.assert_array_equal(dn.boxes, want)


def test_a_detector_without_indicator_has_other_parameters():
    """Catches `model.indicator` that does not reach the queries."""
    shape = abstract_params(build_model(tiny.detector(indicator=False).model))["label_embedding"]
    assert shape.shape == (5, 16)
