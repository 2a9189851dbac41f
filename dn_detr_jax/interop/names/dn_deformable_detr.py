"""DN-Deformable-DETR."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop import architecture
from dn_detr_jax.interop.names import backbones
from dn_detr_jax.interop.torch_names import TorchNames, rows

# The same for every variant with several feature levels.
LEVEL_ROWS = rows(
    ("", ""),
    ("projection", "input_proj.{l}.0", "input_proj{l}"),
    ("norm", "input_proj.{l}.1", "input_norm{l}"),
    ("array", "transformer.level_embed", "level_embedding"),
)
ENCODER_ROWS = rows(
    ("transformer.encoder.layers.{i}.", "encoder/layer{i}/"),
    ("linear", "self_attn.sampling_offsets", "sampling_offsets"),
    ("linear", "self_attn.attention_weights", "attention_weights"),
    ("linear", "self_attn.value_proj", "value"),
    ("linear", "self_attn.output_proj", "out"),
    ("norm", "norm1", "attention_norm"),
    ("linear", "linear1", "feed_forward/linear1"),
    ("linear", "linear2", "feed_forward/linear2"),
    ("norm", "norm2", "feed_forward/norm"),
)
# Their norms are not numbered in the order of execution.
DECODER_ROWS = rows(
    ("transformer.decoder.layers.{i}.", "decoder/layer{i}/"),
    ("packed", "self_attn.in_proj", ("self_query", "self_key", "self_value")),
    ("linear", "self_attn.out_proj", "self_out"),
    ("norm", "norm2", "self_norm"),
    ("linear", "cross_attn.sampling_offsets", "cross_sampling_offsets"),
    ("linear", "cross_attn.attention_weights", "cross_attention_weights"),
    ("linear", "cross_attn.value_proj", "cross_value"),
    ("linear", "cross_attn.output_proj", "cross_out"),
    ("norm", "norm1", "cross_norm"),
    ("linear", "linear1", "feed_forward/linear1"),
    ("linear", "linear2", "feed_forward/linear2"),
    ("norm", "norm3", "feed_forward/norm"),
)
SHARED_ROWS = (
    *backbones.ROWS,
    *LEVEL_ROWS,
    *ENCODER_ROWS,
    *DECODER_ROWS,
    *rows(
        ("transformer.decoder.", "decoder/"),
        ("linear", "query_scale.layers.{j}", "query_scale/layer{j}"),
        ("linear", "ref_point_head.layers.{j}", "reference_point_head/layer{j}"),
    ),
    *rows(
        ("", ""),
        ("linear", "class_embed.{i}", "class_head_{i}"),
        ("linear", "bbox_embed.{i}.layers.{j}", "box_head_{i}/layer{j}"),
        ("table", "label_enc", "label_embedding"),
    ),
)
_ROWS = (
    *SHARED_ROWS,
    *rows(("", ""), ("table", "tgt_embed", "content"), ("table", "refpoint_embed", "anchors")),
)


def levels_of(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The keys of the feature levels."""
    kernels = [name for name in state if name.startswith("input_proj.") and state[name].ndim == 4]
    extra = sum(state[name].shape[2] > 1 for name in kernels)
    return {"model.backbone_levels": len(kernels) - extra, "model.extra_levels": extra}


def level_config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a transformer with deformable attention and its levels, without its queries.

    The number of heads, which only `args` tell, decides that of points.
    """
    levels = levels_of(state)
    classes, hidden = state["class_embed.0.weight"].shape
    found = {
        "model.num_classes": classes,
        "model.hidden_dim": hidden,
        "model.indicator": state["label_enc.weight"].shape[1] < hidden,
        **levels,
    }
    if "nheads" in args:
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
            name = f"transformer.{part}.layers.0.{attention}.attention_weights.bias"
            points = (
                len(state[name]) // (args["nheads"] * sum(levels.values())) if name in state else 4
            )
            found[f"model.{part}_points"] = points
    return found | architecture.transformer_config(state, args)


def _config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """See `TorchNames.config`."""
    found = level_config(state, args)
    return found | {"model.num_queries": state["refpoint_embed.weight"].shape[0]}


NEEDS = (
    "class_embed.0.weight",
    "label_enc.weight",
    "transformer.level_embed",
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
)
TIED = tuple((f"transformer.decoder.{head}.", f"{head}.") for head in ("bbox_embed", "class_embed"))

NAMES = TorchNames(
    rows=_ROWS,
    config=_config,
    needs=(*NEEDS, "refpoint_embed.weight", "tgt_embed.weight"),
    excludes=("transformer.enc_output.weight",),
    tied=TIED[:1],
)
