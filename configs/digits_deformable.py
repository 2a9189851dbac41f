"""DN-Deformable-DETR on scenes of handwritten digits: learns from scratch within minutes on a CPU.

    python train.py --config configs/digits_deformable.py --workdir runs/digits

This is what `make train` trains. Data and losses are those of `digits.py`, so that the two can be
compared; the steps are fewer than half. Here an encoder layer works on strides 4, 8 and 16, and
each decoder layer has its own heads. `docs/digits.md` has AP and duration, `docs/models.md` the
curves of both configs.

To vary: `--config.dn.groups=0` (DAB-Deformable-DETR), `--config.model.encoder_layers=2`,
`--config.train.duration="4 epochs"`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns `digits` with a small DN-Deformable-DETR."""
    plain, config = load_config("digits"), base_config("dn_deformable_detr")
    for section in ("data", "dn", "loss", "optimizer", "train", "eval"):
        config[section] = plain[section]
    config.train.duration = "1.8 epochs"
    config.model.update(
        num_classes=10,
        hidden_dim=96,
        num_heads=4,
        ffn_dim=192,
        encoder_layers=1,
        decoder_layers=3,
        num_queries=20,
        backbone_levels=2,
        extra_levels=1,
        level_norm_groups=24,  # as in the measured runs
        encoder_points=2,
        decoder_points=4,
        pe_temperature_h=20.0,
        pe_temperature_w=20.0,
        pe_temperature_box=20.0,
    )
    config.model.backbone = plain.model.backbone
    return config
