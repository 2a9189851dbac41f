"""Parts and facts of detectors from `config.model`, for the variants that share them."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from dn_detr_jax.models.attention import attention, fused_attention
from dn_detr_jax.models.backbones.build import build_backbone, frozen_backbone
from dn_detr_jax.models.encoder import DeformableEncoder, DenseEncoder
from dn_detr_jax.models.initializers import xavier_uniform
from dn_detr_jax.models.layers import LayerConfig
from dn_detr_jax.models.pyramid import LastLevel, MultiLevel
from dn_detr_jax.models.queries import LabelQueries

_NORMAL = nn.initializers.normal(1.0)


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
        sampling_part=config.get("sampling_part", 0) or None,
    )


def multi_level_parts(
    config: ConfigDict, layers: LayerConfig, *, half_pixel: bool, reset: bool = True
) -> dict[str, Any]:
    """Makes backbone, pyramid and encoder of a detector with several feature levels.

    Args:
      config: `config.model`.
      layers: settings of the encoder's layers.
      half_pixel: see `position.image_encoding`.
      reset: initial values are those of Deformable DETR; False: projections keep PyTorch's, and the
        points of the encoder depend on the query from the start.
    """
    point_init = nn.initializers.zeros if reset else xavier_uniform
    return {
        "backbone": _backbone(config, config.backbone_levels),
        "pyramid": MultiLevel(
            config.hidden_dim,
            backbone_levels=config.backbone_levels,
            extra_levels=config.extra_levels,
            temperature_h=config.pe_temperature_h,
            temperature_w=config.pe_temperature_w,
            norm_groups=config.level_norm_groups,
            half_pixel=half_pixel,
            mask_padding=config.backbone.mask_padding,
            xavier=reset,
            dtype=jnp.dtype(config.dtype),
        ),
        "encoder": DeformableEncoder(
            config.encoder_layers,
            layers,
            config.encoder_points,
            remat="encoder" in config.remat,
            point_init=point_init,
        ),
    }


def last_level_parts(
    config: ConfigDict, layers: LayerConfig, *, scale_position: bool = True
) -> dict[str, Any]:
    """Makes backbone, pyramid and encoder of a detector with one feature level.

    Args:
      config: `config.model`.
      layers: settings of the encoder's layers.
      scale_position: see `DenseEncoder`.
    """
    temperatures = config.pe_temperature_h, config.pe_temperature_w
    return {
        "backbone": _backbone(config),
        "pyramid": LastLevel(config.hidden_dim, *temperatures, jnp.dtype(config.dtype)),
        "encoder": DenseEncoder(
            config.encoder_layers,
            layers,
            scale_position=scale_position,
            remat="encoder" in config.remat,
        ),
    }


def _backbone(config: ConfigDict, levels: int = 1) -> nn.Module:
    remat = "backbone" in config.remat
    return build_backbone(config.backbone, jnp.dtype(config.dtype), remat=remat, levels=levels)


def label_queries(
    config: ConfigDict, pattern_init: nn.initializers.Initializer = _NORMAL
) -> LabelQueries:
    """Makes queries with the label "no object" as their content.

    Args:
      config: `config.model`.
      pattern_init: initializer of the patterns.
    """
    return LabelQueries(
        num_classes=config.num_classes,
        hidden_dim=config.hidden_dim,
        num_queries=config.num_queries,
        num_patterns=config.num_patterns,
        random_refpoints_xy=config.random_refpoints_xy,
        indicator=config.indicator,
        pattern_init=pattern_init,
    )


def num_queries(config: ConfigDict) -> int:
    """Returns the number of matching queries: every anchor with every pattern, if there are any."""
    return config.num_queries * max(config.get("num_patterns", 0), 1)


def frozen(config: ConfigDict) -> list[str]:
    """Returns patterns for the frozen parameters, all of them in the backbone."""
    return frozen_backbone(config.backbone)
