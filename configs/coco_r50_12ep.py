"""An older name of `coco_r50_dc5_3pat_12ep.py`, for commands that have it."""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_r50_dc5_3pat_12ep`."""
    return load_config("coco_r50_dc5_3pat_12ep")
