"""Levels, pyramid, encoder and decoder of the deformable variants, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import fast_jit
from flax import linen as nn
from tiny_detector import random_params

from dn_detr_jax.models.deformable_attention import rays
from dn_detr_jax.models.deformable_decoder import DeformableDecoder
from dn_detr_jax.models.encoder import DeformableEncoder
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.layers import LayerConfig
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.pyramid import MultiLevel
from dn_detr_jax.models.queries import Queries

CONFIG = LayerConfig(num_heads=2, ffn_dim=24, activation="relu")
SIZES = np.int32([[64, 64], [50, 41]])


def masks(canvas=(64, 64), strides=(8, 16)):
    shapes = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in strides]
    return [valid_tokens(SIZES, canvas, shape) for shape in shapes]


def levels(seed=0, width=16):
    """Returns two levels of random tokens, the second image padded."""
    rng = np.random.default_rng(seed)
    valid = masks()
    maps = [rng.normal(size=(*v.shape, width)).astype(np.float32) for v in valid]
    positions = [rng.normal(size=x.shape).astype(np.float32) for x in maps]
    return Levels.of_maps(maps, positions, valid)


# --- levels ---------------------------------------------------------------------------------------


def test_ratios_count_valid_pixels():
    """Catches width and height mixed up, and a mask resized from level to level."""
    np.testing.assert_allclose(levels().ratios[0], 1.0)
    # 50 of 64 rows at stride 8 and 16: 7 of 8 and 4 of 4; 41 columns: 6 of 8 and 3 of 4.
    np.testing.assert_allclose(levels().ratios[1], [[6 / 8, 7 / 8], [3 / 4, 4 / 4]])


def test_references_of_tokens_equal_a_plain_loop():
    """Catches pixel corners, rows for columns, and the ratio of the wrong level."""
    found = np.asarray(levels().references())
    ratios = np.array([[[1, 1], [1, 1]], [[6 / 8, 7 / 8], [3 / 4, 1]]])
    for image in (0, 1):
        token = 0
        for level, (height, width) in enumerate(((8, 8), (4, 4))):
            for row, column in np.ndindex(height, width):
                x = (column + 0.5) / (ratios[image, level, 0] * width)
                y = (row + 0.5) / (ratios[image, level, 1] * height)
                want = np.array([x, y]) * ratios[image]
                np.testing.assert_allclose(found[image, token], want, rtol=1e-6)
                token += 1


# --- pyramid --------------------------------------------------------------------------------------


@functools.cache
def pyramid_levels(canvas, mask_padding=True):
    """Returns the levels of features that depend on the place in the image alone."""
    rng = np.random.default_rng(0)
    features = []
    for stride, channels in ((4, 6), (8, 8), (16, 12)):
        full = rng.normal(size=(2, 16, 16, channels)).astype(np.float32)
        shape = canvas[0] // stride, canvas[1] // stride
        cropped = np.full((2, *shape, channels), 7.0, np.float32)  # of padding
        for image, size in enumerate(SIZES):
            h, w = -(-size // stride)
            cropped[image, :h, :w] = full[image, :h, :w]
        features.append(cropped)
    model = MultiLevel(16, backbone_levels=2, extra_levels=2, mask_padding=mask_padding)

    def run(params, features):
        return model.apply({"params": params}, features, SIZES, canvas)

    init = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tuple(features), SIZES, canvas)["params"]
    )
    return fast_jit(run)(random_params(init), tuple(features)), init


def test_pyramid_makes_coarser_levels():
    """Catches a wrong number of levels, a level of the backbone too many, and lost parameters."""
    found, params = pyramid_levels((64, 64))
    assert found.shapes == ((8, 8), (4, 4), (2, 2), (1, 1))
    assert found.tokens.shape == found.position.shape == (2, 64 + 16 + 4 + 1, 16)
    assert params["input_proj0"]["kernel"].shape == (8, 16)
    assert params["input_proj2"]["kernel"].shape == (3, 3, 12, 16)  # of the raw features
    assert params["input_proj3"]["kernel"].shape == (3, 3, 16, 16)
    assert set(params) == {f"input_{x}{i}" for x in ("proj", "norm") for i in range(4)} | {
        "level_embedding"
    }


def test_pyramid_does_not_depend_on_the_canvas():
    """Catches padding in the statistics of a norm or in a convolution; PyTorch has both."""

    def of(canvas, **options):
        found, _ = pyramid_levels(canvas, **options)
        starts = np.cumsum([0, *(h * w for h, w in found.shapes)])
        return [
            np.asarray(found.tokens)[:, a:b].reshape(2, h, w, -1)
            for a, b, (h, w) in zip(starts[:-1], starts[1:], found.shapes, strict=True)
        ]

    for small, large in zip(of((64, 64)), of((128, 64)), strict=True):
        for image, (height, width) in enumerate(SIZES):
            h, w = -(-height * small.shape[1] // 64), -(-width * small.shape[2] // 64)
            cut = (image, slice(h), slice(w))
            np.testing.assert_allclose(small[cut], large[cut], rtol=1e-4, atol=1e-5)
    theirs = [of(canvas, mask_padding=False) for canvas in ((64, 64), (128, 64))]
    assert np.abs(theirs[0][0][0] - theirs[1][0][0][:8]).max() > 0.1


@pytest.mark.parametrize(
    ("hidden_dim", "norm_groups", "channels"), [(64, 32, 2), (48, 32, 4), (48, 12, 4), (48, 6, 8)]
)
def test_groups_of_the_level_norms(hidden_dim, norm_groups, channels):
    """Catches groups that are not those of the setting, such as four channels whatever it says."""
    model = MultiLevel(hidden_dim, backbone_levels=1, extra_levels=0, norm_groups=norm_groups)
    features = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    size = np.array([[16, 24]])
    found, variables = model.init_with_output(jax.random.key(0), (features,), size, (16, 24))
    proj = variables["params"]["input_proj0"]
    projected = (features @ proj["kernel"] + proj["bias"]).reshape(6, -1, channels)
    normal = projected - projected.mean(axis=(0, 2), keepdims=True)
    normal /= np.sqrt(np.square(normal).mean(axis=(0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(found.tokens[0], normal.reshape(6, -1), atol=1e-5)


# --- attention, encoder and decoder ---------------------------------------------------------------


def test_initial_offsets_are_rays():
    """Catches heads, levels and points in another order: PyTorch's is the order of the weights."""
    offsets = rays(8, 2, 3)(jax.random.key(0), (8 * 2 * 3 * 2,)).reshape(8, 2, 3, 2)
    np.testing.assert_allclose(offsets[0], np.broadcast_to([[1, 0], [2, 0], [3, 0]], (2, 3, 2)))
    np.testing.assert_allclose(offsets[3, 1, 1], [-2, 2], atol=1e-6)


