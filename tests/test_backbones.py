"""The families of backbones: sizes, independence from the canvas, dropped and frozen parts."""

import functools
import math
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import fast_jit
from flax import traverse_util
from tiny_detector import random_params

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import ConfigError, ConversionError
from dn_detr_jax.interop.convert import backbone_from_torch
from dn_detr_jax.interop.names.backbones import MOBILENET_V2, NAMES, SWIN
from dn_detr_jax.models.backbones.build import build_backbone, frozen_backbone
from dn_detr_jax.models.backbones.mobilenet_v2 import MobileNetV2
from dn_detr_jax.models.backbones.swin import Block, Swin
from dn_detr_jax.models.images import normalize_images

TINY = {
    "swin": Swin(channels=8, depths=(2, 2, 2), heads=(2, 2, 4), window=3, levels=3),
    "mobilenet_v2": MobileNetV2(width=0.25),
}


def shapes_of(model, canvas=(64, 64)):
    image = jax.ShapeDtypeStruct((2, *canvas, 3), jnp.float32)
    size = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    features, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image, size)
    return [x.shape for x in features], variables["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "channels, depths, heads, window, published",
    [
        (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 27_519_354),
        (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 48_837_258),
        (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 86_878_584),
        (192, (2, 2, 18, 2), (6, 12, 24, 48), 7, 194_995_476),
        (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 195_198_516),
    ],
)
def test_swin_is_the_published_one(channels, depths, heads, window, published):
    """Compares with transformers' numbers, which have a norm behind the last stage alone."""
    model = Swin(channels, depths, heads, window)
    shapes, params = shapes_of(model, (300, 410))
    assert shapes == [
        (2, 38, 52, 2 * channels),
        (2, 19, 26, 4 * channels),
        (2, 10, 13, 8 * channels),
    ]
    assert count(params) == published + 2 * (2 + 4) * channels


def test_mobilenet_v2_is_the_published_one():
    """Compares with torchvision's number, less the classifier's, plus stored statistics."""
    shapes, params = shapes_of(MobileNetV2(), (300, 410))
    assert shapes == [(2, 75, 103, 24), (2, 38, 52, 32), (2, 19, 26, 96), (2, 10, 13, 1280)]
    flat = traverse_util.flatten_dict(params, sep="/")
    statistics = count([v for k, v in flat.items() if k.endswith(("/mean", "/var"))])
    assert count(params) - statistics == 3_504_872 - 1000 * 1281


@pytest.mark.parametrize("kind", TINY)
def test_features_do_not_depend_on_the_canvas(kind):
    """Compares an image alone, with sides that strides and windows do not divide, and on a canvas.

    Catches windows that reach from the padding into the image, the end of the shifted map at the
    canvas's in place of the image's, and merged padding. Without `mask_padding` all of it leaks.
    """
    canvas = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3)).astype(np.uint8)
    (height, width), size = (52, 75), np.int32([[52, 75]])
    params = random_params(shapes_of(TINY[kind])[1])

    @functools.partial(fast_jit, static_argnums=1)
    def run(image, mask_padding):
        model = TINY[kind].clone(mask_padding=mask_padding)
        return model.apply({"params": params}, normalize_images(image, size), size)

    alone, leaking = run(canvas[:, :height, :width], True), run(canvas, False)
    for want, got, leaked in zip(alone, run(canvas, True), leaking, strict=True):
        inside = np.s_[:, : want.shape[1], : want.shape[2]]
        largest = np.abs(want).max()
        np.testing.assert_allclose(got[inside], want, atol=1e-5 * largest)
        assert np.abs(leaked[inside] - want).max() > 1e-3 * largest


def test_dropped_residuals_leave_the_tokens_as_they_are():
    """Each image keeps or drops a residual as a whole, in training alone.

    Catches dropout of single numbers, and one draw for the whole batch.
    """
    x = np.random.default_rng(0).normal(size=(64, 3, 3, 4)).astype(np.float32)
    block = Block(heads=1, window=3, shift=0, drop_path=0.5)
    init = functools.partial(block.init, extent=None, train=False)
    params = random_params(jax.eval_shape(init, jax.random.key(0), x)["params"])

    def run(key, train):
        return block.apply({"params": params}, x, None, train, rngs={"dropout": key})

    run = fast_jit(run, static_argnums=1)
    dropped = np.asarray(run(jax.random.key(0), True))
    same = (dropped == x).all(axis=(1, 2, 3))
    assert 4 < same.sum() < 32  # both residuals dropped: a quarter of the images
    assert ((dropped == x).any(axis=(1, 2, 3)) == same).all()
    np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


