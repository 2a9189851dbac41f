"""DN-Deformable-DETR with ResNet-50 and four feature levels on COCO 2017, 50 epochs, as published.

    python train.py --config configs/coco_deformable_r50_50ep.py --workdir runs/deformable \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The authors' repository reports AP 49.5 on val2017 for this setting (DN-Deformable-DETR-R50,
deformable encoder and decoder, 50 epochs). That number is theirs; it has not been measured here.

Schedule, augmentation and denoising are those of `coco_r50.py`. An official checkpoint, or the
converted one of detrex, is evaluated without any training, see `coco_r50.py`.

To vary: `model.backbone.depth=101`, `dn.groups=0` (DAB-Deformable-DETR), `model.dtype=bfloat16`,
`model.remat="('encoder',)"` where memory is short.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns the defaults of DN-Deformable-DETR, with the canvases of `coco_r50`."""
    config = base_config("dn_deformable_detr")
    config.data.canvases = load_config("coco_r50").data.canvases
    return config