def bilinear(level, x, y):
    """Value of a map [h, w, d] at x, y in [0, 1], zeros around it."""
    height, width = level.shape[:2]
    column, row = x * width - 0.5, y * height - 0.5
    by_row = np.maximum(0, 1 - np.abs(row - np.arange(height)))
    by_column = np.maximum(0, 1 - np.abs(column - np.arange(width)))
    return np.einsum("h,w,hwd->d", by_row, by_column, level)


def plain_attention(params, prefix, query, references, memory, points):
    """Computes one query [D] of one image: references [levels, 2 or 4], memory with one image."""
    heads, shapes = CONFIG.num_heads, memory.shapes

    def linear(name, x):
        return x @ params[prefix + name]["kernel"] + params[prefix + name]["bias"]

    value = np.where(memory.valid[0, :, None], linear("value", np.asarray(memory.tokens[0])), 0)
    offsets = linear("sampling_offsets", query).reshape(heads, len(shapes), points, 2)
    weights = np.exp(linear("attention_weights", query).reshape(heads, -1))
    weights = (weights / weights.sum(1, keepdims=True)).reshape(heads, len(shapes), points)
    result, starts = [], np.cumsum([0, *(h * w for h, w in shapes)])
    for head, values in enumerate(np.split(value, heads, axis=1)):
        total = 0.0
        for k, p in np.ndindex(len(shapes), points):
            (height, width), ref, offset = shapes[k], references[k], offsets[head, k, p]
            unit = [1 / width, 1 / height] if len(ref) == 2 else ref[2:] / 2 / points
            x, y = ref[:2] + offset * unit
            level = values[starts[k] : starts[k + 1]].reshape(height, width, -1)
            total = total + weights[head, k, p] * bilinear(level, x, y)
        result.append(total)
    return np.concatenate(result)


