"""Checks the shapes in signatures at every call, in the modules that are listed here.

`conftest.py` imports this before anything that imports them. Processes that tests start check
nothing, as in production.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

MODULES = [
    "dn_detr_jax.boxes",
    "dn_detr_jax.losses",
    "dn_detr_jax.matching",
    "dn_detr_jax.denoising",
    "dn_detr_jax.noise",
    "dn_detr_jax.criterion",
    "dn_detr_jax.models",
    "dn_detr_jax.evaluation.detect",
    "dn_detr_jax.evaluation.postprocess",
]

# An int is accepted where a float is asked for, as in Python itself.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

install_import_hook(MODULES, "typecheck.check")