def config_of(kind):
    """Returns a config of a tiny backbone of the kind."""
    config = base_config()
    config.model.backbone.kind = kind
    if kind == "swin":
        config.model.backbone.swin.update(channels=8, depths=(2, 2), heads=(2, 2), window=3)
    if kind == "mobilenet_v2":
        config.model.backbone.mobilenet_v2.width = 0.25
    return config


def test_recomputed_blocks_give_the_same_gradients():
    """Catches a block whose static argument is traced, and a mask that is lost on the way."""
    image = np.random.default_rng(0).normal(size=(2, 24, 32, 3)).astype(np.float32)
    size = np.int32([[24, 32], [17, 30]])
    plain = Swin(channels=8, depths=(2,), heads=(2,), window=3, levels=1)
    params = random_params(shapes_of(plain)[1])

    def gradient(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, image, size)[-1] ** 2)

        return fast_jit(jax.grad(loss))(params)

    want, got = gradient(plain), gradient(plain.clone(remat=True))
    for (path, a), b in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max(), err_msg=str(path))


@pytest.mark.parametrize(
    "kind, stages, frozen",
    [
        ("swin", -1, set()),
        ("swin", 0, {"stem_patches", "stem_norm"}),
        (
            "swin",
            1,
            {"stem_patches", "stem_norm", "stage0_block0", "stage0_block1", "stage0_merging"},
        ),
        ("mobilenet_v2", 1, {"stem", "block1", "block2", "block3"}),
    ],
)
def test_frozen_stages(kind, stages, frozen):
    """Catches a stage too many, layer norms taken for batch norms, and batch norms that train."""
    config = config_of(kind)
    config.model.backbone.frozen_stages = stages
    validate(config)
    patterns = frozen_backbone(config.model.backbone)
    params = shapes_of(build_backbone(config.model.backbone, jnp.float32, levels=1))[1]
    paths = traverse_util.flatten_dict(params, sep="/")
    flagged = {p for p in paths if any(re.search(x, f"backbone/{p}") for x in patterns)}
    batch_norms = {p for p in paths if kind == "mobilenet_v2" and p.split("/")[-2] == "norm"}
    assert flagged == batch_norms | {path for path in paths if path.split("/")[0] in frozen}
    norms = {path for path in paths if path.startswith("norm")}  # of the one level that is read
    assert norms == ({"norm1/scale", "norm1/bias"} if kind == "swin" else set())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"depth": 101},
            r"depth = 101: 50, its default: model.backbone.kind is 'swin', not 'resnet'",
        ),
        ({"dilation": True}, "dilation = True: False, its default"),
        (
            {"swin.heads": (2, 3)},
            r"heads = \(2, 3\): divisors of the channels of the stages, 8, 16",
        ),
        ({"swin.heads": (2,)}, "2 numbers, as many as model.backbone.swin.depths"),
        ({"frozen_stages": 3}, "to the length of model.backbone.swin.depths = 2"),
    ],
)
def test_wrong_backbones_are_refused(changes, message):
    """Catches keys of another family that are silently ignored."""
    config = config_of("swin")
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (config.model.backbone[section] if section else config.model.backbone)[name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


# --- weights of PyTorch ---------------------------------------------------------------------------


def torch_weight(name, shape):
    """Returns the weight that the stored features were computed with, by its PyTorch name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        value = rng.normal(0, 1.4 * math.prod(shape[1:]) ** -0.5, shape)
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(0, 0.3, shape)
    return value.astype(np.float32)


def file_of(kind):
    """Returns shapes of the backbone's parameters by path, and its state dict."""
    paths = traverse_util.flatten_dict({"backbone": shapes_of(TINY[kind])[1]}, sep="/")
    shapes = {path: leaf.shape for path, leaf in paths.items()}
    tensors, foreign = NAMES.tensors(shapes)
    assert not foreign
    prefix = {"swin": SWIN, "mobilenet_v2": MOBILENET_V2}[kind].prefix
    names = {tensor.name.removeprefix(prefix): tensor.shape for tensor in tensors}
    return shapes, {name: torch_weight(name, shape) for name, shape in names.items()}


@pytest.mark.parametrize("kind, last_step", [("swin", 1), ("mobilenet_v2", 16)])
def test_features_equal_those_of_pytorch(kind, last_step):
    """The stored features are those of transformers' SwinBackbone and torchvision's MobileNetV2.

    `tests/data/README.md` says how they were made. Maps are odd, and windows do not divide them.
    Catches a wrong name or layout, window order, bias index, shift mask, merge order or stride.
    """
    shapes, state = file_of(kind)
    params, report = backbone_from_torch(state, shapes)
    assert not report.unfilled and not report.unused
    params = traverse_util.unflatten_dict(params, sep="/")["backbone"]
    sides = {"swin": (59, 75), "mobilenet_v2": (52, 75)}[kind]
    image = np.random.default_rng(0).normal(size=(1, *sides, 3)).astype(np.float32)
    run = fast_jit(lambda image: TINY[kind].apply({"params": params}, image, np.int32([sides])))
    got = run(image)
    with np.load(Path(__file__).parent / "data" / "backbones.npz") as stored:
        for level, features in enumerate(got):
            step = last_step if level == len(got) - 1 else 1
            want = stored[f"{kind}_feature{level}"]
            np.testing.assert_allclose(features[..., ::step], want, atol=3e-5 * np.abs(want).max())


def test_files_of_swin():
    """ImageNet weights have no norms of the features; timm counts merging to the later stage."""
    shapes, state = file_of("swin")
    plain = {name: value for name, value in state.items() if not name.startswith("norm")}
    later = r"layers\.(\d)\.downsample"
    newer = {
        "model." + re.sub(later, lambda m: f"layers.{int(m[1]) + 1}.downsample", name): value
        for name, value in plain.items()
    }
    want, report = backbone_from_torch(plain | {"norm.weight": np.ones(32)}, shapes)
    assert report.unused == ("norm.weight",)
    assert {path.split("/")[1] for path in report.unfilled} == {"norm0", "norm1", "norm2"}
    got, _ = backbone_from_torch(newer, shapes)
    assert set(got) == set(want)
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_files_of_mobilenet_v2():
    """Older code has convolution, norm and activation of a block in one sequence.

    Catches a convolution that is taken for another one of the same shape.
    """
    shapes, state = file_of("mobilenet_v2")

    def older(match):
        triples = 1 if match[1] == "1" else 2  # of convolution, norm and activation
        first, _, second = match[2].partition(".")
        place = 3 * int(first) + int(second) if second else 3 * triples + int(first) - triples
        return f"features.{match[1]}.conv.{place}.{match[3]}"

    pattern = r"features\.(\d+)\.conv\.([\d.]+)\.(\w+)"
    names = {name: re.sub(pattern, older, name) for name in state}
    assert {f"features.3.conv.{place}.weight" for place in (0, 1, 3, 4, 6, 7)} < set(names.values())
    want, _ = backbone_from_torch(state, shapes)
    got, report = backbone_from_torch({names[name]: state[name] for name in state}, shapes)
    assert not report.unused and set(got) == set(want)
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_another_swin_is_refused_with_the_config_that_fits():
    """Catches a deeper model whose last blocks are silently left out."""
    shapes, state = file_of("swin")
    deeper = {name.replace("blocks.1", "blocks.2"): v for name, v in state.items()} | state
    fits = r"swin\.depths='\(3, 3, 3\)' .*swin\.heads='\(2, 2, 4\)' .*swin\.window=3"
    with pytest.raises(ConversionError, match=f"a deeper Swin Transformer: .*{fits}"):
        backbone_from_torch(deeper, shapes)
    with pytest.raises(ConversionError, match=r"nothing for .*mobilenet_v2\.width=0.25"):
        backbone_from_torch(file_of("mobilenet_v2")[1], shapes)
