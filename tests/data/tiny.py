"""Tiny configs of the tests, each as small as its tests allow.

`tiny.py` itself is a config file for train.py, as are `tiny_processes.py` and `tiny_step.py`.
"""

from ml_collections import ConfigDict

from dn_detr_jax.config import base_config

CANVAS, GROUPS = 64, 3  # of `shared`


def detector(**model) -> ConfigDict:
    """Returns a config of one stage and one layer each, without data.

    Args:
      **model: replaces values of `config.model`.
    """
    config = base_config()
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
    config.model.update(model)
    config.eval.num_select = 10
    return config


def step() -> ConfigDict:
    """Returns the config of the smallest training step, for tests that compile it."""
    config = detector()
    config.data.update(canvases=((32, 48),), max_objects=3)
    return config


def shared() -> ConfigDict:
    """Returns the config of `tiny_detector.TinyDetector`; every parameter is trained."""
    config = detector(num_classes=5, hidden_dim=32, ffn_dim=48, decoder_layers=2, num_queries=8)
    config.data.canvases = ((CANVAS, CANVAS),)
    config.model.backbone.update(norm="group_norm", frozen_stages=-1)
    config.dn.groups = GROUPS
    return config


def levels(name: str) -> ConfigDict:
    """Returns a config like `shared` of a variant with feature levels, of strides 8, 16 and 32."""
    config = base_config(name)
    own, model = config.model, detector().model
    own.update({key: model[key] for key in own if key in model and key not in ("name", "backbone")})
    # With one channel in each group, the biases in front of the norms would have no gradient.
    own.update(num_classes=5, hidden_dim=32, backbone_levels=2, level_norm_groups=8)
    own.update({key: 2 for key in ("encoder_points", "decoder_points") if key in own})
    own.update(decoder_layers=2, num_queries=8)
    own.backbone.update(model.backbone)
    own.backbone.update(stages=3, norm="group_norm", frozen_stages=-1)
    config.data.update(canvases=((CANVAS, CANVAS),), max_objects=4)
    config.dn.update(groups=GROUPS, slots=12)
    config.train.batch_size = config.eval.batch_size = 3
    config.eval.num_select = 10
    return config


def weights(**model) -> ConfigDict:
    """Returns a config with all stages of a ResNet-18, for conversions of its weights."""
    config = detector(
        num_classes=7, hidden_dim=32, num_heads=4, ffn_dim=64, decoder_layers=2, num_queries=5
    )
    config.model.backbone.update(stages=4, stem="standard")
    config.model.update(model)
    return config


def get_config() -> ConfigDict:
    """Returns a training of two decoder layers on 96 scenes of digits."""
    config = detector(num_classes=10, decoder_layers=2, num_queries=9)
    config.data.update(
        name="digits_tiny",
        canvases=((128, 128),),
        max_objects=6,
        threads=1,
        eval_short_side=96,
        eval_max_long_side=128,
    )
    config.data.augment.update(flip=0.0, short_sides=(80, 96), max_long_side=128, crop=0.0)
    config.model.backbone.update(width=4, stages=2, norm="group_norm", frozen_stages=-1)
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


def processes() -> ConfigDict:
    """Returns a training that compiles faster still, for tests that start it several times.

    It has no encoder, one decoder layer and one stage, and keeps every checkpoint.
    """
    config = get_config()
    config.model.update(encoder_layers=0, decoder_layers=1, num_queries=12)
    config.model.backbone.stages = 1
    config.train.update(duration="12 steps", eval_every="6 steps", checkpoint_every="6 steps")
    config.checkpoint.keep_latest = 20
    config.eval.pictures = 2
    return config
