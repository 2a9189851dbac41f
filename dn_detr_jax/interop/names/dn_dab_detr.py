"""DN-DAB-DETR, and DAB-DETR: its state dict without the label table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop import architecture
from dn_detr_jax.interop.names import backbones
from dn_detr_jax.interop.torch_names import TorchNames, rows

_ENCODER = ("transformer.encoder.layers.{i}.", "encoder/layer{i}/")
_DECODER = ("transformer.decoder.layers.{i}.", "decoder/layer{i}/")

# The same for the model whose encoder alone is deformable.
DECODER_ROWS = rows(
    _DECODER,
    ("linear", "sa_qcontent_proj", "self_query_content"),
    ("linear", "sa_qpos_proj", "self_query_position"),
    ("linear", "sa_kcontent_proj", "self_key_content"),
    ("linear", "sa_kpos_proj", "self_key_position"),
    ("linear", "sa_v_proj", "self_value"),
    ("linear", "self_attn.out_proj", "self_out"),
    ("norm", "norm1", "self_norm"),
    ("linear", "ca_qcontent_proj", "cross_query_content"),
    ("linear", "ca_qpos_proj", "cross_query_position"),
    ("linear", "ca_kcontent_proj", "cross_key_content"),
    ("linear", "ca_kpos_proj", "cross_key_position"),
    ("linear", "ca_v_proj", "cross_value"),
    ("linear", "ca_qpos_sine_proj", "cross_query_sine"),
    ("norm", "norm2", "cross_norm"),
    ("linear", "linear1", "feed_forward/linear1"),
    ("linear", "linear2", "feed_forward/linear2"),
    ("norm", "norm3", "feed_forward/norm"),
    ("slope", "activation", "feed_forward/activation"),
)
HEAD_ROWS = (
    *rows(
        ("transformer.", ""),
        ("linear", "decoder.query_scale.layers.{j}", "decoder/query_scale/layer{j}"),
        ("linear", "decoder.ref_point_head.layers.{j}", "decoder/reference_point_head/layer{j}"),
        ("linear", "decoder.ref_anchor_head.layers.{j}", "decoder/reference_size_head/layer{j}"),
        ("norm", "decoder.norm", "decoder/norm"),
        ("table", "patterns", "patterns"),
    ),
    *rows(
        ("", ""),
        ("linear", "class_embed", "class_head"),
        ("linear", "bbox_embed.layers.{j}", "box_head/layer{j}"),
        ("table", "label_enc", "label_embedding"),
        ("table", "refpoint_embed", "anchors"),
    ),
)

# The same for DETR.
ENCODER_ROWS = rows(
    _ENCODER,
    ("packed", "self_attn.in_proj", ("query", "key", "value")),
    ("linear", "self_attn.out_proj", "out"),
    ("linear", "linear1", "feed_forward/linear1"),
    ("linear", "linear2", "feed_forward/linear2"),
    ("norm", "norm1", "attention_norm"),
    ("norm", "norm2", "feed_forward/norm"),
    ("slope", "activation", "feed_forward/activation"),
)
_ROWS = (
    *backbones.ROWS,
    *ENCODER_ROWS,
    *DECODER_ROWS,
    *rows(_DECODER, ("linear", "cross_attn.out_proj", "cross_out")),
    *HEAD_ROWS,
    *rows(
        ("", ""),
        ("linear", "transformer.encoder.query_scale.layers.{j}", "encoder/query_scale/layer{j}"),
        ("pointwise", "input_proj", "input_proj"),
    ),
)


def query_config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of queries, heads and temperatures; these are in the arguments alone."""
    patterns = state.get("transformer.patterns.weight")
    found = {
        "model.num_classes": state["class_embed.weight"].shape[0],
        "model.hidden_dim": state["class_embed.weight"].shape[1],
        "model.num_queries": state["refpoint_embed.weight"].shape[0],
        "model.num_patterns": 0 if patterns is None else patterns.shape[0],
    }
    temperatures = {
        "pe_temperatureH": "model.pe_temperature_h",
        "pe_temperatureW": "model.pe_temperature_w",
    }
    return found | architecture.from_args(args, temperatures)


def _config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """See `TorchNames.config`."""
    slope = "transformer.decoder.layers.0.activation.weight"
    activation = {"model.activation": "prelu" if slope in state else "relu"}
    transformer = architecture.transformer_config(state, args)
    return query_config(state, args) | activation | transformer


NEEDS = ("class_embed.weight", "refpoint_embed.weight", "label_enc.weight")
TIED = (("transformer.decoder.bbox_embed.", "bbox_embed."),)

NAMES = TorchNames(
    rows=_ROWS,
    config=_config,
    needs=NEEDS,
    excludes=(r".*sampling_offsets.*",),
    tied=TIED,
)
