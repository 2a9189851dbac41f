"""DN-DAB-DETR: the variant that `config.model.name = "dn_dab_detr"` stands for.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, on Liu et
al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022. Without denoising
queries, as at inference, this is DAB-DETR.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.build import label_queries, last_level_parts, layer_config
from dn_detr_jax.models.decoder import DenseDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.heads import SharedHeads


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`.
    """
    dtype = jnp.dtype(config.dtype)
    layers = layer_config(config, attention_kernel, config.activation)
    return Detector(
        **last_level_parts(config, layers),
        queries=label_queries(config),
        decoder=DenseDecoder(
            config.decoder_layers,
            layers,
            temperature=config.pe_temperature_box,
            position_gain=config.position_gain,
            remat="decoder" in config.remat,
        ),
        heads=SharedHeads(config.num_classes, config.hidden_dim, dtype),
        dtype=dtype,
    )
