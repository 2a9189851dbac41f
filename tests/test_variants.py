"""A variant from outside of the package takes two training steps through the registry alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import toy_detector
from fast_jit import CONFIG
from flax import traverse_util
from tiny_detector import CANVAS, image_batch

from dn_detr_jax.config import base_config, compiler_options, validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.evaluation.detect import eval_step
from dn_detr_jax.interop.names.dn_dab_detr import NAMES
from dn_detr_jax.models import registry
from dn_detr_jax.models.registry import (
    abstract_params,
    build_model,
    num_matching_queries,
    torch_names,
    trainable,
)
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import init_state
from dn_detr_jax.training.step import jit_train_step


@pytest.fixture(scope="module")
def config():
    """Of the toy detector on three images."""
    config = base_config("toy")
    config.data.canvases, config.data.max_objects = ((CANVAS, CANVAS),), 4
    config.model.num_classes, config.dn.groups, config.dn.slots = 5, 2, 8
    config.train.batch_size = config.eval.batch_size = 3
    config.eval.num_select = 10
    config.optimizer.learning_rate = 1e-2
    config.compile.options = CONFIG
    return config


def test_a_toy_detector_trains(config):
    """The package's step trains an external backbone, decoder and third part of the loss.

    Catches a branch on the one built-in model, and a part of the loss that is computed but neither
    named nor trained.
    """
    validate(config)
    model, mesh = build_model(config.model), make_mesh(1)
    flags = trainable(abstract_params(model), config.model)
    optimizer, _ = make_optimizer(config, abstract_params(model), 10, 100, flags)
    flags = traverse_util.unflatten_dict(flags, sep="/")
    state = init_state(model, optimizer, config, mesh)
    before = traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    step = jit_train_step(
        model=model, optimizer=optimizer, trainable=flags, config=config, mesh=mesh
    )
    batch = image_batch()
    program = step.lower(state, batch).compile(compiler_options(config, "cpu"))
    rows = []
    for _ in range(2):
        state, metrics = program(state, batch)
        rows.append(metrics.as_dict())
    assert {"loss_ce", "dn_loss_bbox", "loss_giou_enc", "class_error_enc"} <= set(rows[0])
    assert not any(name.endswith("_0") for name in rows[0])  # one layer of decoder and encoder
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    weights = {name: config.loss[f"weight_{name}"] for name in ("class", "bbox", "giou")}
    terms = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
    total = sum(
        weight * rows[0][pattern.format(terms[name])]
        for name, weight in weights.items()
        for pattern in ("{}", "dn_{}", "{}_enc")
    )
    assert rows[0]["loss"] == pytest.approx(total, rel=1e-5)
    after = traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    unchanged = {path for path in after if np.array_equal(after[path], before[path])}
    assert not {path for path in unchanged if not path.endswith("key/bias")}
    assert {"backbone/embed/kernel", "proposal_heads/class_head/kernel"} <= set(after)


def test_a_toy_detector_detects(config):
    """Catches an evaluation that takes further outputs for decoder layers."""
    model = build_model(config.model)
    found = jax.eval_shape(
        lambda params, batch: eval_step(params, batch, model=model, config=config),
        abstract_params(model),
        image_batch(),
    )
    assert found["boxes"].shape == (3, 10, 4) and found["boxes"].dtype == jnp.float32
    assert found["cost"].shape == (3, 1, num_matching_queries(config.model), 4)


def test_names_of_official_weights_belong_to_a_variant(config):
    """Catches a renamed table, and a variant that gets the names of another."""
    assert torch_names(base_config().model) is NAMES
    with pytest.raises(ConfigError, match="'toy': it has no official PyTorch weights"):
        torch_names(config.model)


def test_a_name_stands_for_one_variant():
    """Registering a module twice, as a second import does, is fine; another variant is not."""
    registry.register(registry.variant_of(base_config("toy").model))
    other = dataclasses.replace(registry.variant_of(base_config("toy").model), frozen=len)
    with pytest.raises(ValueError, match="'toy': another variant has this name"):
        registry.register(other)


def test_keys_of_one_variant_are_unknown_to_the_others(config):
    """Catches a typo that equals a key of another variant."""
    assert toy_detector.KEYS[0].path == "model.num_queries"
    assert "num_heads" not in config.model and "num_heads" in base_config().model
    other = base_config("toy")
    with other.unlocked():
        other.model.num_heads = 8
    with pytest.raises(ConfigError, match=r"model\.num_heads"):
        validate(other)
