"""The detector of `tiny.py` with still less to compile, for tests that start it several times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny


def get_config():
    """No encoder, one decoder layer, one stage; every checkpoint is kept."""
    config = tiny.get_config()
    config.model.update(encoder_layers=0, decoder_layers=1, num_queries=12)
    config.model.backbone.stages = 1
    config.train.update(duration="12 steps", eval_every="6 steps", checkpoint_every="3 steps")
    config.checkpoint.keep_latest = 20
    config.eval.update(pictures=2)
    return config
