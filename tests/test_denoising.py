"""Query denoising: layout, noise, mask and loss against plain loops, and no leak of objects.

The leak tests run a whole small detector. Two calls of one compiled program must agree to the bit,
because a masked weight is exactly zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fast_jit import fast_jit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_detector import GROUPS, by_group, image_batch, object_noise

from dn_detr_jax import denoising
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.training.step import criterion

# --- layout and noise -----------------------------------------------------------------------------

BATCH, OBJECTS, CLASSES = 2, 3, 4
prepare = fast_jit(
    denoising.prepare, static_argnames=("groups", "label_noise", "box_noise", "contrastive")
)
draw = fast_jit(denoising.draw_noise, static_argnums=(1, 2), static_argnames="contrastive")


def targets(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (BATCH, OBJECTS)).astype(np.int32)
    return labels, oracle.random_boxes(rng, BATCH, OBJECTS), np.arange(OBJECTS) < [[3], [1]]


def prepared(groups=GROUPS, label_noise=0.2, box_noise=0.4, contrastive=False):
    slots = denoising.slots_needed(OBJECTS, groups, contrastive)
    noise = draw(jax.random.key(3), (BATCH, slots), CLASSES, contrastive=contrastive)
    options = {"groups": groups, "label_noise": label_noise, "box_noise": box_noise}
    return prepare(*targets(), noise, **options, contrastive=contrastive), noise


@pytest.mark.parametrize("contrastive", [False, True])
def test_slot_of_every_object_in_every_group(contrastive):
    """Catches a layout that gives targets to other queries.

    Negatives follow the positives of their group. Each image has its own number of them; the
    PyTorch code takes it from the whole batch.
    """
    labels, boxes, valid = targets()
    dn, _ = prepared(contrastive=contrastive)
    copies = 2 if contrastive else 1
    assert dn.num_slots == GROUPS * OBJECTS * copies
    for b, g, copy, m in np.ndindex(BATCH, GROUPS, copies, OBJECTS):
        slot = (g * copies + copy) * OBJECTS + m
        assert dn.group[b, slot] == g
        assert dn.valid[b, slot] == valid[b, m]
        assert dn.negative[b, slot] == (copy == 1)
        assert dn.target_labels[b, slot] == (-1 if copy else labels[b, m])
        np.testing.assert_array_equal(dn.target_boxes[b, slot], boxes[b, m])


def test_noise_of_a_wrong_number_of_slots_is_refused():
    label = np.zeros((BATCH, 5))
    noise = denoising.Noise(label_u=label, label_new=label, box_u=np.zeros((BATCH, 5, 4)))
    options = {"groups": 3, "label_noise": 0.2, "box_noise": 0.4}
    with pytest.raises(ValueError, match="5 slots, but 3 groups of 3 objects need 9"):
        denoising.prepare(*targets(), noise, **options)
    with pytest.raises(ValueError, match="3 objects, positive and negative, need 18"):
        denoising.prepare(*targets(), noise, **options, contrastive=True)
    noise = draw(jax.random.key(0), (BATCH, 18), CLASSES)
    with pytest.raises(ValueError, match="contrastive=True"):
        denoising.prepare(*targets(), noise, **options, contrastive=True)


@pytest.mark.parametrize("contrastive", [False, True])
def test_without_noise_queries_are_the_targets(contrastive):
    dn, _ = prepared(label_noise=0.0, box_noise=0.0, contrastive=contrastive)
    labels, _, _ = targets()
    copies = GROUPS * (2 if contrastive else 1)
    np.testing.assert_array_equal(dn.labels, np.tile(labels, (1, copies)))
    np.testing.assert_array_equal(dn.target_labels, np.where(dn.negative, -1, dn.labels))
    np.testing.assert_allclose(dn.boxes, dn.target_boxes, atol=1e-6 if contrastive else 0)


def test_a_negative_has_a_label_with_noise_of_its_own():
    """As in DINO: a content "no object" would tell the decoder the answer."""
    dn, noise = prepared(label_noise=0.5, contrastive=True)
    labels, _, _ = targets()
    flips = np.asarray(noise.label_u) < 0.5
    given = np.tile(labels, (1, 2 * GROUPS))
    np.testing.assert_array_equal(dn.labels, np.where(flips, noise.label_new, given))
    negative = np.asarray(dn.negative)
    assert 0 < flips[negative].mean() < 1 and 0 < flips[~negative].mean() < 1


add_contrastive = fast_jit(denoising.add_contrastive_box_noise)


def test_contrastive_noise_moves_sides_by_themselves_and_negatives_further():
    """Positives move by up to `scale` half sides, negatives by once to twice that, both ways.

    Catches the two mixed up, noise of the whole side, and sides that move together.
    """
    box, scale, many = np.float32([0.5, 0.4, 0.2, 0.1]), 0.4, 4000
    boxes = np.broadcast_to(box, (1, many, 4))
    negative = np.arange(many)[None] % 2 == 1
    noise = draw(jax.random.key(5), (1, many), CLASSES, contrastive=True)
    got = np.asarray(add_contrastive(boxes, noise, scale, negative), np.float64)
    corners = np.concatenate([got[..., :2] - got[..., 2:] / 2, got[..., :2] + got[..., 2:] / 2], -1)
    moved = (corners - oracle.corners(box)) / np.tile(box[2:] / 2, 2).astype(np.float64) / scale
    for flags, low, high in ((~negative, 0, 1), (negative, 1, 2)):
        share = moved[flags]
        histogram = np.histogram(np.abs(share), 4, (low, high))[0] / share.size
        np.testing.assert_allclose(histogram, 0.25, atol=0.03)  # all within, and uniform
        np.testing.assert_allclose(np.mean(share > 0, axis=0), 0.5, atol=0.06)
        np.testing.assert_allclose(np.corrcoef(share.T), np.eye(4), atol=0.12)


def test_contrastive_noise_stays_in_the_image():
    """Corners are clipped; crossing sides give a box without extent, not a negative one."""
    boxes = np.float32([[[0.1, 0.9, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]])
    noise = denoising.Noise(
        label_u=None,
        label_new=None,
        box_u=np.ones((1, 2, 4), np.float32),
        box_sign=np.float32([[[-1, 1, -1, 1], [1, 1, -1, -1]]]),
    )
    got = add_contrastive(boxes, noise, 0.9, np.array([[True, True]]))
    want = [[[0.01, 0.99, 0.02, 0.02], [0.5, 0.5, 0, 0]]]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_signs_leave_the_other_draws_as_they_are():
    """Turning contrastive denoising on keeps the noise of a seed; signs are their own draws."""
    plain = draw(jax.random.key(1), (2, 1000), 3)
    signed = draw(jax.random.key(1), (2, 1000), 3, contrastive=True)
    for name in ("label_u", "label_new", "box_u"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(signed, name))
    assert plain.box_sign is None
    assert set(np.unique(signed.box_sign)) == {-1, 1}
    correlation = np.corrcoef(signed.box_sign.ravel(), signed.box_u.ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(8000)


def test_label_noise_flips_at_its_rate_to_any_real_class():
    """Catches a shifted range of classes, the extra row as a label, and a wrong rate.

    A flip draws from all the classes, so one in C of them does not show.
    """
    classes, slots, rate = 5, 20_000, 0.3
    noise = draw(jax.random.key(0), (4, slots), classes)
    labels = jnp.full((4, slots), 2)
    got = np.asarray(denoising.add_label_noise(labels, noise, rate))
    frequency = np.bincount(got.ravel(), minlength=classes) / got.size
    want = np.full(classes, rate / classes)
    want[2] += 1 - rate
    assert len(frequency) == classes
    # Five standard deviations of a binomial share of 80,000 draws.
    np.testing.assert_allclose(frequency, want, atol=5 * 0.5 / np.sqrt(got.size))
    np.testing.assert_array_equal(denoising.add_label_noise(labels, noise, 1.0), noise.label_new)


add_box_noise = fast_jit(denoising.add_box_noise)
# Just above -1 and below 1 at the most, as the uniform draws give it.
draws = hnp.arrays(np.float32, (1, 4, 4), elements=st.floats(0, 1, width=32, exclude_max=True))
seeds, scales = st.integers(0, 2**32 - 1), st.floats(0, 0.99)


@given(draws, seeds, scales)
def test_box_noise_stays_in_its_bounds(box_u, seed, scale):
    """Centers stay in their box, sides within 1 +- scale, everything in the image.

    Catches noise twice as large (the paper's lambda is of half a side), and axes mixed up.
    """
    boxes = oracle.random_boxes(np.random.default_rng(seed), 1, 4)
    noise = denoising.Noise(label_u=None, label_new=None, box_u=box_u)
    got = np.asarray(add_box_noise(boxes, noise, scale))
    shift, sides = np.abs(got - boxes)[..., :2], got[..., 2:]
    assert np.all(shift <= scale * boxes[..., 2:] / 2 + 1e-6)
    assert np.all(sides >= (1 - scale) * boxes[..., 2:] - 1e-6)
    assert np.all(sides <= (1 + scale) * boxes[..., 2:] + 1e-6)
    assert np.all((got >= 0) & (got <= 1))


def test_box_noise_reaches_its_bounds_and_follows_its_draws():
    """Catches noise that is too small, shared between coordinates, or of one sign."""
    box = np.float32([0.5, 0.4, 0.2, 0.1])
    for box_u, want in (
        ([0, 0, 0, 0], [0.46, 0.38, 0.12, 0.06]),
        ([1, 1, 1, 1], [0.54, 0.42, 0.28, 0.14]),
        ([0.5, 1, 0, 0.75], [0.5, 0.42, 0.12, 0.12]),
    ):
        noise = denoising.Noise(label_u=None, label_new=None, box_u=np.float32(box_u))
        np.testing.assert_allclose(denoising.add_box_noise(box, noise, 0.4), want, rtol=1e-6)


def test_box_noise_is_clipped_to_the_image():
    box = np.float32([0.01, 0.99, 0.9, 0.9])
    noise = denoising.Noise(label_u=None, label_new=None, box_u=np.float32([0, 1, 1, 1]))
    np.testing.assert_array_equal(denoising.add_box_noise(box, noise, 0.5), [0, 1, 1, 1])


def test_draws_are_uniform_independent_and_repeatable():
    """Catches one random key used twice: labels that flip exactly where boxes shrink."""
    noise = draw(jax.random.key(1), (4, 5000), 3)
    columns = np.stack([noise.label_u, noise.label_new, *np.moveaxis(noise.box_u, -1, 0)])
    correlation = np.corrcoef(columns.reshape(6, -1))
    assert np.abs(correlation - np.eye(6)).max() < 5 / np.sqrt(20_000)
    assert np.mean(noise.label_u.ravel() == noise.box_u.ravel()[:20_000]) < 0.01
    for uniform in (noise.label_u, noise.box_u):
        assert uniform.min() >= 0 and uniform.max() < 1
        histogram = np.histogram(uniform, 4, (0, 1))[0] / uniform.size
        np.testing.assert_allclose(histogram, 0.25, atol=0.02)
    again, other = (draw(jax.random.key(k), (4, 5000), 3) for k in (1, 2))
    np.testing.assert_array_equal(noise.box_u, again.box_u)
    assert np.mean(noise.box_u == other.box_u) < 0.01


# --- packing --------------------------------------------------------------------------------------

PLACES = 6  # slots for objects


@fast_jit
def _in_both_layouts(counts, key):
    """Prepared queries of both kinds, and packed ones by (contrastive, slots)."""
    rng = np.random.default_rng(0)
    valid = np.arange(PLACES)[::-1] < counts[:, None]  # real objects are not always the first
    labels, boxes = rng.integers(0, CLASSES, valid.shape), oracle.random_boxes(rng, *valid.shape)
    options = {"groups": GROUPS, "label_noise": 0.5, "box_noise": 0.4}
    found = {}
    for contrastive in (False, True):
        shape = (len(valid), denoising.slots_needed(PLACES, GROUPS, contrastive))
        noise = denoising.draw_noise(
            key, shape, CLASSES, contrastive=contrastive, num_objects=PLACES
        )
        paper = denoising.prepare(labels, boxes, valid, noise, **options, contrastive=contrastive)
        for slots in (4, 9, 100):
            kept = denoising.limit_objects(valid, noise.priority, slots // (1 + contrastive))
            dn = denoising.prepare(labels, boxes, kept, noise, **options, contrastive=contrastive)
            found[contrastive, slots] = paper, kept, denoising.pack(dn, slots)
    return found


@pytest.mark.parametrize("slots", [4, 9, 100])
@pytest.mark.parametrize("contrastive", [False, True])
def test_packed_slots_hold_whole_groups_with_the_noise_they_had(contrastive, slots):
    """Catches a group cut in two, slots of another image, and a copy that changes its noise.

    0 to 6 objects in 4, 9 or any number of slots: 3 groups, fewer, and more objects than slots.
    """
    counts, copies = np.array([0, 1, 2, 3, 4, 6]), 2 if contrastive else 1
    paper, kept, packed = _in_both_layouts(counts, jax.random.key(2))[contrastive, slots]
    assert packed.num_slots == min(slots, GROUPS * PLACES * copies)
    fields = ("labels", "boxes", "group", "target_labels", "target_boxes", "negative")
    targets = 0
    for b, count in enumerate(counts):
        objects = np.flatnonzero(kept[b])
        assert len(objects) == min(count, slots // copies)
        groups = min(GROUPS, slots // max(copies * len(objects), 1))
        assert groups >= 1
        targets += groups * len(objects)
        want = [
            (g * copies + copy) * PLACES + m
            for g in range(groups)
            for copy in range(copies)
            for m in objects
        ]
        used = np.arange(packed.num_slots) < len(want)
        np.testing.assert_array_equal(packed.valid[b], used)
        np.testing.assert_array_equal(packed.group[b][~used], -1)
        for name in fields:
            got = getattr(packed, name)[b][used]
            np.testing.assert_array_equal(got, getattr(paper, name)[b][np.array(want, int)])
    assert packed.num_targets == targets


def test_objects_that_do_not_fit_are_left_out_at_random():
    """Catches the same objects left out in every step, and padding taken for an object."""
    valid = np.arange(8) < np.array([[8], [5], [0]])
    priority = jax.random.uniform(jax.random.key(0), (2000, 3, 8))
    kept = np.asarray(
        fast_jit(denoising.limit_objects, static_argnums=2)(
            np.tile(valid, (2000, 1)), priority.reshape(-1, 8), 5
        )
    ).reshape(2000, 3, 8)
    np.testing.assert_array_equal(kept.sum(axis=2), np.tile([5, 5, 0], (2000, 1)))
    np.testing.assert_allclose(kept[:, 0].mean(axis=0), 5 / 8, atol=0.05)
    np.testing.assert_array_equal(kept[:, 1:], np.tile(valid[1:], (2000, 1, 1)))


def test_packed_and_paper_layout_have_the_same_loss(tiny):
    """Compares 12 slots with 21, for images whose groups all fit, with the same noise."""
    batch, noise = image_batch(7), object_noise(7)

    def losses(params, batch, noise):
        options = {"groups": GROUPS, "label_noise": 0.2, "box_noise": 0.4}
        dn = denoising.prepare(batch["labels"], batch["boxes"], batch["valid"], noise, **options)
        dn = denoising.pack(dn, 12)
        images = normalize_images(batch["image"], batch["size"])
        outputs = tiny.model.apply({"params": params}, images, batch["size"], dn)
        assert outputs["pred_logits"].shape[2] == 12 + 8
        return criterion(outputs, dn, batch, config=tiny.config, mesh=tiny.mesh)[:2]

    total, terms = fast_jit(losses)(tiny.params, batch, noise)
    want = tiny.train(tiny.params, batch, noise)
    np.testing.assert_allclose(total, want.total, rtol=1e-5)
    assert_close(terms, want.terms)


# --- queries and mask -----------------------------------------------------------------------------


@pytest.mark.parametrize("contrastive", [False, True])
def test_queries_of_real_and_of_empty_slots(contrastive):
    """Embedding of the noised label and indicator 1; zeros and a neutral anchor for empty slots."""
    dn, _ = prepared(label_noise=1.0, contrastive=contrastive)
    table = np.random.default_rng(0).normal(size=(CLASSES + 1, 7)).astype(np.float32)
    content, anchors = denoising.query_content(table, dn), denoising.query_boxes(dn)
    for b, s in np.ndindex(BATCH, dn.num_slots):
        if dn.valid[b, s]:
            np.testing.assert_array_equal(content[b, s], [*table[dn.labels[b, s]], 1])
            np.testing.assert_array_equal(anchors[b, s], dn.boxes[b, s])
        else:
            np.testing.assert_array_equal(content[b, s], 0)
            np.testing.assert_array_equal(anchors[b, s], 0.5)
    assert 0 < dn.valid.sum() < dn.valid.size
    # A label that is not known has the last row: -1 clipped to 0 would be a real class.
    unknown = dn.replace(labels=np.full_like(dn.labels, denoising.NO_OBJECT))
    shown = denoising.query_content(table, unknown)[dn.valid]
    np.testing.assert_array_equal(shown, np.tile([*table[-1], 1], (len(shown), 1)))
    # Without indicator the embedding is all of the content, as in DINO.
    without = denoising.query_content(table, dn, indicator=False)
    np.testing.assert_array_equal(without, content[..., :-1])


attention_mask = fast_jit(
    denoising.attention_mask, static_argnums=1, static_argnames="attend_padding"
)


@pytest.mark.parametrize("attend_padding", [False, True])
@given(hnp.arrays(bool, (2, 6)), hnp.arrays(np.int32, (2, 6), elements=st.integers(-1, 2)))
def test_mask_equals_a_slow_loop(attend_padding, valid, group):
    """Covers all layouts of groups, including slots without a group."""
    valid = valid & (group >= 0)
    fields = dict.fromkeys(("labels", "boxes", "target_labels", "target_boxes", "negative"))
    dn = denoising.Denoising(group=group, valid=valid, **fields)
    mask = np.asarray(attention_mask(dn, 3, attend_padding=attend_padding))
    want = np.zeros((2, 9, 9), bool)
    for b, row, column in np.ndindex(want.shape):
        if column >= 6:
            want[b, row, column] = True  # all queries attend to matching queries
        elif row < 6 and group[b, column] >= 0 and group[b, row] == group[b, column]:
            want[b, row, column] = attend_padding or valid[b, column]
    np.testing.assert_array_equal(mask, want)
    assert mask.any(axis=-1).all()  # a row without a True would be a softmax over nothing


def test_split_cuts_behind_the_slots():
    dn, _ = prepared()
    outputs = np.arange(2 * (9 + 5) * 3).reshape(2, 14, 3)
    first, second = denoising.split(outputs, dn)
    np.testing.assert_array_equal(first, outputs[:, :9])
    np.testing.assert_array_equal(second, outputs[:, 9:])
    first, second = denoising.split(outputs, None)
    assert first.shape == (2, 0, 3)
    np.testing.assert_array_equal(second, outputs)


# --- reconstruction loss --------------------------------------------------------------------------

LAYERS = 2
reconstruction = fast_jit(denoising.reconstruction_loss)


def loss_sum(logits, boxes, dn):
    terms = denoising.reconstruction_loss(logits, boxes, dn)
    return sum(terms[name].sum() for name in ("loss_ce", "loss_bbox", "loss_giou"))


loss_gradient = fast_jit(jax.grad(loss_sum, argnums=(0, 1)))


def predictions(slots, seed=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (LAYERS, BATCH, slots, CLASSES)).astype(np.float32)
    return logits, oracle.random_boxes(rng, LAYERS, BATCH, slots)


@pytest.mark.parametrize("contrastive", [False, True])
def test_reconstruction_loss_equals_a_plain_loop(contrastive):
    """The loss of each layer, over real slots, is divided by (objects in the batch) x groups.

    Negatives have no class, no box, and do not count.
    """
    labels, boxes, valid = targets()
    dn, _ = prepared(label_noise=1.0, contrastive=contrastive)
    pred_logits, pred_boxes = predictions(dn.num_slots)
    got = reconstruction(pred_logits, pred_boxes, dn)
    want = {name: np.zeros(LAYERS) for name in ("loss_ce", "loss_bbox", "loss_giou", "class_error")}
    count = 4 * GROUPS  # 3 + 1 objects
    copies = 2 if contrastive else 1
    for layer, b, g, copy, m in np.ndindex(LAYERS, BATCH, GROUPS, copies, OBJECTS):
        if not valid[b, m]:
            continue
        slot = (g * copies + copy) * OBJECTS + m
        logits, box = (x[layer, b, slot] for x in (pred_logits, pred_boxes))
        target = None if copy else labels[b, m]  # the true one, not the noised one
        want["loss_ce"][layer] += sum(oracle.focal(x, c == target) for c, x in enumerate(logits))
        if copy:
            continue
        want["loss_bbox"][layer] += np.abs(box.astype(np.float64) - boxes[b, m]).sum()
        want["loss_giou"][layer] += 1 - oracle.giou(box, boxes[b, m])
        want["class_error"][layer] += 100 * (np.argmax(logits) != target)
    assert set(got) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values / count, rtol=2e-5, err_msg=name)


def test_reconstruction_without_objects_is_zero_with_finite_gradients():
    """Catches 0 / 0 in a batch without objects, and gradient into empty slots."""
    dn, _ = prepared()
    pred = predictions(dn.num_slots)
    by_logits, by_boxes = loss_gradient(*pred, dn)
    for gradient in (by_logits, by_boxes):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(np.any(gradient != 0, axis=(0, 3)), dn.valid)

    dn = dn.replace(valid=jnp.zeros_like(dn.valid))
    assert all(np.array_equal(x, np.zeros(LAYERS)) for x in reconstruction(*pred, dn).values())
    assert not any(np.any(gradient) for gradient in loss_gradient(*pred, dn))


# --- nothing leaks --------------------------------------------------------------------------------


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-5), a, b)


def differs(a, b):
    return any(np.abs(a[name] - b[name]).max() > 1e-3 for name in a)


@pytest.fixture(scope="module")
def result(tiny):
    """Returns the result of the batch and the noise that the other tests vary."""
    return tiny.train(tiny.params, image_batch(), object_noise())


def test_matching_queries_do_not_see_denoising_queries(tiny, result):
    """Catches the paper's leak, objects that the matching part sees in training only."""
    batch = image_batch()
    plain = tiny.detect(tiny.params, batch["image"], batch["size"])
    assert_close(result.match, plain)
    other = tiny.train(tiny.params, batch, object_noise(seed=9))
    assert_equal(other.match, result.match)
    assert differs(other.dn, result.dn)


def test_groups_do_not_see_each_other(tiny, result):
    """Catches a leak between groups: several noised copies together reveal the true box."""
    first, other = object_noise(), object_noise(seed=9)
    slots = np.arange(first.label_u.shape[1]) < 4  # group 0
    mixed = jax.tree.map(
        lambda a, b: np.where(slots.reshape(-1, *[1] * (a.ndim - 2)), b, a), first, other
    )
    got = tiny.train(tiny.params, image_batch(), mixed)
    assert_equal(got.match, result.match)
    got, want = by_group(got.dn), by_group(result.dn)
    assert_equal(
        {k: v[:, :, 1:] for k, v in got.items()}, {k: v[:, :, 1:] for k, v in want.items()}
    )
    assert differs(
        {k: v[:, :, 0] for k, v in got.items()}, {k: v[:, :, 0] for k, v in want.items()}
    )


def test_objects_of_a_group_see_each_other(tiny, result):
    """Catches a mask that hides everything, which would pass the tests above."""
    noise = object_noise()
    noise.box_u[0, 0] = 1 - noise.box_u[0, 0]  # object 0 of group 0
    got = by_group(tiny.train(tiny.params, image_batch(), noise).dn)
    want = by_group(result.dn)
    neighbor = (slice(None), 0, 0, 1)
    assert differs(
        {k: v[neighbor] for k, v in got.items()}, {k: v[neighbor] for k, v in want.items()}
    )


def test_content_of_empty_slots_changes_nothing(tiny, result):
    """Catches a dependence on the content of the padding; outputs and losses are bit-equal."""
    batch = image_batch()
    invalid = ~batch["valid"]
    batch["labels"][invalid] = 77
    batch["boxes"][invalid] = -3.0
    got = tiny.train(tiny.params, batch, object_noise())
    assert_equal(got.match, result.match)
    assert_equal((got.total, got.terms), (result.total, result.terms))
    real = np.tile(batch["valid"], (1, GROUPS))
    assert_equal(*({k: v[:, real] for k, v in r.dn.items()} for r in (got, result)))


@pytest.mark.parametrize("attend_padding", [False, True])
def test_more_slots_for_objects_change_nothing(tiny, result, attend_padding):
    """Four or seven slots for the same objects give the same results.

    With `attend_padding`, as in the PyTorch code, they change the results, since an image then
    depends on the rest of its batch.
    """

    def run(objects):
        batch, noise = image_batch(objects), object_noise(objects)
        got = tiny.train(tiny.params, batch, noise, attend_padding=attend_padding)
        real = {k: v[:, :, :, :4] for k, v in by_group(got.dn).items()}
        valid = batch["valid"][:, None, :4].repeat(GROUPS, axis=1)
        return got, {k: v[:, valid] for k, v in real.items()}

    (few, few_dn), (many, many_dn) = run(4), run(7)
    assert_close(few.match, many.match)
    if attend_padding:
        assert differs(few_dn, many_dn)
    else:
        assert_close(few_dn, many_dn)
        assert_close((few.total, few.terms), (many.total, many.terms), 1e-4)


def test_the_rest_of_the_batch_changes_nothing(tiny, result):
    """Catches an image whose results depend on the other images of its batch."""
    batch = image_batch()
    batch["image"][1:] = batch["image"][1:, ::-1]
    batch["valid"][1:] = True
    batch["size"][1:] = 64
    got = tiny.train(tiny.params, batch, object_noise())
    for now, before in ((got.match, result.match), (got.dn, result.dn)):
        assert_equal({k: v[:, 0] for k, v in now.items()}, {k: v[:, 0] for k, v in before.items()})


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", ["none", "mixed"])
def test_loss_and_gradients_are_finite(tiny, objects):
    """Covers a batch without objects, and one with an image without objects."""
    batch = image_batch()
    batch["valid"] &= objects == "mixed"
    (loss, terms), gradient = tiny.loss_and_gradient(tiny.params, batch, object_noise())
    assert np.isfinite(loss) and loss > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((terms, gradient)))
    dn_terms = np.array([v for k, v in terms.items() if k.startswith("dn_loss")])
    assert len(dn_terms) == 6
    assert np.all(dn_terms > 0) if objects == "mixed" else not dn_terms.any()
