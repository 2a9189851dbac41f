"""The config keys of plain DN-DETR: defaults are those of DETR (Carion et al., ECCV 2020)."""

from dn_detr_jax.config import dn_dab_detr
from dn_detr_jax.config.dn_deformable_detr import with_defaults
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.keys import SHARED_KEYS
from dn_detr_jax.config.rules import PROBABILITY
from dn_detr_jax.config.variants import register

NAME = "dn_detr_plain"

_NOT_SHARED = ("num_patterns", "activation", "position_gain", "random_refpoints_xy")
KEYS = (
    *with_defaults(
        (key for key in dn_dab_detr.KEYS if key.path.removeprefix("model.") not in _NOT_SHARED),
        {
            "model.num_queries": 100,
            "model.dropout": 0.1,
            "model.pe_temperature_h": 10000.0,
            "model.pe_temperature_w": 10000.0,
        },
    ),
    Key(
        "loss.no_object_weight",
        0.1,
        "weight in the class loss of the queries without object, against 1 for the others",
        PROBABILITY,
    ),
    *with_defaults(
        (key for key in SHARED_KEYS if key.path == "matcher.cost_class"),
        {"matcher.cost_class": 1.0},
    ),
)
CHECKS = dn_dab_detr.CHECKS

register(NAME, KEYS, CHECKS)
