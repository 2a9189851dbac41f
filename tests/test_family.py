"""Every variant with feature levels: a step of training; and the proposals of an encoder.

Other properties of every variant are in `test_plug_in.py` and `test_family_runs.py`.
"""

import functools

import jax
import numpy as np
import pytest
from data import tiny as tiny_config
from fast_jit import fast_jit
from flax import traverse_util
from tiny_detector import image_batch, random_params

from dn_detr_jax.config import validate
from dn_detr_jax.criterion import LossSettings, Totals, parts_with_proposals
from dn_detr_jax.losses import SigmoidFocalLoss
from dn_detr_jax.models.decoder import DecoderLayer
from dn_detr_jax.models.draws import draw_together
from dn_detr_jax.models.layers import LayerConfig
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.proposals import SelectedProposals, token_boxes
from dn_detr_jax.models.registry import abstract_params, build_model, loss_settings
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.step import compute_losses

VARIANTS = ("dn_deformable_detr", "dn_deformable_encoder_detr", "dn_dino_detr")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


class Family:
    """The model of a variant with random parameters, and its compiled gradient."""

    def __init__(self, name):
        self.config = tiny_config.levels(name)
        validate(self.config)
        self.model, self.mesh = build_model(self.config.model), make_mesh(1)
        self.params = random_params(abstract_params(self.model))
        self.gradient = fast_jit(jax.value_and_grad(self._loss, has_aux=True))

    def _loss(self, params, batch):
        rest = {"model": self.model, "config": self.config, "mesh": self.mesh}
        return compute_losses(params, batch, jax.random.key(0), **rest)


@pytest.fixture(scope="module", params=VARIANTS)
def family(request):
    return Family(request.param)


def test_gradient_reaches_every_parameter(family):
    """Catches a stopped gradient, an unused module, and a loss without a part or a layer.

    A bias of attention keys shifts all the scores of a query alike, which the softmax ignores.
    """
    (total, terms), gradient = family.gradient(family.params, image_batch())
    proposals = family.config.model.name == "dn_dino_detr"
    names = {f"{dn}loss_{x}{i}" for dn in ("", "dn_") for x in ("ce", "bbox") for i in ("", "_0")}
    names |= {"loss_ce_enc", "loss_giou_enc"} if proposals else set()
    assert names <= set(terms)
    assert any(name.endswith("_enc") for name in terms) == proposals
    weights = {name: family.config.loss[f"weight_{name}"] for name in ("class", "bbox", "giou")}
    parts = {"loss_ce": weights["class"], "loss_bbox": weights["bbox"]}
    parts["loss_giou"] = weights["giou"]
    weighted = sum(v * parts[p] for k, v in terms.items() for p in parts if p in k)
    np.testing.assert_allclose(total, weighted, rtol=1e-5)
    largest = {path: float(np.abs(leaf).max()) for path, leaf in flat(gradient).items()}
    zero = {path for path, size in largest.items() if size < 1e-6}
    biases = {path for path in largest if path.endswith("/bias")}
    assert zero == {path for path in biases if "key" in path.split("/")[-2]}


def test_initial_values_of_the_encoder_only_model():
    """Catches those of Deformable DETR: its official code draws them anew after the reset."""
    config = tiny_config.levels("dn_deformable_encoder_detr").model
    config.num_patterns = 3
    model = build_model(config)
    wanted = {
        "encoder/layer0/sampling_offsets/kernel",
        "encoder/layer0/attention_weights/kernel",
        "encoder/layer0/sampling_offsets/bias",
        "input_proj0/kernel",
        "input_proj0/bias",
        "patterns",
        "box_head/layer2/kernel",
    }

    def init(key):
        image, size = np.zeros((1, 64, 64, 3), np.float32), np.full((1, 2), 64)
        params = flat(model.init(key, image, size)["params"])
        return {path: params[path] for path in wanted}

    found = jax.device_get(fast_jit(draw_together(init))(jax.random.key(0)))
    bounds = {path: np.sqrt(6 / sum(x.shape)) for path, x in found.items() if x.ndim == 2}
    for path in ("input_proj0/kernel", "input_proj0/bias"):  # PyTorch's default
        bounds[path] = found["input_proj0/kernel"].shape[0] ** -0.5
    bounds["box_head/layer2/kernel"] = found["box_head/layer2/kernel"].shape[0] ** -0.5
    for path, bound in bounds.items():
        assert 0.5 * bound < np.abs(found[path]).max() <= bound, path
    rays = found["encoder/layer0/sampling_offsets/bias"]
    assert np.abs(rays).max() > 1 and set(np.abs(rays[:2]).tolist()) == {0.0, 1.0}


