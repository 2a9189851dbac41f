"""DN-Deformable-Encoder-DETR, the official code's "deformable encoder only" model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop import architecture
from dn_detr_jax.interop.names import backbones, dn_dab_detr
from dn_detr_jax.interop.names.dn_deformable_detr import ENCODER_ROWS, LEVEL_ROWS, levels_of
from dn_detr_jax.interop.torch_names import TorchNames, rows

_ROWS = (
    *backbones.ROWS,
    *LEVEL_ROWS,
    *ENCODER_ROWS,
    *dn_dab_detr.DECODER_ROWS,
    *rows(
        ("transformer.decoder.layers.{i}.", "decoder/layer{i}/"),
        ("linear", "ca_out_v_proj", "cross_out"),
        ("linear", "lvl_attn", "level_attention"),
    ),
    *dn_dab_detr.HEAD_ROWS,
)


def _config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """See `TorchNames.config`."""
    levels = levels_of(state)
    found = dn_dab_detr.query_config(state, args) | levels
    weights = state.get("transformer.encoder.layers.0.self_attn.attention_weights.bias")
    if "nheads" in args and weights is not None:
        points = len(weights) // (args["nheads"] * sum(levels.values()))
        found["model.encoder_points"] = points
    return found | architecture.transformer_config(state, args)


NAMES = TorchNames(
    rows=_ROWS,
    config=_config,
    needs=(
        *dn_dab_detr.NEEDS,
        "transformer.level_embed",
        "transformer.decoder.layers.0.lvl_attn.weight",
    ),
    tied=dn_dab_detr.TIED,
)
