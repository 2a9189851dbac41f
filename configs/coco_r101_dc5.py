"""DN-DAB-DETR with ResNet-101-DC5 on COCO 2017, 50 epochs, as published.

    python train.py --config configs/coco_r101_dc5.py --workdir runs/r101_dc5 \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet101.pth

The paper reports AP 47.3 on val2017 (Li et al., CVPR 2022, table 1: DN-DETR-DC5-R101). Neither AP
nor time has been measured here.

DC5 dilates the last stage of the backbone: four times as many feature pixels as `coco_r101.py`.
Everything else is as in `coco_r50.py`, the schedule too.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_r50_dc5` with the deeper backbone."""
    config = load_config("coco_r50_dc5")
    config.model.backbone.depth = 101
    return config