# --- proposals ------------------------------------------------------------------------------------


def levels(width=16):
    """Returns two levels; of the second image 5 of 8 rows and 6 of 8 columns are valid."""
    rng = np.random.default_rng(0)
    valid = np.zeros((2, 8, 8), bool)
    valid[0], valid[1, :5, :6] = True, True
    valid = [valid, valid[:, ::2, ::2]]
    maps = [rng.normal(size=(*v.shape, width)).astype(np.float32) for v in valid]
    return Levels.of_maps(maps, maps, valid)


def test_boxes_of_tokens_equal_a_plain_loop():
    """Catches a grid of the canvas in place of the image, and boxes at the border or of padding."""
    boxes, usable = map(np.asarray, token_boxes(levels()))
    token = 0
    for level, (side, rows, columns) in enumerate(((8, 5, 6), (4, 3, 3))):
        for row, column in np.ndindex(side, side):
            inside = row < rows and column < columns
            assert usable[1, token] == inside
            if inside:
                center = np.array([(column + 0.5) / columns, (row + 0.5) / rows])
                want = np.append(center, [0.05 * 2**level] * 2)
                found = 1 / (1 + np.exp(-boxes[1, token].astype(np.float64)))
                np.testing.assert_allclose(found, want, rtol=1e-5)
            else:
                assert np.all(np.isinf(boxes[1, token]))
            token += 1
    narrow = Levels.of_maps(
        *([np.ones((1, 1, 64, 4), np.float32)],) * 2, [np.ones((1, 1, 64), bool)]
    )
    assert np.flatnonzero(~np.asarray(token_boxes(narrow)[1])[0]).tolist() == [0, 63]


@functools.cache
def selection(score, num_queries=6, mask_padding=True):
    """Returns queries, what was collected, the parameters and the levels."""
    model = SelectedProposals(
        3, 16, num_queries, num_layers=2, score=score, mask_padding=mask_padding
    )
    inputs = levels()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, None)["params"])
    params = random_params(shapes)

    def run(params, inputs):
        return model.apply({"params": params}, inputs, None, mutable=["intermediates"])

    queries, collected = fast_jit(run)(params, inputs)
    collected = {name: np.asarray(v[0]) for name, v in collected["intermediates"].items()}
    return queries, collected, params, inputs


