"""The configuration of an experiment."""

from dn_detr_jax.config import (  # noqa: F401, known by import
    dn_deformable_detr,
    dn_deformable_encoder_detr,
    dn_detr_plain,
    dn_dino_detr,
)
from dn_detr_jax.config.augment_presets import augment_preset
from dn_detr_jax.config.compiler import check_attention, compiler_options
from dn_detr_jax.config.config import (
    base_config,
    expand_user,
    flat_keys,
    flat_values,
    nearest_key,
    nested_values,
    overridden,
    validate,
)
from dn_detr_jax.config.durations import parse_duration
from dn_detr_jax.config.experiments import find_config, load_config

__all__ = [
    "augment_preset",
    "base_config",
    "check_attention",
    "compiler_options",
    "expand_user",
    "find_config",
    "flat_keys",
    "flat_values",
    "load_config",
    "nearest_key",
    "nested_values",
    "overridden",
    "parse_duration",
    "validate",
]
