"""The DINO of the official DN-DETR code."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop.names.dn_deformable_detr import NEEDS, SHARED_ROWS, TIED, level_config
from dn_detr_jax.interop.torch_names import TorchNames, rows

_ROWS = (
    *SHARED_ROWS,
    *rows(
        ("transformer.", ""),
        ("linear", "enc_output", "proposal_proj"),
        ("norm", "enc_output_norm", "proposal_norm"),
        ("table", "tgt_embed", "content"),
        ("norm", "decoder.norm", "decoder/norm"),
    ),
)


def _config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """See `TorchNames.config`."""
    found = level_config(state, args)
    return found | {
        "model.num_queries": state["transformer.tgt_embed.weight"].shape[0],
        "model.query_scale": "transformer.decoder.query_scale.layers.0.weight" in state,
        "model.decoder_norm": "transformer.decoder.norm.weight" in state,
        # Shapes do not tell; the code that has the indicator scores proposals by logit 0.
        "model.proposal_score": "objectness" if found["model.indicator"] else "class",
    }


NAMES = TorchNames(
    rows=_ROWS,
    config=_config,
    needs=(*NEEDS, "transformer.enc_output.weight", "transformer.tgt_embed.weight"),
    tied=TIED,
)
