"""DN-Deformable-DETR on scenes of handwritten digits, a small detector from scratch.

    python train.py --config configs/digits_deformable.py --workdir runs/digits_deformable

Data and losses are those of `digits.py`, so that the two can be compared; the schedule is half as
long. Here an encoder of two layers works on strides 4, 8 and 16, and each decoder layer has its own
heads. AP 0.63 to 0.65 on unseen digits in three runs of 1,500 steps, and 0.76 in one run of 3,000;
`docs/models.md` has the curves.

To vary: `--config.dn.groups=0` (DAB-Deformable-DETR), `--config.train.duration="4 epochs"`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns `digits` with a small DN-Deformable-DETR."""
    plain, config = load_config("digits"), base_config("dn_deformable_detr")
    for section in ("data", "dn", "loss", "optimizer", "train", "eval"):
        config[section] = plain[section]
    config.train.duration = "2 epochs"
    config.model.update(
        num_classes=10,
        hidden_dim=96,
        num_heads=4,
        ffn_dim=192,
        encoder_layers=2,
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
