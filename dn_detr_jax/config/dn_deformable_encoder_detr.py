"""The config keys of DN-Deformable-Encoder-DETR: those of DN-DAB-DETR, and the feature levels."""

from dn_detr_jax.config import dn_dab_detr
from dn_detr_jax.config.dn_deformable_detr import CHECKS, LEVEL_KEYS, POINT_KEYS, with_defaults
from dn_detr_jax.config.variants import register

NAME = "dn_deformable_encoder_detr"

_NOT_SHARED = ("model.activation", "model.position_gain")
KEYS = (
    *LEVEL_KEYS,
    *(key for key in POINT_KEYS if key.path == "model.encoder_points"),
    *with_defaults(
        (key for key in dn_dab_detr.KEYS if key.path not in _NOT_SHARED),
        {"model.num_patterns": 3},
    ),
)

register(NAME, KEYS, CHECKS)
