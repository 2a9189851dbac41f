"""The detector: sizes, start, gradients, precision, and independence from the canvas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import tiny as tiny_config
from fast_jit import fast_jit
from flax import traverse_util
from tiny_detector import (
    CANVAS,
    denoising_queries,
    image_batch,
    object_noise,
    random_params,
)

from dn_detr_jax.config import base_config
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.models import attention, position
from dn_detr_jax.models.backbones.resnet import ResNet
from dn_detr_jax.models.draws import draw_together
from dn_detr_jax.models.heads import LayerHeads, SharedHeads
from dn_detr_jax.models.images import IMAGE_MEAN, IMAGE_STD, normalize_images, valid_tokens
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.registry import abstract_params, build_model, parameter_table, trainable
from dn_detr_jax.training.step import compute_losses


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


# --- shapes and numbers of parameters, without computing anything ---------------------------------


def abstract_features(canvas, **options):
    """Returns the shape of the features, and the backbone's parameters."""
    image = jax.ShapeDtypeStruct((2, *canvas, 3), jnp.float32)
    size = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    init = ResNet(**options).init_with_output
    features, variables = jax.eval_shape(init, jax.random.key(0), image, size)
    return features[-1].shape, variables["params"]


@pytest.mark.parametrize(
    "depth, published, channels",
    [(18, 11_689_512, 512), (34, 21_797_672, 512), (50, 25_557_032, 2048), (101, 44_549_160, 2048)],
)
def test_backbones_are_the_published_ones(depth, published, channels):
    """Compares with torchvision's numbers, less the classifier's, plus stored statistics."""
    shape, params = abstract_features((800, 1344), depth=depth)
    assert shape == (2, 25, 42, channels)
    statistics = count([v for k, v in flat(params).items() if k.endswith(("/mean", "/var"))])
    assert count(params) - statistics == published - 1000 * (channels + 1)


@pytest.mark.parametrize(
    "options, shape",
    [
        ({"dilation": True}, (50, 84, 2048)),
        ({"stages": 3}, (50, 84, 1024)),
        ({"stages": 2, "dilation": True}, (200, 336, 512)),
        ({"stem": "light"}, (25, 42, 2048)),
        ({"stem": "light", "stages": 1, "norm": "group_norm", "width": 32}, (200, 336, 128)),
        ({"stem": "light", "stages": 2, "dilation": True}, (200, 336, 512)),
    ],
)
def test_stride_of_backbone_variants(options, shape):
    """Catches a stride that is dropped or doubled by dilation, stages or the light stem."""
    assert abstract_features((800, 1344), depth=50, **options)[0] == (2, *shape)


@pytest.mark.parametrize(
    "name, depth, parameters, statistics, trained",
    [
        ("dn_dab_detr", 50, 43_694_977, 106_240, 43_472_577),
        ("dn_dab_detr", 101, 62_634_881, 210_688, 62_412_481),
        ("dn_deformable_detr", 50, 47_429_154, 106_240, 47_206_754),
        ("dn_deformable_encoder_detr", 50, 48_488_589, 106_240, 48_266_189),
    ],
)
def test_number_of_parameters_of_the_published_detectors(
    name, depth, parameters, statistics, trained
):
    """Detectors of the official code: their parameters, their buffers, and what they train."""
    config = base_config(name).model
    config.backbone.depth = depth
    params = abstract_params(build_model(config))
    assert count(params) == parameters + statistics
    is_trained = trainable(params, config)
    assert count([leaf for path, leaf in flat(params).items() if is_trained[path]]) == trained


