"""DN-Deformable-DETR: the variant that `config.model.name = "dn_deformable_detr"` stands for.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, on Zhu et
al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021, with
anchors as queries. Without denoising queries, as at inference, this is DAB-Deformable-DETR.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.build import layer_config, multi_level_parts
from dn_detr_jax.models.deformable_decoder import DeformableDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.heads import LayerHeads
from dn_detr_jax.models.queries import LearnedQueries

# The first boxes are smaller than their anchors: width and height start with this logit offset.
_INITIAL_SIZE = -2.0


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
        queries=LearnedQueries(
            config.num_classes, config.hidden_dim, config.num_queries, indicator=config.indicator
        ),
        decoder=DeformableDecoder(
            config.decoder_layers,
            layers,
            num_points=config.decoder_points,
            temperature=config.pe_temperature_box,
            mask_padding=config.backbone.mask_padding,
            remat="decoder" in config.remat,
        ),
        heads=LayerHeads(
            config.decoder_layers, config.num_classes, config.hidden_dim, dtype, _INITIAL_SIZE
        ),
        dtype=dtype,
    )
