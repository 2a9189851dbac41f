"""DINO with ResNet-50 and four feature levels on COCO 2017, 12 epochs.

    python train.py --config configs/coco_dino_r50_12ep.py --workdir runs/dino_12ep \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

DINO's authors report AP 49.0 on val2017 (Zhang et al., ICLR 2023, table 1: DINO-4scale; also in
the README of IDEA-Research/DINO), and detrex 49.2 (projects/dino, 100 denoising queries) for the
setting of this architecture. Those numbers are theirs; none has been measured here.

What is that of detrex: 900 queries, a shared norm in front of the heads, proposals scored by the
best class, contrastive denoising with 200 slots, label noise 0.25 and box noise 1, nothing frozen
but the stem. What differs: detrex fills the slots of a batch by its most crowded image, here every
image gets as many of `dn.groups` as fit.

To vary: `model.backbone_levels=4` (five levels), `loss.weight_class=2.0`, `dn.slots=600`,
`train.ema_decay=0.9999`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns the defaults of DN-DINO-DETR, with the canvases of `coco_r50`."""
    config = base_config("dn_dino_detr")
    config.data.canvases = load_config("coco_r50").data.canvases
    config.model.backbone.frozen_stages = 0
    config.dn.update(groups=14, label_noise=0.25, box_noise=1.0)
    config.train.duration = "12 epochs"
    config.optimizer.step_at = "11 epochs"
    return config
