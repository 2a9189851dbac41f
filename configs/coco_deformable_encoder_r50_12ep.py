"""Deformable encoder on four levels, DN-DAB decoder, ResNet-50, COCO 2017, 12 epochs.

    python train.py --config configs/coco_deformable_encoder_r50_12ep.py --workdir runs/encoder \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The paper reports AP 43.4 on val2017 (Li et al., CVPR 2022, table 2; repository: deformable encoder
only). Neither AP nor time has been measured here.

The learning rate drops for the last epoch; where the authors dropped it is not in their README.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_deformable_encoder_r50_50ep` with a shorter schedule."""
    config = load_config("coco_deformable_encoder_r50_50ep")
    config.train.duration = "12 epochs"
    config.optimizer.step_at = "11 epochs"
    return config
