"""The smallest detector that goes through the whole of train.py, for the tests."""

from dn_detr_jax.config import base_config


def get_config():
    """One stage, one encoder and two decoder layers on 96 scenes of digits."""
    config = base_config()
    config.data.update(
        name="digits_tiny",
        canvases=((128, 128),),
        max_objects=6,
        threads=1,
        eval_short_side=96,
        eval_max_long_side=128,
    )
    config.data.augment.update(flip=0.0, short_sides=(80, 96), max_long_side=128, crop=0.0)
    config.model.update(
        num_classes=10,
        hidden_dim=16,
        num_heads=2,
        ffn_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=9,
    )
    config.model.backbone.update(
        depth=18, width=4, stages=2, norm="group_norm", stem="light", frozen_stages=-1
    )
    config.dn.groups = 2
    config.optimizer.update(
        learning_rate=1e-3, lr_multipliers=(), schedule="cosine", warmup="2 steps"
    )
    config.train.update(
        duration="8 steps",
        batch_size=8,
        log_every="1 steps",
        eval_every="3 steps",
        checkpoint_every="2 steps",
    )
    config.eval.update(batch_size=8, num_select=20, instability_images=20, pictures=4)
    return config
