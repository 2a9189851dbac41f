"""Plain DN-DETR: a training step, what denoising queries may not change, scores, and padding."""

import jax
import numpy as np
import pytest
from data import tiny as tiny_config
from fast_jit import fast_jit
from flax import traverse_util
from tiny_detector import denoising_queries, image_batch, object_noise, random_params

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.evaluation.detect import eval_step
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import compute_losses


class Plain:
    """A tiny detector with random parameters and its compiled functions."""

    def __init__(self):
        own, given = base_config("dn_detr_plain"), tiny_config.shared()
        own.model.update({k: v for k, v in given.model.items() if k in own.model and k != "name"})
        own.model.dropout = 0.0
        own.dn.groups, own.data.canvases = given.dn.groups, given.data.canvases
        own.data.max_objects = 4
        own.eval.num_select = 10
        validate(own)
        self.config, self.model, self.mesh = own, build_model(own.model), make_mesh(1)
        self.params = random_params(abstract_params(self.model))
        self.params["query_position"] = 8 * self.params["query_position"]
        self.detect = fast_jit(self._detect)

    def _detect(self, params, image, size, dn=None):
        images = normalize_images(image, size)
        return self.model.apply({"params": params}, images, size, dn)

    def loss(self, params, batch):
        rest = {"model": self.model, "config": self.config, "mesh": self.mesh}
        return compute_losses(params, batch, jax.random.key(0), **rest)


@pytest.fixture(scope="module")
def plain():
    return Plain()


def test_gradient_reaches_every_parameter(plain):
    """Catches an unused module, and a loss without a part or a layer.

    A bias of attention keys shifts all the scores of a query alike, which the softmax ignores.
    """
    step = fast_jit(jax.value_and_grad(plain.loss, has_aux=True))
    (total, terms), gradient = step(plain.params, image_batch())
    assert np.isfinite(total)
    parts = [f"{dn}loss_{x}{i}" for dn in ("", "dn_") for x in ("ce", "giou") for i in ("", "_0")]
    assert set(parts) <= set(terms)
    leaves = traverse_util.flatten_dict(gradient, sep="/").items()
    zero = {path for path, leaf in leaves if np.abs(leaf).max() < 1e-7}
    assert zero == {path for path, _ in leaves if "key/bias" in path}


def test_denoising_queries_do_not_change_the_others(plain):
    """Catches denoising queries behind the others, or visible to them; there are 3 groups of 4."""
    batch = image_batch()
    dn = denoising_queries(batch, object_noise())
    got = plain.detect(plain.params, batch["image"], batch["size"], dn)
    want = plain.detect(plain.params, batch["image"], batch["size"])
    for name, values in want.items():
        assert got[name].shape[2] == 12 + values.shape[2]
        np.testing.assert_allclose(got[name][:, :, 12:], values, atol=1e-5, err_msg=name)
    moved = dn.replace(boxes=dn.boxes * 0.5)
    other = plain.detect(plain.params, batch["image"], batch["size"], moved)
    assert np.abs(other["pred_boxes"] - got["pred_boxes"])[:, 0, :12].max() > 1e-4


def test_detections_do_not_depend_on_the_canvas(plain):
    """Catches padding that is attended to."""
    batch = image_batch()
    wider = np.pad(batch["image"], ((0, 0), (0, 32), (0, 32), (0, 0)))
    want = plain.detect(plain.params, batch["image"], batch["size"])
    got = plain.detect(plain.params, wider, batch["size"])
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, atol=5e-5, err_msg=name)


def test_scores_are_probabilities_without_no_object(plain):
    """Catches sigmoid scores, and "no object" as a class."""
    batch = image_batch()
    run = fast_jit(lambda p, b: eval_step(p, b, model=plain.model, config=plain.config))
    found = run(plain.params, batch)
    outputs = plain.detect(plain.params, batch["image"], batch["size"])
    logits = np.asarray(outputs["pred_logits"][-1], np.float64)
    assert logits.shape[-1] == plain.config.model.num_classes + 1
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.sort(scores[..., :-1].reshape(3, -1), axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(found["scores"], best, rtol=1e-4)
    assert found["labels"].max() < plain.config.model.num_classes
