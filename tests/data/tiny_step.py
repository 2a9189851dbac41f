"""The smallest training step there is, for tests that compile it."""

from dn_detr_jax.config import base_config


def get_config():
    """One stage, one encoder and one decoder layer; no data set goes with it."""
    config = base_config()
    config.data.update(canvases=((32, 48),), max_objects=3)
    config.model.update(
        num_classes=4,
        hidden_dim=16,
        num_heads=2,
        ffn_dim=16,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=6,
    )
    config.model.backbone.update(depth=18, width=8, stages=1, stem="light")
    config.eval.num_select = 10
    return config
