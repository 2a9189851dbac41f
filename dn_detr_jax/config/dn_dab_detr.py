"""The config keys of DN-DAB-DETR (Li et al., CVPR 2022): the defaults are those of section 6.1."""

from dn_detr_jax.config.backbones import BACKBONE_CHECKS, BACKBONE_KEYS
from dn_detr_jax.config.checks import Values, require
from dn_detr_jax.config.key import Key, architecture_key
from dn_detr_jax.config.rules import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FLAG,
    one_of,
    some_of,
    whole,
)
from dn_detr_jax.config.variants import register

NAME = "dn_dab_detr"

KEYS = (
    architecture_key("hidden_dim", 256, "channels of the transformer", whole(1)),
    architecture_key("num_heads", 8, "heads of every attention", whole(1)),
    architecture_key("ffn_dim", 2048, "channels inside the feed-forward layers", whole(1)),
    architecture_key("encoder_layers", 6, "layers of the encoder", whole(0)),
    architecture_key("decoder_layers", 6, "layers of the decoder", whole(1)),
    architecture_key("num_queries", 300, "anchors of the matching queries", whole(1)),
    architecture_key(
        "num_patterns", 0, "learned content patterns for each anchor; 0: none", whole(0)
    ),
    architecture_key(
        "indicator",
        True,
        "True: the last channel of the content tells denoising queries (1) from matching queries "
        "(0)",
        FLAG,
    ),
    architecture_key(
        "activation", "prelu", "activation of the feed-forward layers", one_of("prelu", "relu")
    ),
    architecture_key("dropout", 0.0, "dropout probability in the transformer", BELOW_ONE),
    architecture_key(
        "pe_temperature_h",
        20.0,
        "vertical temperature of the image's sine position encoding",
        ABOVE_ZERO,
    ),
    architecture_key("pe_temperature_w", 20.0, "horizontal temperature of the same", ABOVE_ZERO),
    architecture_key(
        "pe_temperature_box", 10000.0, "temperature of the sine encoding of the anchors", ABOVE_ZERO
    ),
    architecture_key(
        "position_gain",
        0.0,
        "above 0: cross-attention is initialized to attend near the anchors",
        AT_LEAST_ZERO,
    ),
    architecture_key(
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
    *BACKBONE_KEYS,
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


CHECKS = (check_hidden_dim, check_heads, check_fused_heads, *BACKBONE_CHECKS, check_num_select)

register(NAME, KEYS, CHECKS)
