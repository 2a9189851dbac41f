"""DN-DAB-DETR with ResNet-50-DC5 on COCO 2017, 50 epochs, as published.

    python train.py --config configs/coco_r50_dc5.py --workdir runs/r50_dc5 \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The paper reports AP 46.3 on val2017 (Li et al., CVPR 2022, table 1: DN-DETR-DC5-R50). Neither AP
nor time has been measured here.

DC5 dilates the last stage of the backbone: four times as many feature pixels as `coco_r50.py`.
Everything else is as in `coco_r50.py`, the schedule too.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_r50` with dilation."""
    config = load_config("coco_r50")
    config.model.backbone.dilation = True
    return config