def test_shapes_with_patterns_relu_and_denoising():
    """Patterns multiply the queries, share their anchors, and cost 256 numbers each."""
    config = base_config().model
    config.num_patterns, config.activation, config.backbone.dilation = 3, "relu", True
    model = build_model(config)

    def outputs(key, image, size, dn):
        return model.init_with_output(key, image, size, dn)

    shape = jax.ShapeDtypeStruct
    slots = shape((2, 20), jnp.int32)
    boxes = shape((2, 20, 4), jnp.float32)
    flags = shape((2, 20), jnp.bool)
    dn = Denoising(slots, boxes, slots, flags, slots, boxes, flags)
    image, size = shape((2, 800, 1344, 3), jnp.float32), shape((2, 2), jnp.int32)
    got, variables = jax.eval_shape(outputs, jax.random.key(0), image, size, dn)
    assert got["pred_logits"].shape == (6, 2, 20 + 900, 91)
    assert got["pred_boxes"].shape == (6, 2, 20 + 900, 4)
    assert {x.dtype for x in got.values()} == {jnp.dtype("float32")}
    more = 3 * 256 - 12  # a slope for each of the layers' PReLUs has gone with ReLU
    params = variables["params"]
    assert count(params) == 43_694_977 + 106_240 + more
    is_trained = trainable(params, config)
    trained = [leaf for path, leaf in flat(params).items() if is_trained[path]]
    assert count(trained) == 43_472_577 + more


def test_patterns_freeze_parameters(tiny):
    """Catches a match at the start only, and patterns that replace the variant's own."""
    config = tiny_config.shared().model
    config.backbone.frozen_stages = 1
    before = trainable(tiny.shapes, config)
    after = trainable(tiny.shapes, config, ("^encoder/", "norm1/scale$"))
    assert not all(before.values())
    for path, trained in before.items():
        wanted = trained and not (path.startswith("encoder/") or path.endswith("norm1/scale"))
        assert after[path] == wanted, path
    assert sum(after.values()) < sum(before.values())
    with pytest.raises(ConfigError, match=r"train\.freeze = .*'\^neck/' matches no parameter"):
        trainable(tiny.shapes, config, ("^encoder/", "^neck/"))
    with pytest.raises(ConfigError, match="no parameter is left to be trained"):
        trainable(tiny.shapes, config, (".",))


def test_parameter_table_lists_everything(tiny):
    config = tiny_config.shared().model
    config.backbone.frozen_stages = 0
    table = parameter_table(tiny.shapes, trainable(tiny.shapes, config)).splitlines()
    lines = {line.split()[0]: line for line in table[:-1]}
    assert set(lines) == set(flat(tiny.shapes))
    assert lines["backbone/stem_conv/kernel"].split()[1:] == ["3x3x3x8", "216", "frozen"]
    frozen = {path for path, line in lines.items() if line.endswith("frozen")}
    assert frozen == {path for path in lines if path.startswith("backbone/stem")}
    total, stem = count(tiny.shapes), count([tiny.shapes["backbone"]["stem_conv"]]) + 16
    assert table[-1] == f"{total:,} parameters, {total - stem:,} of them trained"


def test_unknown_model_is_refused():
    config = tiny_config.shared().model
    config.name = "dino"
    with pytest.raises(ValueError, match="'dino': unknown; known: dn_dab_detr"):
        build_model(config)


def test_a_backbone_returns_every_stage():
    """Catches levels in another order, and a pyramid with the last level alone."""
    model = ResNet(depth=18, width=8, stages=3)
    image, size = jax.ShapeDtypeStruct((2, 100, 64, 3), jnp.float32), jnp.full((2, 2), 64)
    features = jax.eval_shape(model.init_with_output, jax.random.key(0), image, size)[0]
    assert [x.shape for x in features] == [(2, 25, 16, 8), (2, 13, 8, 16), (2, 7, 4, 32)]


# --- the start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny):
    """Returns initial heads and anchors; the compiler skips the other parameters."""

    def init(key):
        image, size = jnp.zeros((1, CANVAS, CANVAS, 3)), jnp.full((1, 2), CANVAS)
        params = tiny.model.init(key, image, size)["params"]
        return {name: params[name] for name in ("box_head", "class_head", "anchors")}

    return fast_jit(draw_together(init))(jax.random.key(0))


