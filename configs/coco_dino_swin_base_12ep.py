"""DINO with Swin-Base and four feature levels on COCO 2017, 12 epochs.

    python train.py --config configs/coco_dino_swin_base_12ep.py --workdir runs/swin_base \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=swin_base_patch4_window12_384.pth

detrex reports AP 55.8 on val2017 for its model of this architecture. Neither AP nor time has been
measured here.

The backbone starts from the ImageNet weights of its authors or of timm, trained on ImageNet-22k at
384 pixels. Everything else is as in `coco_dino_swin_tiny_12ep.py`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_dino_swin_tiny_12ep` with a larger backbone."""
    config = load_config("coco_dino_swin_tiny_12ep")
    config.model.backbone.swin.update(
        channels=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12, drop_path=0.2
    )
    return config
