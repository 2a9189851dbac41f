"""`configs/finetune.py` with a tiny model and canvas, as a config file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from dn_detr_jax.config import load_config


def get_config():
    """Returns the config; the training has four steps on eight images."""
    config = load_config("finetune")
    small = tiny.processes()
    config.model.update({key: small.model[key] for key in ("hidden_dim", "num_heads", "ffn_dim")})
    config.model.update(encoder_layers=0, decoder_layers=1, num_queries=12)
    config.model.backbone.update(small.model.backbone)
    config.data.update(canvases=((64, 64),), eval_short_side=48, eval_max_long_side=64)
    config.data.augment.update(
        short_sides=(40, 48), max_long_side=64, crop_resize=(40,), crop_size=(24, 40)
    )
    config.train.update(duration="2 epochs", batch_size=4)
    config.eval.update(batch_size=4, num_select=30, instability_images=0, pictures=0)
    return config
