"""The config keys of backbones, the same for every variant that has one of this package's."""

from dn_detr_jax.config.checks import Values, require
from dn_detr_jax.config.key import architecture_key
from dn_detr_jax.config.rules import BELOW_ONE, FLAG, SIZES, number, one_of, whole

_RESNET_KEYS = (
    architecture_key("backbone.depth", 50, "layers of the ResNet", one_of(18, 34, 50, 101)),
    architecture_key("backbone.width", 64, "channels of the ResNet's first stage", whole(4)),
    architecture_key(
        "backbone.stages",
        4,
        "stages of the ResNet; the output has stride 4 x 2 ** (stages - 1)",
        one_of(1, 2, 3, 4),
    ),
    architecture_key(
        "backbone.norm",
        "frozen_batch_norm",
        "normalization of the ResNet; group_norm is for training from scratch",
        one_of("frozen_batch_norm", "group_norm"),
    ),
    architecture_key(
        "backbone.stem",
        "standard",
        "of the ResNet; standard: 7x7 with stride 2 and max pooling; light: 3x3 with stride 2",
        one_of("standard", "light"),
    ),
    architecture_key(
        "backbone.dilation",
        False,
        "True: the last stage of the ResNet is dilated in place of its stride",
        FLAG,
    ),
)
_SWIN_KEYS = (
    architecture_key(
        "backbone.swin.channels", 96, "channels of the Swin Transformer's first stage", whole(1)
    ),
    architecture_key(
        "backbone.swin.depths", (2, 2, 6, 2), "blocks of each stage of the Swin Transformer", SIZES
    ),
    architecture_key("backbone.swin.heads", (3, 6, 12, 24), "attention heads of each stage", SIZES),
    architecture_key("backbone.swin.window", 7, "side of the attention windows, tokens", whole(1)),
    architecture_key(
        "backbone.swin.drop_path",
        0.0,
        "probability that the last block is skipped in training; it rises linearly over the blocks",
        BELOW_ONE,
    ),
)
_MOBILENET_KEYS = (
    architecture_key(
        "backbone.mobilenet_v2.width",
        1.0,
        "factor of the channels of MobileNetV2",
        number("from 0.1 to 4", lambda value: 0.1 <= value <= 4),
    ),
)

BACKBONE_KEYS = (
    architecture_key(
        "backbone.kind",
        "resnet",
        "family of the backbone",
        one_of("resnet", "swin", "mobilenet_v2"),
    ),
    *_RESNET_KEYS,
    architecture_key(
        "backbone.mask_padding",
        True,
        "True: features do not depend on the canvas; False: they do, as in PyTorch",
        FLAG,
    ),
    architecture_key(
        "backbone.frozen_stages",
        1,
        "the stem and so many stages get no gradient; -1: all are trained",
        whole(-1),
    ),
    *_SWIN_KEYS,
    *_MOBILENET_KEYS,
)


def check_backbone_kind(values: Values) -> None:
    """Keys of a family that `model.backbone.kind` does not name keep their defaults."""
    owners = {"resnet": _RESNET_KEYS, "swin": _SWIN_KEYS, "mobilenet_v2": _MOBILENET_KEYS}
    kind = values["model.backbone.kind"]
    for owner, keys in owners.items():
        for key in keys:
            same = _plain(values[key.path]) == _plain(key.default)
            expected = (
                f"{key.default!r}, its default: model.backbone.kind is {kind!r}, not {owner!r}"
            )
            require(values, key.path, owner == kind or same, expected)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_dilation(values: Values) -> None:
    """`model.backbone.dilation` needs more than one stage."""
    require(
        values,
        "model.backbone.dilation",
        values["model.backbone.stages"] > 1 or not values["model.backbone.dilation"],
        "the first stage has no stride to dilate: more stages, or False",
    )


def check_group_norm(values: Values) -> None:
    """With group norm `model.backbone.width` is one such as 8, 16, 32, 48, 64, 96 or 128."""
    # At most 32 groups of at least 4 channels; channels double from stage to stage, and
    # bottlenecks have four times as many.
    width = values["model.backbone.width"]
    fits = all(c % min(32, c // 4) == 0 for c in (width * 2**i for i in range(6)))
    require(
        values,
        "model.backbone.width",
        fits or values["model.backbone.norm"] != "group_norm",
        "with group norm a width such as 8, 16, 32, 48, 64, 96 or 128",
    )


def check_swin_heads(values: Values) -> None:
    """`model.backbone.swin.heads` has a divisor of the channels for each of 1 to 4 stages."""
    depths, heads = values["model.backbone.swin.depths"], values["model.backbone.swin.heads"]
    path = "model.backbone.swin.depths"
    require(values, path, len(depths) <= 4, "one number of blocks for each of 1 to 4 stages")
    path = "model.backbone.swin.heads"
    fits = len(heads) == len(depths)
    require(values, path, fits, f"{len(depths)} numbers, as many as model.backbone.swin.depths")
    channels = [values["model.backbone.swin.channels"] * 2**i for i in range(len(depths))]
    fits = all(c % h == 0 for c, h in zip(channels, heads, strict=True))
    expected = f"divisors of the channels of the stages, {', '.join(map(str, channels))}"
    require(values, path, fits, expected)


def number_of_stages(values: Values) -> tuple[str, int]:
    """Returns what decides the number of the backbone's stages, in words, and the number."""
    kind = values["model.backbone.kind"]
    if kind == "swin":
        path = "model.backbone.swin.depths"
        return f"the length of {path}", len(values[path])
    if kind == "mobilenet_v2":
        return "the stages of MobileNetV2", 4
    return "model.backbone.stages", values["model.backbone.stages"]


def check_frozen_stages(values: Values) -> None:
    """`model.backbone.frozen_stages` is at most the number of the backbone's stages."""
    name, stages = number_of_stages(values)
    require(
        values,
        "model.backbone.frozen_stages",
        values["model.backbone.frozen_stages"] <= stages,
        f"from -1 (none) to {name} = {stages}",
    )


BACKBONE_CHECKS = (
    check_backbone_kind,
    check_dilation,
    check_group_norm,
    check_swin_heads,
    check_frozen_stages,
)
