"""DN-Deformable-Encoder-DETR: what `config.model.name = "dn_deformable_encoder_detr"` stands for.

The "deformable encoder only" model of Li et al., "DN-DETR: Accelerate DETR Training by Introducing
Query DeNoising", CVPR 2022, tables 2 and 3: a deformable encoder on several feature levels (Zhu et
al., ICLR 2021), and the decoder of DAB-DETR (Liu et al., ICLR 2022), which reads each level for
itself.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.models.build import label_queries, layer_config, multi_level_parts
from dn_detr_jax.models.decoder import DenseDecoder
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.heads import SharedHeads
from dn_detr_jax.models.initializers import xavier_uniform


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Initial values are those of the official code, which draws weights with Xavier's distribution
    after the reset of Deformable DETR: also those of points, patterns and boxes.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`, of the decoder.
    """
    dtype = jnp.dtype(config.dtype)
    layers = layer_config(config, attention_kernel, "relu")
    return Detector(
        **multi_level_parts(config, layers, half_pixel=False, reset=False),
        queries=label_queries(config, xavier_uniform),
        decoder=DenseDecoder(
            config.decoder_layers,
            layers,
            temperature=config.pe_temperature_box,
            level_attention=True,
            remat="decoder" in config.remat,
        ),
        heads=SharedHeads(config.num_classes, config.hidden_dim, dtype, start_at_anchors=False),
        dtype=dtype,
    )
