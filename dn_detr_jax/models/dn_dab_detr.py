"""DN-DAB-DETR: the variant that `config.model.name = "dn_dab_detr"` stands for.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, on Liu et
al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022. Without denoising
queries, as at inference, this is DAB-DETR.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.backbones.build import build_backbone, frozen_backbone
from dn_detr_jax.models.build import layer_config
from dn_detr_jax.models.decoder import DenseDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.encoder import DenseEncoder
from dn_detr_jax.models.heads import SharedHeads
from dn_detr_jax.models.pyramid import LastLevel
from dn_detr_jax.models.queries import LabelQueries


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`.
    """
    dtype, remat = jnp.dtype(config.dtype), tuple(config.remat)
    layers = layer_config(config, attention_kernel, config.activation)
    return Detector(
        backbone=build_backbone(config.backbone, dtype, remat="backbone" in remat),
        pyramid=LastLevel(
            config.hidden_dim, config.pe_temperature_h, config.pe_temperature_w, dtype
        ),
        encoder=DenseEncoder(config.encoder_layers, layers, remat="encoder" in remat),
        queries=LabelQueries(
            num_classes=config.num_classes,
            hidden_dim=config.hidden_dim,
            num_queries=config.num_queries,
            num_patterns=config.num_patterns,
            random_refpoints_xy=config.random_refpoints_xy,
            indicator=config.indicator,
        ),
        decoder=DenseDecoder(
            config.decoder_layers,
            layers,
            temperature=config.pe_temperature_box,
            position_gain=config.position_gain,
            remat="decoder" in remat,
        ),
        heads=SharedHeads(config.num_classes, config.hidden_dim, dtype),
        dtype=dtype,
    )


def num_queries(config: ConfigDict) -> int:
    """Returns the number of matching queries: every anchor with every pattern."""
    return config.num_queries * max(config.num_patterns, 1)


def frozen(config: ConfigDict) -> list[str]:
    """Returns patterns for the frozen parameters, all of them in the backbone."""
    return frozen_backbone(config.backbone)
