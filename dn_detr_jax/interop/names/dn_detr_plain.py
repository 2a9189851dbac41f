"""Plain DN-DETR: the official DETR with denoising.

DETR has no names for what denoising adds; those here are of this package. A state dict without them
is one of DETR, see `elsewhere.OFFICIAL_DETR`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop import architecture
from dn_detr_jax.interop.names import backbones
from dn_detr_jax.interop.names.dn_dab_detr import ENCODER_ROWS
from dn_detr_jax.interop.torch_names import TorchNames, rows

_SELF, _CROSS = (
    tuple(f"{x}_{part}" for part in ("query", "key", "value")) for x in ("self", "cross")
)
_ROWS = (
    *backbones.ROWS,
    *ENCODER_ROWS,
    *rows(
        ("transformer.decoder.layers.{i}.", "decoder/layer{i}/"),
        ("packed", "self_attn.in_proj", _SELF),
        ("linear", "self_attn.out_proj", "self_out"),
        ("packed", "multihead_attn.in_proj", _CROSS),
        ("linear", "multihead_attn.out_proj", "cross_out"),
        ("linear", "linear1", "feed_forward/linear1"),
        ("linear", "linear2", "feed_forward/linear2"),
        ("norm", "norm1", "self_norm"),
        ("norm", "norm2", "cross_norm"),
        ("norm", "norm3", "feed_forward/norm"),
    ),
    *rows(
        ("", ""),
        ("norm", "transformer.decoder.norm", "decoder/norm"),
        ("linear", "class_embed", "class_head"),
        ("linear", "bbox_embed.layers.{j}", "box_head/layer{j}"),
        ("table", "query_embed", "query_position"),
        ("pointwise", "input_proj", "input_proj"),
        # Of denoising alone.
        ("table", "label_enc", "label_embedding"),
        ("linear", "box_enc.layers.{j}", "box_position/layer{j}"),
    ),
)
DENOISING = (
    "label_enc.weight",
    *(f"box_enc.layers.{j}.{x}" for j in (0, 1) for x in ("weight", "bias")),
)


def _config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """See `TorchNames.config`."""
    outputs, hidden_dim = state["class_embed.weight"].shape
    labels = state.get("label_enc.weight")
    found = {
        "model.num_classes": outputs - 1,  # the last one is "no object"
        "model.hidden_dim": hidden_dim,
        "model.num_queries": state["query_embed.weight"].shape[0],
        "model.indicator": labels is None or labels.shape[1] < hidden_dim,
    }
    return found | architecture.transformer_config(state, args)


NAMES = TorchNames(
    rows=_ROWS,
    config=_config,
    needs=(
        "class_embed.weight",
        "query_embed.weight",
        "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    ),
)
