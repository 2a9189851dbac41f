"""DN-DAB-DETR with ResNet-50 on COCO 2017, 50 epochs, as published.

    python train.py --config configs/coco_r50.py --workdir runs/coco_r50 \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The paper reports AP 44.1 on val2017 for this setting (Li et al., CVPR 2022: DN-DAB-DETR, ResNet-50,
50 epochs, 16 images per step). That number is the paper's; it has not been measured here.

The backbone starts from torchvision's or timm's ImageNet weights of ResNet-50. An official
checkpoint is evaluated without any training:

    python -m dn_detr_jax import checkpoint.pth --config configs/coco_r50.py \\
        --out runs/official
    python train.py --config configs/coco_r50.py --workdir runs/official --eval_only

Denoising groups are packed: an image with more than 40 objects gets fewer than five groups.
`dn.layout=paper` gives five groups to all, with 500 denoising queries for every image.

To vary: `coco_r101.py`, `coco_r50_dc5.py`, `model.backbone.kind=swin`, `dn.groups=0` (plain
DAB-DETR), `model.dtype=bfloat16`.
"""

from dn_detr_jax.config import base_config


def get_config():
    """Returns the defaults of all keys, with canvases for COCO."""
    config = base_config()
    # `python -m dn_detr_jax canvases` proposed them for 112 photographs of COCO. The first two
    # hold every image of any data set at these resolutions. 20% of the pixels are padding; with
    # data.snap=0.1, which departs from the published augmentation, and canvases for it, 8%.
    config.data.canvases = (
        (800, 1344),
        (1344, 800),
        (800, 1120),
        (1024, 800),
        (736, 992),
        (864, 672),
        (640, 864),
        (576, 736),
    )
    # Input: 4 threads, the default, make about 400 images per second on 4 free cores (estimated
    # from one core, docs/performance.md). To read faster, raise data.threads and data.prefetch
    # together; beyond about ten threads raise data.workers, which pass batches through /dev/shm.
    return config
