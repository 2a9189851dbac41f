"""DN-DAB-DETR with ResNet-50 on your own data in COCO format, from a trained detector.

    python train.py --config configs/finetune.py --workdir runs/mine \\
        --config.data.dir=PATH_OF_YOUR_DATA --config.init.checkpoint=runs/official

`docs/own_data.md` leads from the first command to AP on your validation images. Classes, their
names and the number of slots for objects are taken from the annotation files. All of the detector
but its class head and label embedding starts from `init.checkpoint`: the work directory
of an imported checkpoint (`python -m dn_detr_jax import`) or of a training.

The schedule is a starting point, not a measured optimum: a tenth of an epoch of warm-up, the
published rate scaled to the batch, 12 epochs with a cosine. No AP is claimed for it.

To vary: `train.duration`, `train.batch_size` with `optimizer.learning_rate` in proportion (1e-4 for
16 images), `data.augment.flip=0` where left and right matter, smaller canvases and sizes for
smaller images (`python -m dn_detr_jax canvases` proposes them).

`--config configs/finetune.py:aerial` starts from a preset of the augmentation: `conservative`,
`aggressive` or `aerial` (docs/augmentation.md). `python -m dn_detr_jax preview` shows its images.
"""

from dn_detr_jax.config import augment_preset, load_config


def get_config(augmentation=""):
    """Returns `coco_r50` with classes from the data, fresh heads and a short schedule.

    Args:
      augmentation: a preset, see `augment_preset`.
    """
    config = load_config("coco_r50")
    config.data.labels = "contiguous"
    config.data.max_objects = 0
    config.data.snap = 0.1
    config.data.augment.update(augment_preset(augmentation))
    config.model.num_classes = 0
    config.init.reset_heads = True
    config.optimizer.update(learning_rate=5e-5, schedule="cosine", warmup="0.1 epochs")
    config.train.update(duration="12 epochs", batch_size=8)
    config.eval.batch_size = 8
    return config