def normalized(x, params):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def after_attention(params, x, y, out, norm):
    return normalized(x + y @ params[out]["kernel"] + params[out]["bias"], params[norm])


def feed_forward(params, x):
    a, b = params["linear1"], params["linear2"]
    hidden = np.maximum(x @ a["kernel"] + a["bias"], 0)
    return normalized(x + hidden @ b["kernel"] + b["bias"], params["norm"])


def image_of(tree, i):
    return jax.tree.map(lambda x: np.asarray(x)[i : i + 1], tree)


@pytest.fixture(scope="module")
def encoder():
    """Returns a layer's parameters and the tokens that it makes."""
    model, inputs = DeformableEncoder(1, CONFIG, num_points=3), levels()
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), inputs)["params"]
    params = random_params(shapes)
    run = fast_jit(lambda p, x: model.apply({"params": p}, x, train=False))
    return params["layer0"], inputs, run(params, inputs), run, params


def test_encoder_layer_equals_a_plain_loop(encoder):
    """Catches values of padding, positions in the values, and offsets in the unit of boxes."""
    params, inputs, found, *_ = encoder
    references = np.asarray(inputs.references())
    for i, token in ((0, 3), (0, 70), (1, 0), (1, 9), (1, 65)):
        one = image_of(inputs, i)
        x = one.tokens[0, token]
        query = x + one.position[0, token]
        y = plain_attention(params, "", query, references[i, token], one, 3)
        want = after_attention(params, x, y, "out", "attention_norm")
        want = feed_forward(params["feed_forward"], want)
        np.testing.assert_allclose(found.tokens[i, token], want, rtol=1e-4, atol=1e-5)


def test_encoder_ignores_padded_tokens(encoder):
    _, inputs, found, run, params = encoder
    changed = jnp.where(inputs.valid[..., None], inputs.tokens, 100.0)
    again = run(params, inputs.replace(tokens=changed))
    valid = np.asarray(inputs.valid)
    np.testing.assert_array_equal(np.asarray(found.tokens)[valid], np.asarray(again.tokens)[valid])


class BoxHead(nn.Module):
    """A decoder with a box head, as its caller would have one."""

    decoder: DeformableDecoder

    @nn.compact
    def __call__(self, queries, memory):
        head = nn.Dense(4, name="box_head")
        return self.decoder(queries, memory, lambda layer, x: head(x), train=False)


@pytest.fixture(scope="module")
def decoder():
    """Returns a function of options to (model, parameters, queries, memory)."""
    rng = np.random.default_rng(3)
    content, anchors = rng.normal(size=(2, 5, 16)), rng.normal(size=(2, 5, 4))
    mask = np.ones((1, 1, 5), bool)
    queries = Queries(content.astype(np.float32), anchors.astype(np.float32), mask)

    def make(**options):
        model = BoxHead(DeformableDecoder(2, CONFIG, num_points=3, **options))
        shapes = jax.eval_shape(model.init, jax.random.key(0), queries, levels())["params"]
        return model, random_params(shapes), queries, levels()

    return make


