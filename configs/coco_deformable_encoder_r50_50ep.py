"""Deformable encoder on four levels, DN-DAB decoder, ResNet-50, COCO 2017, 50 epochs.

    python train.py --config configs/coco_deformable_encoder_r50_50ep.py --workdir runs/encoder \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The paper reports AP 48.6 on val2017 (Li et al., CVPR 2022, table 3: DN-Deformable-DETR-R50; the
authors' repository: deformable encoder only). Neither AP nor time has been measured here.

The decoder attends to all tokens of all levels: the authors used 16 GPUs with one image each.
Schedule, augmentation and denoising are those of `coco_r50.py`.
"""

from dn_detr_jax.config import base_config, load_config


def get_config():
    """Returns the defaults of DN-Deformable-Encoder-DETR, with the canvases of `coco_r50`."""
    config = base_config("dn_deformable_encoder_detr")
    config.data.canvases = load_config("coco_r50").data.canvases
    return config
