"""The configuration of an experiment: every key, its default and its meaning.

A file in `configs/` starts from `base_config()` and changes what its experiment changes; the
command line overrides any value with `--config.section.key=value`. The defaults are those of the
DN-DAB-DETR with ResNet-50 of the paper (Li et al., CVPR 2022, section 6.1), 50 epochs.

Durations are strings with a unit: `"300 steps"`, `"2 epochs"`, `"5%"` (of the whole training).
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """The default of every key, as a `ConfigDict` with locked keys and types."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict(
        {
            "name": "coco",  # a key of dn_detr_jax.data.datasets
            "dir": "",  # where the data lies, or is prepared
            "canvases": ((800, 1344), (1344, 800)),  # (height, width), each compiled once
            "max_objects": 100,  # slots for objects; a larger image keeps a random subset
            "workers": 0,  # processes that read and augment; 0: threads of this process
            "threads": 4,  # reading threads of each of those processes
            "prefetch": 4,  # batches made ahead, per worker
            "shuffle_window": 2048,  # images among which batches of one canvas are formed
        }
    )
    config.data.augment = ConfigDict(
        {
            "flip": 0.5,  # probability of a horizontal flip
            "short_sides": tuple(range(480, 801, 32)),  # random short side, pixels
            "max_long_side": 1333,
            "crop": 0.5,  # probability of resize, random crop, resize
            "crop_resize": (400, 500, 600),  # short sides before the crop
            "crop_size": (384, 600),  # least and largest side of the crop
        }
    )
    config.data.eval_short_side = 800
    config.data.eval_max_long_side = 1333

    config.model = ConfigDict(
        {
            "name": "dn_dab_detr",  # a key of dn_detr_jax.models.registry
            "num_classes": 91,
            "hidden_dim": 256,
            "num_heads": 8,
            "ffn_dim": 2048,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "num_queries": 300,
            "num_patterns": 0,  # learned content patterns per anchor; 0: none
            "activation": "prelu",  # of the transformer: prelu or relu
            "dropout": 0.0,
            "pe_temperature_h": 20.0,  # of the sine position encoding of the image
            "pe_temperature_w": 20.0,
            "random_refpoints_xy": False,  # anchors' centres uniform over the image at the start
            "dtype": "float32",  # of the compute; parameters are always float32
        }
    )
    config.model.backbone = ConfigDict(
        {
            "depth": 50,  # 18, 34, 50 or 101
            "width": 64,  # channels of the first stage
            "stages": 4,  # the output has stride 4 * 2 ** (stages - 1), half with the light stem
            "norm": "frozen_batch_norm",  # or group_norm, for training from scratch
            "stem": "standard",  # 7x7 stride 2 and max pooling; or light: 3x3 stride 2
            "dilation": False,  # last stage without stride, dilated (DC5)
            "frozen_stages": 1,  # stem and that many stages get no gradient; -1: none frozen
        }
    )

    config.dn = ConfigDict(
        {
            "groups": 5,  # denoising groups; 0 trains plain DAB-DETR
            "label_noise": 0.2,  # probability that a label is replaced
            "box_noise": 0.4,  # centre shift and scaling, as a share of the box size
            "attend_padding": False,  # True: real queries see empty slots, as the PyTorch code
        }
    )
    config.matcher = ConfigDict({"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0})
    config.loss = ConfigDict(
        {
            "weight_class": 1.0,
            "weight_bbox": 5.0,
            "weight_giou": 2.0,
            "focal_alpha": 0.25,
            "focal_gamma": 2.0,
        }
    )

    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            # (regular expression on the parameter's path, factor); the first match wins
            "lr_multipliers": (("^backbone/", 0.1),),
            "weight_decay": 1e-4,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip_norm": 0.1,  # global norm of the gradients; 0: no clipping
            "schedule": "step",  # step or cosine
            "step_at": "40 epochs",  # step: when the rate drops ...
            "step_factor": 0.1,  # ... and by what
            "warmup": "0 steps",  # linear, from 0
        }
    )

    config.train = ConfigDict(
        {
            "duration": "50 epochs",
            "batch_size": 16,  # global: over all devices and processes
            "log_every": "50 steps",
            "eval_every": "1 epochs",
            "checkpoint_every": "1 epochs",
        }
    )
    config.mesh = ConfigDict({"data": -1})  # devices along the data axis; -1: all of them

    config.eval = ConfigDict(
        {
            "batch_size": 16,
            "num_select": 300,  # detections kept per image
            "instability_images": 100,  # fixed subset for the instability of matching; 0: none
            "pictures": 12,  # validation pictures in the grid of detections
        }
    )
    config.checkpoint = ConfigDict({"keep_latest": 2, "keep_best": 1})
    config.init = ConfigDict({"checkpoint": ""})  # a work directory whose parameters to start from
    return config
