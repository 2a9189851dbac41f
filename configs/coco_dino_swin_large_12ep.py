"""DINO with Swin-Large and four feature levels on COCO 2017, 12 epochs.

    python train.py --config configs/coco_dino_swin_large_12ep.py --workdir runs/swin_large \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=swin_large_patch4_window12_384.pth

detrex reports AP 56.9 on val2017 for its model of this architecture. Neither AP nor time has been
measured here.

The backbone starts from the ImageNet weights of its authors or of timm, trained on ImageNet-22k at
384 pixels. Everything else is as in `coco_dino_swin_tiny_12ep.py`.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_dino_swin_tiny_12ep` with the largest backbone."""
    config = load_config("coco_dino_swin_tiny_12ep")
    config.model.backbone.swin.update(
        channels=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, drop_path=0.2
    )
    return config
