"""Every experiment in `configs/` builds its detector; parameters are counted without computing."""

import math

import pytest
from flax import traverse_util

from dn_detr_jax.config import load_config
from dn_detr_jax.config.experiments import experiment_names
from dn_detr_jax.models.registry import abstract_params, build_model

# Parameters without frozen batch norms, as the official code and detrex count them.
DAB_R50, DAB_R101, PATTERNS = 43_694_977, 62_634_881, 3 * 256
ENCODER_R50 = 48_488_589
LARGER = DAB_R101 - DAB_R50
COUNTS = {
    "coco_r50": DAB_R50,
    "coco_r50_dc5": DAB_R50,
    "coco_r101": DAB_R101,
    "coco_r101_dc5": DAB_R101,
    "coco_r50_12ep": DAB_R50 + PATTERNS,
    "coco_r50_dc5_3pat_12ep": DAB_R50 + PATTERNS,
    "coco_r101_dc5_3pat_12ep": DAB_R101 + PATTERNS,
    "coco_deformable_encoder_r50_12ep": ENCODER_R50,
    "coco_deformable_encoder_r50_50ep": ENCODER_R50,
    "coco_deformable_encoder_r101_12ep": ENCODER_R50 + LARGER,
    # DETR with 91 classes, the label table, and the MLP of boxes.
    "coco_plain_r50": 41_524_768 + 92 * 255 + (512 + 1 + 256 + 1) * 256,
    # detrex has 80 classes and labels, this config 91 and one label more.
    "coco_dino_swin_tiny_12ep": 48_193_350 + 7 * 11 * 257 + 12 * 256,
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name):
    """Catches a config that sets a key of the architecture wrongly, or not at all."""
    assert name in experiment_names()
    config = load_config(name).model
    params = traverse_util.flatten_dict(abstract_params(build_model(config)))
    counted = [leaf for path, leaf in params.items() if (*path[:-1], "mean") not in params]
    assert sum(math.prod(leaf.shape) for leaf in counted) == COUNTS[name]
