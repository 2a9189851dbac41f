"""The page about denoising in other detectors, and what holds in every detector that calls it.

The checks run for the page's detector, for a toy variant and for every variant of the package; a
new variant is taken in by its registration. Two calls of one program must agree to the bit, because
a masked weight is exactly zero.
"""

import functools
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import toy_detector  # noqa: F401  registers a variant
from fast_jit import fast_jit
from tiny_detector import random_params

from dn_detr_jax import denoising
from dn_detr_jax.config import base_config, variants
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.registry import abstract_params, build_model

PAGE = Path(__file__).parent.parent / "docs" / "plug_in.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def run_page(choose=lambda block: True):
    """Runs the code of the page, or the blocks that are chosen, and returns its names."""
    module = types.ModuleType("plug_in")
    for block in filter(choose, BLOCKS):
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    return module


# Registers the page's detector.
run_page(lambda block: "class SmallDETR" in block or "register(" in block)
NAMES = variants.names()

GROUPS, CLASSES = 2, 5
SMALL = {
    "model.num_classes": CLASSES,
    "model.hidden_dim": 32,
    "model.num_heads": 2,
    "model.ffn_dim": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.num_queries": 7,
    "model.backbone_levels": 2,
    "model.encoder_points": 2,
    "model.decoder_points": 2,
    "model.backbone.depth": 18,
    "model.backbone.stages": 2,
    "model.backbone.width": 8,
    "model.backbone.norm": "group_norm",
    "model.backbone.stem": "light",
}


def test_the_page_runs(monkeypatch):
    """Catches code of the page that is out of date; it has assertions of its own."""
    monkeypatch.setattr(jax, "jit", fast_jit)
    page = run_page(lambda block: "register(" not in block)  # that one has been run above
    # The bridge trains the same detector, from other initial parameters.
    assert len(page.losses) == len(page.nnx_losses) == 20
    found = jax.eval_shape(page.model.apply, {"params": page.params}, page.images, page.sizes)
    assert found["pred_boxes"].shape == (2, 2, 10, 4)
    assert {"small_detr", "toy", "dn_dab_detr"} <= set(NAMES)


class Case:
    """A small detector of a variant, and one program for outputs and gradients."""

    def __init__(self, name):
        config = base_config(name)
        for path, value in SMALL.items():
            *sections, last = path.split(".")
            section = functools.reduce(lambda c, part: c.get(part) or {}, sections, config)
            if last in section:
                section[last] = value
        self.model = build_model(config.model)
        self.params = random_params(abstract_params(self.model))
        self.run = fast_jit(self._run)
        self.detect = fast_jit(self._detect)

    def _detect(self, params, image, size, dn):
        """Returns the outputs of denoising and of matching queries."""
        images = normalize_images(image, size)
        outputs = self.model.apply({"params": params}, images, size, dn)
        found = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
        parts = {name: denoising.split(x, dn) for name, x in found.items()}
        return tuple({name: part[i] for name, part in parts.items()} for i in (0, 1))

    def _run(self, params, image, size, dn):
        """Returns the outputs, and the gradient of a function of the matching queries."""

        def loss(params, boxes):
            dn_part, match = self._detect(params, image, size, dn.replace(boxes=boxes))
            weights = (jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in match.values())
            total = sum(jnp.sum(w * x) for w, x in zip(weights, match.values(), strict=True))
            return total, (dn_part, match)

        grads, outputs = jax.grad(loss, (0, 1), has_aux=True)(params, dn.boxes)
        return *outputs, *grads


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(request.param)


def image_batch(canvas=(64, 64)):
    image = np.zeros((2, *canvas, 3), np.uint8)
    image[:, :64, :64] = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3))
    return image, np.int32([[64, 64], [33, 50]])


def queries(objects=3, seed=0, box_noise=0.4):
    """Prepares positives and negatives of 3 and 1 objects in slots for more."""
    rng = np.random.default_rng(1)
    labels, boxes = rng.integers(0, CLASSES, (2, 3)), oracle.random_boxes(rng, 2, 3)
    empty = ((0, 0), (0, objects - 3))
    rng = np.random.default_rng(seed)
    shape = (2, GROUPS, 2, 5)  # of image, group, copy and object

    def slots(draws):
        return draws[:, :, :, :objects].reshape(2, -1, *draws.shape[4:])

    noise = denoising.Noise(
        label_u=slots(rng.random(shape, np.float32)),
        label_new=slots(rng.integers(0, CLASSES, shape).astype(np.int32)),
        box_u=slots(rng.random((*shape, 4), np.float32)),
        box_sign=slots(rng.choice(np.float32([-1, 1]), (*shape, 4))),
    )
    return denoising.prepare(
        np.pad(labels, empty).astype(np.int32),
        np.pad(boxes, (*empty, (0, 0))),
        np.arange(objects) < np.array([[3], [1]]),
        noise,
        groups=GROUPS,
        label_noise=0.5,
        box_noise=box_noise,
        contrastive=True,
    )


def test_matching_queries_do_not_depend_on_denoising_queries(case):
    """Neither outputs nor gradients of the parameters; nor is there a gradient into noised boxes.

    Catches a missing mask, and a normalization over all queries.
    """
    dn, match, grads, by_boxes = case.run(case.params, *image_batch(), queries())
    other_dn, *other = case.run(case.params, *image_batch(), queries(seed=9))
    jax.tree.map(np.testing.assert_array_equal, [match, grads], other[:2])
    assert not np.any(by_boxes)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    for name in dn:
        assert np.abs(dn[name] - other_dn[name]).max() > 1e-3


def test_any_scale_of_noise_gives_finite_outputs_and_gradients(case):
    """Negatives of a scale far above the allowed ones; catches sides below 0 and NaN."""
    dn = queries(box_noise=50.0)
    assert dn.negative.any() and np.min(dn.boxes) == 0
    found = case.run(case.params, *image_batch(), dn)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_padded_keys_are_not_attended_to(case):
    """A larger canvas and five slots for three objects give the same results.

    Catches padding in convolutions, norms, positions, ratios of levels and selected proposals, and
    attention to padded pixels and to empty denoising slots.
    """
    dn, match, _, _ = case.run(case.params, *image_batch(), queries())
    wide_dn, wide_match = case.detect(case.params, *image_batch((96, 128)), queries(objects=5))

    def real(outputs, objects):  # of the denoising queries
        by_slot = {
            name: x.reshape(*x.shape[:2], GROUPS * 2, objects, -1)[:, :, :, :3]
            for name, x in outputs.items()
        }
        valid = np.arange(3) < np.array([3, 1])[:, None, None]
        return {name: np.where(valid[..., None], x, 0) for name, x in by_slot.items()}

    for got, want in ((wide_match, match), (real(wide_dn, 5), real(dn, 3))):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-4, err_msg=name)
