"""DINO with Swin-Small and four feature levels on COCO 2017, 12 epochs.

    python train.py --config configs/coco_dino_swin_small_12ep.py --workdir runs/swin_small \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=swin_small_patch4_window7_224.pth

detrex reports AP 53.0 on val2017 for its model of this architecture. Neither AP nor time has been
measured here.

The backbone starts from the ImageNet weights of its authors or of timm, trained on ImageNet-1k.
Everything else is as in `coco_dino_swin_tiny_12ep.py`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_dino_swin_tiny_12ep` with more blocks."""
    config = load_config("coco_dino_swin_tiny_12ep")
    config.model.backbone.swin.update(depths=(2, 2, 18, 2), drop_path=0.2)
    return config
