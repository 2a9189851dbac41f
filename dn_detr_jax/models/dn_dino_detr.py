"""DN-DINO-DETR: the variant that `config.model.name = "dn_dino_detr"` stands for.

Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
ICLR 2023: DN-Deformable-DETR with queries at the encoder's proposals, boxes that look forward twice
and, by `dn.contrastive`, denoising queries that have to be rejected.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.build import layer_config, multi_level_parts
from dn_detr_jax.models.deformable_decoder import DeformableDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.heads import LayerHeads
from dn_detr_jax.models.proposals import SelectedProposals


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`, of the self-attention among queries.
    """
    dtype = jnp.dtype(config.dtype)
    layers = layer_config(config, attention_kernel, "relu")
    return Detector(
        **multi_level_parts(config, layers, half_pixel=True),
        queries=SelectedProposals(
            num_classes=config.num_classes,
            hidden_dim=config.hidden_dim,
            num_queries=config.num_queries,
            num_layers=config.decoder_layers,
            score=config.proposal_score,
            indicator=config.indicator,
            mask_padding=config.backbone.mask_padding,
            dtype=dtype,
        ),
        decoder=DeformableDecoder(
            config.decoder_layers,
            layers,
            num_points=config.decoder_points,
            temperature=config.pe_temperature_box,
            query_scale=config.query_scale,
            norm=config.decoder_norm,
            look_forward=True,
            mask_padding=config.backbone.mask_padding,
            remat="decoder" in config.remat,
        ),
        heads=LayerHeads(config.decoder_layers, config.num_classes, config.hidden_dim, dtype),
        dtype=dtype,
    )