def sine(reference, features=8):
    """Encodes y, x, w and h of a box by `features` sines and cosines each."""
    angles = [
        reference[k] * 2 * np.pi / 10000 ** (2 * (i // 2) / features)
        for k in (1, 0, 2, 3)
        for i in range(features)
    ]
    return np.array([np.cos(a) if i % 2 else np.sin(a) for i, a in enumerate(angles)])


@pytest.mark.parametrize("mask_padding", [True, False])
def test_decoder_layers_equal_a_plain_loop(decoder, mask_padding):
    """Catches the whole image for its valid part, a scaled first layer, and unrefined anchors."""
    model, params, queries, memory = decoder(mask_padding=mask_padding)
    run = fast_jit(lambda p, q, m: model.apply({"params": p}, q, m))
    states, references = map(np.asarray, run(params, queries, memory))
    outer, image = params["decoder"], 1
    one = image_of(memory, image)
    ratios = np.tile(one.ratios[0], 2)  # [levels, 4]
    x = queries.content[image]
    reference = 1 / (1 + np.exp(-queries.anchors[image].astype(np.float64)))

    def mlp(name, x):
        a, b = outer[name]["layer0"], outer[name]["layer1"]
        return np.maximum(x @ a["kernel"] + a["bias"], 0) @ b["kernel"] + b["bias"]

    for i in (0, 1):
        np.testing.assert_allclose(references[i, image], reference, atol=1e-5)
        layer = outer[f"layer{i}"]
        encoded = np.stack([sine(r if mask_padding else r * ratios[0]) for r in reference])
        position = mlp("reference_point_head", encoded)
        position = position * (mlp("query_scale", x) if i else 1)

        def linear(name, x, layer=layer):
            return np.split(x @ layer[name]["kernel"] + layer[name]["bias"], 2, axis=1)

        query, key = linear("self_query", x + position), linear("self_key", x + position)
        y = []
        for q, k, v in zip(query, key, linear("self_value", x), strict=True):
            scores = np.exp(q @ k.T / np.sqrt(8))
            y.append(scores / scores.sum(1, keepdims=True) @ v)
        x = after_attention(layer, x, np.concatenate(y, 1), "self_out", "self_norm")
        y = [
            plain_attention(layer, "cross_", (x + position)[q], reference[q] * ratios, one, 3)
            for q in range(5)
        ]
        x = after_attention(layer, x, np.stack(y), "cross_out", "cross_norm")
        x = feed_forward(layer["feed_forward"], x)
        np.testing.assert_allclose(states[i, image], x, rtol=1e-3, atol=1e-4)
        clipped = np.clip(reference, 1e-3, 1 - 1e-3)
        offsets = x @ params["box_head"]["kernel"] + params["box_head"]["bias"]
        reference = 1 / (1 + np.exp(-offsets) * (1 - clipped) / clipped)


@pytest.mark.parametrize("look_forward", [False, True])
def test_gradient_of_returned_boxes(decoder, look_forward):
    """Boxes of the second layer reach the first one's offsets with "look forward twice" alone."""
    model, params, queries, memory = decoder(look_forward=look_forward)

    def boxes(bias):
        changed = params | {"box_head": params["box_head"] | {"bias": bias}}
        return model.apply({"params": changed}, queries, memory)[1][1].sum()

    gradient = fast_jit(jax.grad(boxes))(params["box_head"]["bias"])
    assert (np.abs(gradient).max() > 1e-3) == look_forward


def test_parts_of_the_decoder_are_options(decoder):
    """DINO of detrex has a norm and no scale, DN-Deformable-DETR the contrary."""
    assert "norm" not in decoder()[1]["decoder"] and "query_scale" in decoder()[1]["decoder"]
    names = decoder(norm=True, query_scale=False)[1]["decoder"]
    assert "norm" in names and "query_scale" not in names
