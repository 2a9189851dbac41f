"""DN-DAB-DETR with ResNet-101-DC5, COCO 2017, 12 epochs, as published.

    python train.py --config configs/coco_r101_dc5_3pat_12ep.py --workdir runs/r101_dc5_3pat_12ep \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet101.pth

The paper reports AP 42.8 on val2017 (Li et al., CVPR 2022, table 2). Neither AP nor time has been
measured here.

Everything else is as in `coco_r50_dc5_3pat_12ep.py`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_r50_dc5_3pat_12ep` with the deeper backbone."""
    config = load_config("coco_r50_dc5_3pat_12ep")
    config.model.backbone.depth = 101
    return config
