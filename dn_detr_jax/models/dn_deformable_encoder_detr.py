"""DN-Deformable-Encoder-DETR: what `config.model.name = "dn_deformable_encoder_detr"` stands for.

The "deformable encoder only" model of Li et al., "DN-DETR: Accelerate DETR Training by Introducing
Query DeNoising", CVPR 2022, tables 2 and 3: a deformable encoder on several feature levels (Zhu et
al., ICLR 2021), and the decoder of DAB-DETR (Liu et al., ICLR 2022), which reads each level for
itself.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.backbones.build import build_backbone
from dn_detr_jax.models.build import deformable_encoder, layer_config, multi_level
from dn_detr_jax.models.decoder import DenseDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.heads import SharedHeads
from dn_detr_jax.models.queries import LabelQueries


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`, of the decoder.
    """
    dtype, remat = jnp.dtype(config.dtype), tuple(config.remat)
    layers = layer_config(config, attention_kernel, "relu")
    return Detector(
        backbone=build_backbone(
            config.backbone, dtype, remat="backbone" in remat, levels=config.backbone_levels
        ),
        pyramid=multi_level(config, half_pixel=False),
        encoder=deformable_encoder(config, layers),
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
            level_attention=True,
            remat="decoder" in remat,
        ),
        heads=SharedHeads(config.num_classes, config.hidden_dim, dtype, start_at_anchors=False),
        dtype=dtype,
    )
