"""The config keys of DN-DINO-DETR: those of DN-Deformable-DETR, and what DINO adds.

Zhang et al., ICLR 2023; the defaults are those of the published models.
"""

from dn_detr_jax.config.dn_deformable_detr import (
    CHECKS,
    LEVEL_KEYS,
    POINT_KEYS,
    TRANSFORMER_KEYS,
    with_defaults,
)
from dn_detr_jax.config.key import architecture_key
from dn_detr_jax.config.keys import SHARED_KEYS
from dn_detr_jax.config.rules import FLAG, one_of
from dn_detr_jax.config.variants import register

NAME = "dn_dino_detr"

KEYS = (
    *LEVEL_KEYS,
    *POINT_KEYS,
    *with_defaults(TRANSFORMER_KEYS, {"model.num_queries": 900, "model.indicator": False}),
    architecture_key(
        "proposal_score",
        "class",
        "queries start at the encoder's proposals with the highest score; class: the best logit, "
        "trained by the classes of the selected proposals; objectness: logit 0, trained by all "
        "proposals",
        one_of("class", "objectness"),
    ),
    architecture_key(
        "decoder_norm",
        True,
        "True: one layer norm in front of the heads of all layers",
        FLAG,
    ),
    architecture_key(
        "query_scale",
        False,
        "True: the encoding of the anchors is scaled by the content",
        FLAG,
    ),
    *with_defaults(
        [key for key in SHARED_KEYS if key.path == "dn.contrastive"], {"dn.contrastive": True}
    ),
)

register(NAME, KEYS, CHECKS)
