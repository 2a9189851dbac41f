"""Configs of `configs/` reduced to detectors that compile in seconds, for tests that train them."""

from pathlib import Path

import fast_jit
from coco_directory import write_coco
from ml_collections import ConfigDict

from dn_detr_jax.config import validate
from dn_detr_jax.data.coco_classes import COCO_CATEGORIES

SIDES, CANVAS = (32, 48), (48, 48)  # short and long side of images


def write_data(directory: Path) -> Path:
    """Writes a directory with the classes of COCO, as `configs/` expect them."""
    categories = [{"id": category.id, "name": category.name} for category in COCO_CATEGORIES]
    return write_coco(directory, categories=categories)


def shrunk(config: ConfigDict, coco_dir: Path, digits_dir: Path) -> ConfigDict:
    """Reduces sizes, counts and durations in place, and keeps everything else.

    What stays is the variant, the family and norm of the backbone and its dilation, the number of
    levels, patterns, where queries start, denoising, matching, losses, the kind of the schedule,
    augmentation and classes. ResNets of all depths become one, and so do Swin Transformers. No
    backbone is pretrained.

    Args:
      config: of `configs/`.
      coco_dir: from `write_data`.
      digits_dir: the folder of `digits_tiny`.
    """
    data, model, backbone = config.data, config.model, config.model.backbone
    digits = data.name == "digits"
    data.update(dir=str(digits_dir if digits else coco_dir), canvases=(CANVAS,), threads=1)
    data.update(eval_short_side=SIDES[0], eval_max_long_side=SIDES[1])
    data.name = "digits_tiny" if digits else data.name
    data.max_objects = min(data.max_objects, 6)  # 0 are as many as the data has
    data.augment.update(short_sides=(28, 32), max_long_side=SIDES[1])
    data.augment.update(crop_resize=(32,), crop_size=(20, 30))

    if "level_norm_groups" in model:
        model.level_norm_groups = 4
    model.update(hidden_dim=16, num_heads=2, ffn_dim=16, num_queries=6)
    model.update(encoder_layers=1, decoder_layers=2)
    model.update({key: 2 for key in ("encoder_points", "decoder_points") if key in model})
    stages = model.get("backbone_levels", 2)
    if backbone.kind == "swin":
        depths, heads = (2, 1, 1, 1)[:stages], (1, 1, 2, 2)[:stages]
        backbone.swin.update(channels=8, depths=depths, heads=heads, window=2, drop_path=0.1)
    elif backbone.kind == "mobilenet_v2":
        backbone.mobilenet_v2.width = 0.1
        backbone.frozen_stages = 3  # the backward pass of all takes long to compile
    else:
        backbone.update(depth=18, width=8, stages=stages)

    config.init.backbone = ""
    config.dn.slots = 12
    config.optimizer.step_at = "1 steps"
    if config.optimizer.warmup != "0 steps":
        config.optimizer.warmup = "1 steps"
    every = {f"{name}_every": "2 steps" for name in ("eval", "checkpoint")}
    config.train.update(duration="2 steps", batch_size=2, log_every="1 steps", **every)
    config.eval.update(batch_size=4, num_select=10, instability_images=2, pictures=0)
    config.compile.options = fast_jit.CONFIG
    validate(config)
    return config
