"""DN-DETR on scenes of handwritten digits: learns on two CPU cores within minutes.

    python train.py --config configs/digits.py --workdir runs/digits
"""

from dn_detr_jax.config import base_config


def get_config():
    """A small DN-DAB-DETR for pictures of 80 to 128 pixels, trained from scratch."""
    config = base_config()
    config.data.update(
        name="digits",
        dir="data",
        canvases=((96, 128), (128, 96)),
        max_objects=8,
        threads=1,
        shuffle_window=1024,
        eval_short_side=96,
        eval_max_long_side=128,
    )
    config.data.augment.update(
        flip=0.0,
        short_sides=(80, 84, 88, 92, 96),
        max_long_side=128,
        crop=0.0,
    )
    config.model.update(
        num_classes=10,
        hidden_dim=128,
        num_heads=4,
        ffn_dim=512,
        encoder_layers=2,
        decoder_layers=3,
        num_queries=20,
        activation="relu",
    )
    config.model.backbone.update(
        depth=18,
        width=32,
        stages=3,
        norm="group_norm",
        stem="light",
        frozen_stages=-1,
    )
    config.optimizer.update(
        learning_rate=5e-4,
        lr_multipliers=(),
        schedule="cosine",
        warmup="100 steps",
    )
    config.train.update(
        duration="2000 steps",
        batch_size=16,
        log_every="50 steps",
        eval_every="1 epochs",
        checkpoint_every="1 epochs",
    )
    config.eval.update(batch_size=50, num_select=100, instability_images=200)
    return config
