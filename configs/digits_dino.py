"""DINO with denoising on scenes of handwritten digits, a small detector from scratch.

    python train.py --config configs/digits_dino.py --workdir runs/digits_dino

Everything but the queries is that of `digits_quick.py`, so that the two can be compared: here
the queries start at the encoder's proposals with the highest scores, and denoising is contrastive.

To vary: `--config.dn.groups=0` (DINO without denoising), `--config.dn.contrastive=False`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns `digits_quick` with the queries and the denoising of DINO."""
    quick, config = load_config("digits_quick"), base_config("dn_dino_detr")
    for section in ("data", "loss", "optimizer", "train", "eval"):
        config[section] = quick[section]
    shared = set(config.model) & set(quick.model) - {"name", "indicator"}
    config.model.update({key: quick.model[key] for key in shared})
    config.dn.update({**quick.dn, "contrastive": True})
    return config
