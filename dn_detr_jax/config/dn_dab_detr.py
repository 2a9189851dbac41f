"""The config keys of DN-DAB-DETR (Li et al., CVPR 2022): the defaults are those of section 6.1."""

from dn_detr_jax.config.checks import Values, require
from dn_detr_jax.config.keys import Key
from dn_detr_jax.config.rules import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FLAG,
    Rule,
    one_of,
    some_of,
    whole,
)
from dn_detr_jax.config.variants import register

NAME = "dn_dab_detr"


def _shaping(name: str, default: object, meaning: str, rule: Rule) -> Key:
    """A key of the architecture: checkpoints fit no other value."""
    return Key(f"model.{name}", default, meaning, rule, evaluation="same")


# A backbone of the ResNet family; the same for every variant that has one.
RESNET_KEYS = (
    _shaping("backbone.depth", 50, "layers of the ResNet", one_of(18, 34, 50, 101)),
    _shaping("backbone.width", 64, "channels of the first stage", whole(4)),
    _shaping(
        "backbone.stages",
        4,
        "stages; the output has stride 4 x 2 ** (stages - 1)",
        one_of(1, 2, 3, 4),
    ),
    _shaping(
        "backbone.norm",
        "frozen_batch_norm",
        "normalization; group_norm is for training from scratch",
        one_of("frozen_batch_norm", "group_norm"),
    ),
    _shaping(
        "backbone.stem",
        "standard",
        "standard: 7x7 with stride 2 and max pooling; light: 3x3 with stride 2",
        one_of("standard", "light"),
    ),
    _shaping(
        "backbone.dilation", False, "True: the last stage is dilated in place of its stride", FLAG
    ),
    _shaping(
        "backbone.mask_padding",
        True,
        "True: features do not depend on the canvas; False: they do, as in PyTorch",
        FLAG,
    ),
    _shaping(
        "backbone.frozen_stages",
        1,
        "the stem and so many stages get no gradient; -1: all are trained",
        whole(-1),
    ),
)

KEYS = (
    _shaping("hidden_dim", 256, "channels of the transformer", whole(1)),
    _shaping("num_heads", 8, "heads of every attention", whole(1)),
    _shaping("ffn_dim", 2048, "channels inside the feed-forward layers", whole(1)),
    _shaping("encoder_layers", 6, "layers of the encoder", whole(0)),
    _shaping("decoder_layers", 6, "layers of the decoder", whole(1)),
    _shaping("num_queries", 300, "anchors of the matching queries", whole(1)),
    _shaping("num_patterns", 0, "learned content patterns for each anchor; 0: none", whole(0)),
    _shaping(
        "indicator",
        True,
        "True: the last channel of the content tells denoising queries (1) from matching queries "
        "(0)",
        FLAG,
    ),
    _shaping(
        "activation", "prelu", "activation of the feed-forward layers", one_of("prelu", "relu")
    ),
    _shaping("dropout", 0.0, "dropout probability in the transformer", BELOW_ONE),
    _shaping(
        "pe_temperature_h",
        20.0,
        "vertical temperature of the image's sine position encoding",
        ABOVE_ZERO,
    ),
    _shaping("pe_temperature_w", 20.0, "horizontal temperature of the same", ABOVE_ZERO),
    _shaping(
        "pe_temperature_box", 10000.0, "temperature of the sine encoding of the anchors", ABOVE_ZERO
    ),
    _shaping(
        "position_gain",
        0.0,
        "above 0: cross-attention is initialized to attend near the anchors",
        AT_LEAST_ZERO,
    ),
    _shaping(
        "random_refpoints_xy",
        False,
        "True: the anchors' centers are initialized uniformly over the image",
        FLAG,
    ),
    Key(
        "model.remat",
        (),
        "parts that are computed again in the backward pass to save memory: layers of backbone, "
        "encoder and decoder, or the attention scores alone; results stay the same",
        some_of("backbone", "encoder", "decoder", "attention"),
        resume="free",
    ),
    *RESNET_KEYS,
)


def check_hidden_dim(values: Values) -> None:
    """`model.hidden_dim` is a multiple of 4: sine and cosine for height and width."""
    fits = values["model.hidden_dim"] % 4 == 0
    expected = "a multiple of 4: sine and cosine for height and width"
    require(values, "model.hidden_dim", fits, expected)


def check_heads(values: Values) -> None:
    """`model.num_heads` divides `model.hidden_dim`."""
    hidden, heads = values["model.hidden_dim"], values["model.num_heads"]
    near = ", ".join(str(n) for n in range(1, min(hidden, 32) + 1) if hidden % n == 0)
    expected = f"a divisor of model.hidden_dim = {hidden}: {near}"
    require(values, "model.num_heads", hidden % heads == 0, expected)


def check_fused_heads(values: Values) -> None:
    """`compile.attention` "cudnn" takes heads of at most 128 channels, counted twice."""
    widest = 2 * values["model.hidden_dim"] // values["model.num_heads"]
    require(
        values,
        "compile.attention",
        values["compile.attention"] != "cudnn" or widest <= 128,
        f'"xla" for heads of {widest} channels, 2 x model.hidden_dim / model.num_heads: cuDNN\'s '
        "attention takes at most 128",
    )


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


def check_frozen_stages(values: Values) -> None:
    """`model.backbone.frozen_stages` is at most `model.backbone.stages`."""
    stages = values["model.backbone.stages"]
    require(
        values,
        "model.backbone.frozen_stages",
        values["model.backbone.frozen_stages"] <= stages,
        f"from -1 (none) to model.backbone.stages = {stages}",
    )


def check_num_select(values: Values) -> None:
    """`eval.num_select` is at most the number of matching queries x `model.num_classes`."""
    queries = values["model.num_queries"] * max(1, values.get("model.num_patterns", 0))
    most = queries * values["model.num_classes"]
    require(
        values,
        "eval.num_select",
        values["eval.num_select"] <= most or not most,
        f"at most model.num_queries x model.num_classes (x model.num_patterns) = {most}",
    )


RESNET_CHECKS = (check_dilation, check_group_norm, check_frozen_stages)
CHECKS = (check_hidden_dim, check_heads, check_fused_heads, *RESNET_CHECKS, check_num_select)

register(NAME, KEYS, CHECKS)