def test_first_predictions(tiny, start):
    """Each layer predicts the anchors themselves, with scores around 0.01.

    Scores of a half flood the first thousand steps with false positives (Lin et al., ICCV
    2017); a box head with another start moves the anchors at random.
    """
    params = tiny.params | start
    np.testing.assert_allclose(jax.nn.sigmoid(start["class_head"]["bias"]), 0.01, rtol=1e-5)
    batch = image_batch()
    got = tiny.detect(params, batch["image"], batch["size"])
    anchors = np.broadcast_to(jax.nn.sigmoid(start["anchors"]), got["pred_boxes"].shape)
    np.testing.assert_allclose(got["pred_boxes"], anchors, atol=1e-5)
    scores = jax.nn.sigmoid(got["pred_logits"])
    assert 0.003 < np.median(scores) < 0.03 and scores.max() < 0.2


def test_random_anchors_cover_the_image():
    """With random_refpoints_xy centers are uniform; normal logits crowd the middle."""
    config = tiny_config.shared().model
    config.num_queries = 2000

    def anchors(uniform):
        config.random_refpoints_xy = uniform
        model = build_model(config)
        size = jnp.full((1, 2), CANVAS)

        def init(key):
            return model.init(key, jnp.zeros((1, CANVAS, CANVAS, 3)), size)["params"]["anchors"]

        init = fast_jit(draw_together(init))
        return np.asarray(jax.nn.sigmoid(init(jax.random.key(0))))

    shares = np.histogram(anchors(True)[:, :2], 4, (0, 1))[0] / 4000
    np.testing.assert_allclose(shares, 0.25, atol=0.04)
    assert np.histogram(anchors(False)[:, :2], 4, (0, 1))[0][0] / 4000 < 0.18


# --- gradients and precision ----------------------------------------------------------------------


def test_gradient_reaches_every_parameter(tiny):
    """Catches a stopped gradient, an unused module and a loss that forgets a layer.

    A bias of attention keys shifts all the scores of a query alike, which the softmax ignores:
    its gradient is zero but for rounding.
    """
    _, gradient = tiny.loss_and_gradient(tiny.params, image_batch(), object_noise())
    largest = {path: float(np.abs(leaf).max()) for path, leaf in flat(gradient).items()}
    key_biases = {p for p in largest if p.endswith("/bias") and "key" in p.split("/")[-2]}
    assert len(key_biases) == 1 + 2 * 4
    assert {p for p, size in largest.items() if size < 1e-5} == key_biases


def test_bfloat16_gives_float32_outputs_near_those_of_float32(tiny):
    """Catches box arithmetic in bfloat16, whose 8 bits are 4 pixels of 1000."""
    config = tiny_config.shared().model
    config.dtype = "bfloat16"
    model, batch = build_model(config), image_batch()
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(model))} == {
        jnp.dtype("float32")
    }

    def detect(params, image, size):
        return model.apply({"params": params}, normalize_images(image, size), size)

    got = fast_jit(detect)(tiny.params, batch["image"], batch["size"])
    want = tiny.detect(tiny.params, batch["image"], batch["size"])
    for name, tolerance in (("pred_logits", 0.1), ("pred_boxes", 0.02)):
        assert got[name].dtype == jnp.float32
        assert 0 < np.abs(got[name] - want[name]).max() < tolerance
    # Numbers rounded to bfloat16 at the end would have 16 empty bits.
    bits = np.asarray(got["pred_boxes"]).view(np.uint32) & 0xFFFF
    assert np.mean(bits != 0) > 0.9


