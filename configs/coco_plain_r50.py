"""DETR with denoising queries, ResNet-50, on COCO 2017: how denoising is added to a detector.

    python train.py --config configs/coco_plain_r50.py --workdir runs/plain \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The extended paper of DN-DETR adds denoising to DETR too. Neither AP nor time has been measured
here.

Learned queries, softmax over the classes and "no object", boxes that no anchor refines; the rest is
as in `coco_r50.py`. To vary: `dn.groups=0` (DETR), `loss.no_object_weight`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns the defaults of plain DN-DETR, with the canvases of `coco_r50`."""
    config = base_config("dn_detr_plain")
    config.data.canvases = load_config("coco_r50").data.canvases
    return config