@pytest.mark.parametrize("score", ["class", "objectness"])
def test_queries_are_the_best_proposals(score):
    """Catches the wrong score, an ascending order, contents that follow tokens, and a gradient."""
    queries, collected, params, inputs = selection(score)
    assert {"class_head_2", "box_head_2", "proposal_proj", "proposal_norm"} < set(params)
    boxes, usable = map(np.asarray, token_boxes(inputs))
    x = np.where(usable[..., None], inputs.tokens, 0) @ params["proposal_proj"]["kernel"]
    x = x + params["proposal_proj"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["proposal_norm"]["scale"] + params["proposal_norm"]["bias"]
    logits = x @ params["class_head_2"]["kernel"] + params["class_head_2"]["bias"]
    scores = logits.max(-1) if score == "class" else logits[..., 0]
    np.testing.assert_allclose(collected["encoder_scores"], scores, atol=1e-5)
    scores = np.where(inputs.valid, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(collected["selected"], order)
    layers = [params["box_head_2"][f"layer{i}"] for i in range(3)]
    for i, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    anchors = np.take_along_axis(x + boxes, order[..., None], axis=1)
    np.testing.assert_allclose(queries.anchors, anchors, atol=1e-4)
    np.testing.assert_array_equal(queries.content, np.stack([params["content"]] * 2))
    number = {"class": 6, "objectness": 80}[score]
    assert queries.outputs["encoder_boxes"].shape == (1, 2, number, 4)
    name = "encoder_logits" if score == "class" else "objectness_logits"
    assert queries.outputs[name].shape == (1, 2, number, 3)


def test_more_queries_than_tokens():
    """Small canvases have few tokens; the queries that are left over get no real proposal."""
    queries, collected, *_ = selection("class", num_queries=100)
    assert queries.anchors.shape == (2, 100, 4)
    assert np.all(np.isinf(queries.anchors[:, 80:]))
    assert len(set(collected["selected"][0].tolist())) == 100


def test_padding_is_selected_in_pytorch_alone():
    """Catches proposals of padding, whose number depends on the canvas."""
    for masked in (True, False):
        _, collected, _, inputs = selection("objectness", 50, masked)
        valid = np.take_along_axis(np.asarray(inputs.valid), collected["selected"], axis=1)
        assert valid[1].sum() == 30 + 9 if masked else valid[1].sum() < 30 + 9


def test_proposals_are_a_part_of_the_loss():
    """Their own matching: real classes, or for objectness any object as class 0."""
    rng = np.random.default_rng(1)
    batch = image_batch()
    targets = {name: batch[name] for name in ("labels", "boxes", "valid")}
    totals = Totals.of(targets, None)
    logits = rng.normal(size=(1, 3, 9, 5)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.4, (1, 3, 9, 4)).astype(np.float32)
    matched = {"pred_logits": logits, "pred_boxes": boxes, "encoder_boxes": boxes}
    rest = targets, totals, LossSettings(SigmoidFocalLoss(), {}, {})
    for name, labels in (
        ("encoder_logits", targets["labels"]),
        ("objectness_logits", 0 * targets["labels"]),
    ):
        *_, part = parts_with_proposals(matched | {name: logits}, None, *rest)
        assert part.names.format("loss_ce") == "loss_ce_enc"
        np.testing.assert_array_equal(part.targets["labels"], labels)
        assert part.pred_logits is logits and part.pred_boxes is boxes
        assert part.problem()[0].shape == (3, 1, 9, 4)


def test_hidden_proposals_have_no_loss():
    """With all tokens in the loss, those of padding must not count: they depend on the canvas."""
    queries, _, _, inputs = selection("objectness")
    logits = np.asarray(queries.outputs["objectness_logits"])[0]
    loss = SigmoidFocalLoss().loss(logits, np.full((2, 80), 3))
    padded = ~np.asarray(inputs.valid)
    assert np.all(loss[padded] == 0) and np.all(loss[~padded].sum(-1) > 0)
    assert loss_settings(tiny_config.levels("dn_dino_detr")).class_loss == SigmoidFocalLoss()


def test_levels_are_read_apart_and_weighed():
    """The layer with one level more gives the same where the query gives that level no weight.

    Catches one softmax over all levels, weights of another query, and a mask of another level.
    """
    rng = np.random.default_rng(0)
    layer = DecoderLayer(LayerConfig(num_heads=2, ffn_dim=8), False, 0.0, level_attention=True)
    two = levels()
    side = two.shapes[0][0] ** 2
    one = Levels.of_maps(
        *([x[:, :side].reshape(2, 8, 8, -1)] for x in (two.tokens, two.position)),
        [two.valid[:, :side].reshape(2, 8, 8)],
    )
    x, position, sine = rng.normal(size=(3, 2, 5, 16)).astype(np.float32)
    mask = np.ones((1, 1, 5), bool)
    inputs = x, position, sine, mask

    @fast_jit
    def run(params, memory):
        return layer.apply({"params": params}, *inputs, memory, train=False)

    def init(memory):
        return layer.init(jax.random.key(0), *inputs, memory, train=False)["params"]

    params = random_params(jax.eval_shape(init, two))
    kernel, bias = 0 * params["level_attention"]["kernel"], np.float32([0, -1e9])
    params["level_attention"] = {"kernel": kernel, "bias": bias}
    alone = params | {"level_attention": {"kernel": kernel[:, :1], "bias": bias[:1]}}
    want = run(alone, one)
    np.testing.assert_allclose(run(params, two), want, atol=1e-5)
    params["level_attention"] = {"kernel": kernel, "bias": bias[::-1].copy()}
    assert np.abs(run(params, two) - want).max() > 1e-2