def operations(jaxpr):
    """Yields (name, dtypes of the floating operands) of each operation of a traced program."""
    for equation in jaxpr.eqns:
        dtypes = {v.aval.dtype.name for v in equation.invars if hasattr(v.aval, "dtype")}
        yield equation.primitive.name, dtypes & {"float32", "bfloat16"}
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def test_bfloat16_is_for_convolutions_and_matrices_alone(tiny):
    """Checks the operations of the whole loss and its gradients: softmax, norms, boxes, costs and
    losses are float32, all convolutions and matrix products bfloat16.

    Catches a softmax or a cost in bfloat16, and a product that float32 constants made slow.
    """
    config = tiny_config.shared()
    config.model.dtype = "bfloat16"
    model, batch = build_model(config.model), image_batch()

    def loss(params):
        rest = {"model": model, "config": config, "mesh": tiny.mesh}
        return compute_losses(params, batch, jax.random.key(0), **rest)[0]

    used = list(operations(jax.make_jaxpr(loss)(tiny.shapes).jaxpr))
    exact = {"exp", "log", "log1p", "pow", "logistic", "sin", "cos", "rsqrt", "div", "sub", "abs"}
    exact |= {"square", "reduce_sum", "reduce_max", "cumsum", "pure_callback"}
    assert exact <= {name for name, _ in used}
    assert {(name, *dtypes) for name, dtypes in used if name in exact and dtypes} == {
        (name, "float32") for name in exact
    }
    large = [dtypes for name, dtypes in used if name in ("dot_general", "conv_general_dilated")]
    assert len(large) > 50 and all(dtypes == {"bfloat16"} for dtypes in large)
    gradient = jax.eval_shape(jax.grad(loss), tiny.shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def rematerialized(tiny, parts):
    """Returns the loss of parameters, batch and noise, with these parts rematerialized."""
    config = tiny_config.shared()
    config.model.remat = parts
    model = build_model(config.model)
    assert jax.tree.structure(abstract_params(model)) == jax.tree.structure(tiny.shapes)

    def loss(params, batch, noise):
        rest = {"model": model, "config": config, "mesh": tiny.mesh}
        return compute_losses(params, batch, jax.random.key(0), noise=noise, **rest)

    return loss


def test_rematerialization_does_not_change_the_numbers(tiny):
    """Catches a backward pass that recomputes something else."""
    loss = rematerialized(tiny, ("backbone", "encoder", "decoder", "attention"))
    arguments = tiny.params, image_batch(), object_noise()
    (want, want_terms), want_gradient = tiny.loss_and_gradient(*arguments)
    (got, got_terms), gradient = fast_jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name, value in want_terms.items():
        np.testing.assert_allclose(got_terms[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in flat(want_gradient).items():
        atol = 1e-5 * (np.abs(value).max() + 1e-3)
        np.testing.assert_allclose(flat(gradient)[name], value, atol=atol, err_msg=name)


def test_rematerialization_keeps_less_for_the_backward_pass(tiny):
    """Bytes from the forward to the backward pass; catches a name that reaches no part."""
    arguments = tiny.params, image_batch(), object_noise()

    def kept(parts):
        loss = rematerialized(tiny, parts)

        def backward(params, batch, noise):
            return jax.vjp(lambda p: loss(p, batch, noise)[0], params)[1]

        arrays = jax.tree.leaves(jax.eval_shape(backward, *arguments))
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    everything = kept(())
    parts = "backbone", "encoder", "decoder", "attention"
    saved = {part: everything - kept((part,)) for part in parts}
    # Tokens x tokens x heads x images of float32: the least that an attention keeps.
    assert saved["encoder"] > (CANVAS // 4) ** 4 * 2 * 3 * 4
    assert saved["decoder"] > 2 * 20 * (CANVAS // 4) ** 2 * 2 * 3 * 4
    assert saved["backbone"] > 4 * (CANVAS // 4) ** 2 * 8 * 3 * 4
    attentions = (CANVAS // 4) ** 4 * 2 * 3 * 4 + 2 * 20 * (CANVAS // 4) ** 2 * 2 * 3 * 4
    assert attentions < saved["attention"] < saved["encoder"] + saved["decoder"]


# --- independence from the canvas -----------------------------------------------------------------


def test_normalized_images_equal_a_plain_computation():
    """Garbage in the padded area becomes 0, which is the mean color."""
    batch = image_batch()
    got = np.asarray(normalize_images(batch["image"], batch["size"]))
    for b, (height, width) in enumerate(batch["size"]):
        image = batch["image"][b, :height, :width].astype(np.float64) / 255
        want = (image - IMAGE_MEAN) / IMAGE_STD
        np.testing.assert_allclose(got[b, :height, :width], want, atol=1e-5)
        assert not got[b, height:].any() and not got[b, :, width:].any()


def on_larger_canvas(batch, side):
    """Returns the same images on a larger canvas, padded with garbage."""
    image = np.random.default_rng(7).integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    for b, (height, width) in enumerate(batch["size"]):
        image[b, :height, :width] = batch["image"][b, :height, :width]
    return batch | {"image": image}


def test_detections_do_not_depend_on_the_canvas(tiny):
    """Compares the same images on canvases of 64 and of 96, with garbage in the padding."""
    batch = image_batch()
    want = tiny.detect(tiny.params, batch["image"], batch["size"])
    for side in (CANVAS, 96):
        other = on_larger_canvas(batch, side)
        got = tiny.detect(tiny.params, other["image"], other["size"])
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=5e-5, err_msg=f"{name} {side}")


@pytest.mark.parametrize(
    "depth, norm, stem, dilation, mask_padding",
    [
        (18, "group_norm", "standard", False, True),
        (18, "frozen_batch_norm", "light", True, True),
        (50, "group_norm", "light", True, True),
        (50, "frozen_batch_norm", "standard", False, True),
        (50, "frozen_batch_norm", "standard", False, False),
    ],
)
def test_features_do_not_depend_on_the_canvas(depth, norm, stem, dilation, mask_padding):
    """Compares an image alone, with sides that the stride does not divide, and on a canvas.

    It covers both norms, stems, blocks, and dilation. After the biases padding is not zero, and
    without `mask_padding`, as in PyTorch, it leaks into the image through each 3x3 convolution.
    """
    model = ResNet(
        depth=depth,
        width=8,
        stages=2,
        norm=norm,
        stem=stem,
        dilation=dilation,
        mask_padding=mask_padding,
    )
    batch = image_batch()
    (height, width), size = batch["size"][1], batch["size"][1:2]
    exact = batch["image"][1:2, :height, :width]
    large = on_larger_canvas(batch, 96)["image"][1:2]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(exact.shape), size)["params"]
    params = random_params(shapes)
    features = fast_jit(
        lambda image, size: model.apply({"params": params}, normalize_images(image, size), size)[-1]
    )
    want = np.asarray(features(exact, size))
    rows, columns = want.shape[1:3]
    got = np.asarray(features(large, size))[:, :rows, :columns]
    worst = np.abs(got - want).max() / np.abs(want).max()
    assert worst < 1e-5 if mask_padding else worst > 1e-3


# --- parts ----------------------------------------------------------------------------------------


def slow_sines(angle, features, temperature):
    return [
        (math.cos if i % 2 else math.sin)(angle / temperature ** (2 * (i // 2) / features))
        for i in range(features)
    ]


@pytest.mark.parametrize("canvas", [(32, 32), (48, 64)])
def test_image_encoding_equals_a_plain_loop_on_any_canvas(canvas):
    """Catches positions relative to the canvas, and columns before rows."""
    stride, features, sizes = 8, 8, np.int32([[32, 32], [20, 31], [1, 17]])
    shape = (canvas[0] // stride, canvas[1] // stride)

    def encode(size):
        valid = valid_tokens(size, canvas, shape)
        return valid, position.image_encoding(valid, features, 20.0, 30.0)

    valid, got = fast_jit(encode)(sizes)
    for b, (height, width) in enumerate(sizes):
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        for i, j in np.ndindex(shape):
            assert valid[b, i, j] == (i < rows and j < columns)
            if not valid[b, i, j]:
                continue
            want = slow_sines(2 * math.pi * (i + 1) / rows, features // 2, 20.0)
            want += slow_sines(2 * math.pi * (j + 1) / columns, features // 2, 30.0)
            np.testing.assert_allclose(got[b, i, j], want, atol=1e-5)
    assert np.isfinite(got).all()


def test_box_encoding_equals_a_plain_loop():
    """Catches x before y; pretrained weights need the official order, y before x."""
    box = np.float32([0.1, 0.7, 0.3, 0.9])
    got = fast_jit(position.box_encoding, static_argnums=1)(box, 6)
    want = np.ravel([slow_sines(2 * math.pi * box[i], 6, 10000.0) for i in (1, 0, 2, 3)])
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(position.box_encoding(box[:2], 6), want[:12], atol=1e-5)


def test_tokens_of_several_levels_follow_one_another():
    """Catches levels that are mixed, and masks or positions in another order than the tokens."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, *shape, 4)).astype(np.float32) for shape in ((3, 2), (2, 1))]
    valid = [rng.random((2, *shape)) < 0.5 for shape in ((3, 2), (2, 1))]
    levels = Levels.of_maps(maps, [-x for x in maps], valid)
    assert levels.shapes == ((3, 2), (2, 1))
    np.testing.assert_array_equal(levels.tokens[:, 3], maps[0][:, 1, 1])
    np.testing.assert_array_equal(levels.tokens[:, 7], maps[1][:, 1, 0])
    np.testing.assert_array_equal(levels.position, -levels.tokens)
    np.testing.assert_array_equal(levels.valid[:, :6], valid[0].reshape(2, 6))
    np.testing.assert_array_equal(levels.valid[:, 6:], valid[1].reshape(2, 2))


def test_heads_of_each_layer_are_those_of_that_layer():
    """Heads of each layer with equal parameters predict what shared heads predict."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 1, 3, 8)).astype(np.float32)
    references = np.full((2, 1, 3, 4), 0.3, np.float32)
    own = LayerHeads(num_layers=2, num_classes=5, hidden_dim=8)
    shapes = jax.eval_shape(own.init, jax.random.key(0), states, references)["params"]
    params = random_params(shapes)
    assert set(params) == {f"{head}_head_{layer}" for head in ("class", "box") for layer in (0, 1)}
    shared = SharedHeads(num_classes=5, hidden_dim=8)

    @fast_jit
    def predictions(params, states, references):
        """Of the heads of each layer, and of shared heads with the parameters of one layer."""
        given, found = {"params": params}, []
        got = own.apply(given, states, references)
        for layer in (0, 1):
            one = {"params": {f"{h}_head": params[f"{h}_head_{layer}"] for h in ("class", "box")}}
            want = shared.apply(one, states, references)
            found += [(got[name][layer], want[name][layer]) for name in want]
            offsets = own.apply(given, layer, states, method="box_offsets")
            found.append((offsets, shared.apply(one, layer, states, method="box_offsets")))
        return found

    for got, want in predictions(params, states, references):
        np.testing.assert_allclose(got, want, rtol=1e-5)


fused = functools.partial(attention.fused_attention, implementation="xla")


@pytest.mark.parametrize("function", [attention.attention, fused], ids=["plain", "fused"])
def test_attention_equals_a_plain_loop(function):
    """Covers heads, scaling and mask, keys and values of different widths, as in the decoder, and
    odd numbers of queries and keys."""
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(2, n, 6)).astype(np.float32) for n in (3, 5))
    value = rng.normal(size=(2, 5, 4)).astype(np.float32)
    mask = rng.random((2, 3, 5)) < 0.5
    mask[..., 2] = True
    got = fast_jit(function, static_argnums=4)(query, key, value, mask, 2)
    for b, q, head in np.ndindex(2, 3, 2):
        k, v = slice(3 * head, 3 * head + 3), slice(2 * head, 2 * head + 2)
        visible = np.flatnonzero(mask[b, q])
        scores = np.exp([query[b, q, k] @ key[b, i, k] / math.sqrt(3) for i in visible])
        want = sum(s * value[b, i, v] for s, i in zip(scores, visible, strict=True)) / scores.sum()
        np.testing.assert_allclose(got[b, q, v], want, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 1, 5), (1, 4, 5)])
def test_fused_attention_has_the_gradient_of_the_plain_one(shape):
    """Covers every kind of mask of the detector; catches fillings that get a gradient."""
    rng = np.random.default_rng(0)
    queries, keys = 4 if shape[1] == 4 else 3, shape[2]
    sizes = (queries, 12), (keys, 12), (keys, 8)
    arrays = [rng.normal(size=(2, *size)).astype(np.float32) for size in sizes]
    mask = np.arange(keys) < rng.integers(1, keys, (*shape[:2], 1))

    @functools.partial(fast_jit, static_argnums=1)
    def gradients(arrays, function):
        out, vjp = jax.vjp(lambda *args: function(*args, mask, 2), *arrays)
        return out, vjp(jnp.cos(out))

    want, got = gradients(arrays, attention.attention), gradients(arrays, fused)
    for expected, value in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


_MODEL = tiny_config.shared().model
_ATTENTIONS = _MODEL.encoder_layers + 2 * _MODEL.decoder_layers
# Private to jax. Without a GPU it reports no cuDNN.
_CUDNN_VERSION = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


def traced_gradient(tiny, kind):
    """Returns the gradient of a loss of a model in bfloat16 with a kind of attention."""
    config = tiny_config.shared()
    config.model.dtype = "bfloat16"
    model = build_model(config.model, kind)

    def loss(params, batch):
        dn = denoising_queries(batch, object_noise())
        images = normalize_images(batch["image"], batch["size"])
        out = model.apply({"params": params}, images, batch["size"], dn)
        return sum(jnp.sum(value) for value in out.values())

    return jax.jit(jax.grad(loss)).trace(tiny.shapes, image_batch())


def pretend_cudnn(monkeypatch):
    """Returns whether this jax lets a test simulate cuDNN."""
    try:
        monkeypatch.setattr(_CUDNN_VERSION, lambda: 91_000)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_attention_asks_jax_for_cudnn(tiny, monkeypatch):
    """Uses public names alone, in case the private one disappears. Catches an attention that still
    computes scores of its own, and shapes and types that cuDNN does not take."""
    monkeypatch.delattr(_CUDNN_VERSION, raising=False)
    assert not pretend_cudnn(monkeypatch)
    asked, real = [], jax.nn.dot_product_attention

    def plain(query, key, value, *, implementation, **options):
        asked.append((implementation, {x.dtype for x in (query, key, value)}))
        assert query.shape[1] % 2 == key.shape[1] % 2 == 0
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        return real(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    traced_gradient(tiny, "cudnn")
    assert asked == [("cudnn", {jnp.dtype(jnp.bfloat16)})] * _ATTENTIONS


def test_every_attention_becomes_a_kernel_of_cudnn(tiny, monkeypatch):
    """Lowers the loss and its gradient for a GPU, where jax checks types, widths and lengths; that
    takes no GPU. Catches an attention that still computes scores of its own."""
    if not pretend_cudnn(monkeypatch):
        pytest.skip(f"{_CUDNN_VERSION} has gone; what is asked of jax is tested without it")

    def lowered(kind):
        return traced_gradient(tiny, kind).lower(lowering_platforms=("cuda",)).as_text()

    text, attentions = lowered("cudnn"), _ATTENTIONS
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == attentions
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == attentions
    scores = "stablehlo.exponential"
    assert lowered("xla").count(scores) - text.count(scores) == attentions
