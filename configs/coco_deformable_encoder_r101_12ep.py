"""Deformable encoder on four levels, DN-DAB decoder, ResNet-101, COCO 2017, 12 epochs.

    python train.py --config configs/coco_deformable_encoder_r101_12ep.py --workdir runs/encoder \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet101.pth

The paper reports AP 44.1 on val2017 (Li et al., CVPR 2022, table 2; repository: deformable encoder
only). Neither AP nor time has been measured here.

Everything else is as in `coco_deformable_encoder_r50_12ep.py`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_deformable_encoder_r50_12ep` with the deeper backbone."""
    config = load_config("coco_deformable_encoder_r50_12ep")
    config.model.backbone.depth = 101
    return config
