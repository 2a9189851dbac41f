"""DINO as in the official DN-DETR code, with ResNet-50 on COCO 2017, 36 epochs.

    python train.py --config configs/coco_dino_r50_36ep.py --workdir runs/dino_36ep \\
        --config.data.dir=PATH_OF_COCO --config.init.backbone=resnet50.pth

The authors' repository reports AP 50.8 to 51.0 on val2017 for its DINO after 36 epochs. Those
numbers are theirs; none has been measured here, and their README has no command for it: when they
lowered the learning rate is not known.

The architecture is that of their code: 300 queries, proposals scored by logit 0, no norm in front
of the heads, anchors scaled by the content. Their denoising gives negatives the content "no
object", and mixes them up with positives in batches of several images; this package does neither.
"""

from dn_detr_jax.config import load_config


def get_config():
    """Returns `coco_dino_r50_12ep` with the architecture of the official DN-DETR code."""
    config = load_config("coco_dino_r50_12ep")
    config.model.update(
        num_queries=300,
        proposal_score="objectness",
        decoder_norm=False,
        query_scale=True,
        indicator=True,
    )
    config.model.backbone.frozen_stages = 1
    config.dn.update(groups=5, label_noise=0.2, box_noise=0.4)
    config.train.duration = "36 epochs"
    config.optimizer.step_at = "30 epochs"
    return config
