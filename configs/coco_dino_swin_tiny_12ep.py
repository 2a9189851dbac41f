"""DINO with Swin-Tiny and four feature levels on COCO 2017, 12 epochs.

    python train.py --config configs/coco_dino_swin_tiny_12ep.py --workdir runs/swin_tiny \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=swin_tiny_patch4_window7_224.pth

detrex reports AP 51.3 on val2017 for its model of this architecture. Neither AP nor time has been
measured here.

The backbone starts from the ImageNet weights of its authors or of timm, trained on ImageNet-1k
(52.5 with weights from ImageNet-22k). Denoising has as many groups of an image as fit into
`dn.slots`; detrex fills the slots of a batch by its most crowded image.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_dino_r50_12ep` with the smallest Swin Transformer."""
    config = load_config("coco_dino_r50_12ep")
    config.model.backbone.update(kind="swin", frozen_stages=-1)
    config.model.backbone.swin.drop_path = 0.1
    return config
