"""The configuration of an experiment."""

from dn_detr_jax.config.config import (
    base_config,
    check_attention,
    compiler_options,
    expand_user,
    flat_keys,
    nearest_key,
    parse_duration,
    validate,
)

__all__ = [
    "base_config",
    "check_attention",
    "compiler_options",
    "expand_user",
    "flat_keys",
    "nearest_key",
    "parse_duration",
    "validate",
]
