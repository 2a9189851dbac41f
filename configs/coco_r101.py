"""DN-DAB-DETR with ResNet-101 on COCO 2017, 50 epochs, as published.

    python train.py --config configs/coco_r101.py --workdir runs/r101 \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet101.pth

The paper reports AP 45.2 on val2017 (Li et al., CVPR 2022, table 1: DN-DETR-R101). Neither AP nor
time has been measured here.

Everything else is as in `coco_r50.py`, the schedule too.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_r50` with the deeper backbone."""
    config = load_config("coco_r50")
    config.model.backbone.depth = 101
    return config
