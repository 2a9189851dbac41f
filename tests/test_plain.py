"""Plain DN-DETR: a training step, and scores; what else holds is in `test_plug_in.py`."""

import jax
import numpy as np
import pytest
from data import tiny as tiny_config
from fast_jit import fast_jit
from flax import traverse_util
from tiny_detector import image_batch, random_params

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
