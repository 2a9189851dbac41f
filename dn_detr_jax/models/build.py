"""Parts of detectors from `config.model`, for the variants that share them."""

import functools

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.attention import attention, fused_attention
from dn_detr_jax.models.encoder import DeformableEncoder
from dn_detr_jax.models.layers import LayerConfig
from dn_detr_jax.models.pyramid import MultiLevel


def layer_config(config: ConfigDict, attention_kernel: str, activation: str) -> LayerConfig:
    """Makes the settings of all layers of encoder and decoder.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`.
      activation: of the feed-forward networks.
    """
    plain = functools.partial(attention, remat="attention" in config.remat)
    return LayerConfig(
        num_heads=config.num_heads,
        ffn_dim=config.ffn_dim,
        activation=activation,
        dropout=config.dropout,
        dtype=jnp.dtype(config.dtype),
        attention_fn=fused_attention if attention_kernel == "cudnn" else plain,
    )


def multi_level(config: ConfigDict, *, half_pixel: bool) -> MultiLevel:
    """Makes the pyramid of a detector with several feature levels."""
    return MultiLevel(
        config.hidden_dim,
        backbone_levels=config.backbone_levels,
        extra_levels=config.extra_levels,
        temperature_h=config.pe_temperature_h,
        temperature_w=config.pe_temperature_w,
        half_pixel=half_pixel,
        mask_padding=config.backbone.mask_padding,
        dtype=jnp.dtype(config.dtype),
    )


def deformable_encoder(config: ConfigDict, layers: LayerConfig) -> DeformableEncoder:
    """Makes the encoder of a detector with several feature levels."""
    points, remat = config.encoder_points, "encoder" in config.remat
    return DeformableEncoder(config.encoder_layers, layers, points, remat)
