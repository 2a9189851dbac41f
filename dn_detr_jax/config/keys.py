"""The keys of every config, one row each: default, meaning, rule, and when the value may change.

The keys of a model's architecture stand with its variant, `dn_detr_jax.config.variants`. Defaults,
validation, the check on resuming, the comparison between processes and the printed reference are
all made from these rows.
"""

import dataclasses
from typing import Any, Literal

from dn_detr_jax.config import rules
from dn_detr_jax.config.rules import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FLAG,
    PROBABILITY,
    SIZES,
    TEXT,
    Rule,
    duration,
    one_of,
    whole,
)

Agreement = Literal["same", "free"]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
      path: with the sections in front, for example "train.batch_size".
      default: of experiments that do not set it.
      meaning: one line.
      rule: for its value; rules across keys are in `checks`.
      resume: "free" if a resumed training may have another value than the run began with: it
        changes neither shapes nor what is trained or measured.
      machines: "free" if the processes of a run may have different values.
      evaluation: "same" if an evaluation needs the value of the training: parameters, or what is
        computed from them, depend on it.
    """

    path: str
    default: Any
    meaning: str
    rule: Rule
    resume: Agreement = "same"
    machines: Agreement = "same"
    evaluation: Agreement = "free"


def architecture_key(name: str, default: Any, meaning: str, rule: Rule) -> Key:
    """Makes a key of a model's architecture, `model.NAME`: checkpoints fit no other value."""
    return Key(f"model.{name}", default, meaning, rule, evaluation="same")


_RUN = (
    Key("seed", 0, "seed of all random choices", whole(0, below=2**32)),
    Key(
        "on_nonfinite",
        "stop",
        "action when the loss, gradients or matching costs are not finite: stop the run, or skip "
        "the update",
        one_of("stop", "skip"),
        resume="free",
    ),
    Key(
        "max_skipped_steps",
        10,
        "updates that a run may skip, restarts included, before it stops",
        whole(1),
        resume="free",
    ),
)

_DATA = (
    Key("data.name", "coco", "kind of data set: a name in dn_detr_jax.data.datasets", rules.NAME),
    Key(
        "data.dir",
        "",
        "folder of the data set, or where it is prepared",
        TEXT,
        resume="free",
        machines="free",
    ),
    Key(
        "data.packed_dir",
        "",
        "folder for COCO-format data packed once; empty: packed/ in data.dir",
        TEXT,
        resume="free",
        machines="free",
    ),
    Key(
        "data.labels",
        "category_ids",
        "classes: the category ids themselves, or contiguous numbers 0, 1, ... in their order",
        one_of("category_ids", "contiguous"),
    ),
    Key(
        "data.skip_bad",
        False,
        "True: unreadable images are replaced and counted; False: they end the run",
        FLAG,
        resume="free",
    ),
    Key(
        "data.exif",
        "auto",
        "pixels that boxes refer to where EXIF turns or mirrors an image: as_shown by viewers or "
        "as_stored; auto: as stored unless the annotated size says otherwise",
        one_of("auto", "as_shown", "as_stored"),
    ),
    Key(
        "data.canvases",
        ((800, 1344), (1344, 800)),
        "canvases (padding buckets): (height, width) in pixels, each compiled once",
        rules.CANVASES,
    ),
    Key(
        "data.snap",
        0.0,
        "share by which an image's scale may change so that the image fills its canvas",
        rules.between(0, 0.5),
    ),
    Key(
        "data.max_objects",
        100,
        "slots for the objects of an image; of more objects a random subset is kept; 0: as many "
        "as the data needs",
        whole(0),
    ),
    Key(
        "data.workers",
        0,
        "processes that read and augment images; 0: threads of the training process",
        whole(0),
        resume="free",
        machines="free",
    ),
    Key(
        "data.threads",
        4,
        "reading threads of each of these processes",
        whole(1),
        resume="free",
        machines="free",
    ),
    Key(
        "data.prefetch",
        4,
        "batches prepared ahead, for each worker",
        whole(1),
        resume="free",
        machines="free",
    ),
    Key("data.augment.flip", 0.5, "probability of a horizontal flip", PROBABILITY),
    Key(
        "data.augment.short_sides",
        tuple(range(480, 801, 32)),
        "short sides of training images in pixels, one drawn for each image",
        SIZES,
    ),
    Key("data.augment.max_long_side", 1333, "limit of the long side in pixels", whole(1)),
    Key("data.augment.crop", 0.5, "probability of resize, random crop, resize", PROBABILITY),
    Key("data.augment.crop_resize", (400, 500, 600), "short sides before the crop", SIZES),
    Key(
        "data.augment.crop_size",
        (384, 600),
        "least and largest side of the crop",
        rules.SIZE_RANGE,
    ),
    *(
        Key(f"data.augment.{name}", 0.0, f"probability of {meaning}", PROBABILITY)
        for name, meaning in (
            ("vertical_flip", "a vertical flip"),
            ("rotate", "a rotation by 90, 180 or 270 degrees"),
            ("zoom_out", "a smaller image on a plain ground, where it is not cropped"),
            ("iou_crop", "a crop around objects, instead of the other crop"),
            ("mosaic", "a mosaic of four images"),
        )
    ),
    Key("data.augment.zoom_out_limit", 4.0, "largest side of that ground", rules.between(1, 10)),
    Key(
        "data.augment.scale",
        (1.0, 1.0),
        "(least, largest) factor of the size, drawn for each image; what exceeds the size without "
        "it is cropped",
        rules.FACTOR_RANGE,
    ),
    *(
        Key(f"data.augment.{name}", 0.0, f"largest change of the {name}, as a share", limit)
        for name, limit in (
            ("brightness", PROBABILITY),
            ("contrast", PROBABILITY),
            ("saturation", PROBABILITY),
            ("hue", rules.between(0, 0.5)),
        )
    ),
    Key(
        "data.augment.hook",
        "",
        "module:function of (image, boxes, labels, rng), called last; empty: none",
        rules.FUNCTION,
    ),
    Key(
        "data.augment.stop_at",
        "100%",
        "when zoom_out, iou_crop, mosaic, scale, changes of color and the hook end: with the next "
        "epoch",
        duration(),
    ),
    Key("data.eval_short_side", 800, "short side of evaluated images in pixels", whole(1)),
    Key("data.eval_max_long_side", 1333, "limit of their long side", whole(1)),
    *(
        Key(f"data.{split}.{part}", "", meaning, TEXT)
        for split in ("train", "validation")
        for part, meaning in (
            (
                "annotations",
                f"COCO-format annotation file of the {split} split, relative to data.dir; empty: "
                "found in the usual layouts",
            ),
            ("images", "folder of its images, relative to data.dir; empty: found likewise"),
        )
    ),
)

_MODEL = (
    Key(
        "model.name",
        "dn_dab_detr",
        "variant: a name in dn_detr_jax.models.registry; decides the other keys of this section",
        rules.NAME,
        evaluation="same",
    ),
    Key(
        "model.num_classes",
        91,
        "classes that the model tells apart; 0: as many as the data has",
        whole(0),
        evaluation="same",
    ),
    Key(
        "model.dtype",
        "float32",
        "type of the computation; parameters are always float32",
        one_of("float32", "bfloat16"),
    ),
)

_DENOISING = (
    Key("dn.groups", 5, "denoising groups; 0 trains without denoising", whole(0)),
    Key(
        "dn.layout",
        "packed",
        "packed: each image gets as many whole groups as fit into dn.slots; paper: all groups, "
        "with data.max_objects slots each",
        one_of("packed", "paper"),
    ),
    Key("dn.slots", 200, "denoising queries per image in the packed layout", whole(1)),
    Key("dn.label_noise", 0.2, "probability that a label is replaced", PROBABILITY),
    Key(
        "dn.box_noise",
        0.4,
        "shift of the center and scaling of the sides, as a share of the box size",
        BELOW_ONE,
    ),
    Key(
        "dn.label_noise_by_group",
        (),
        "dn.label_noise from the first group to the last, interpolated linearly; empty: one for "
        "all",
        rules.numbers(PROBABILITY),
    ),
    Key(
        "dn.box_noise_by_group",
        (),
        "dn.box_noise from the first group to the last, interpolated linearly; empty: one for all",
        rules.numbers(BELOW_ONE),
    ),
    Key(
        "dn.box_distribution",
        "uniform",
        "distribution of the box noise; normal: standard deviation of half of dn.box_noise; "
        "truncated_normal: the same, cut off at dn.box_noise",
        one_of("uniform", "normal", "truncated_normal"),
    ),
    Key(
        "dn.box_parts",
        "both",
        "what the box noise changes: center and size, the center alone or the size alone",
        one_of("both", "center", "size"),
    ),
    Key(
        "dn.label_denoising",
        True,
        "False: denoising queries do not know their label and have no class loss",
        FLAG,
    ),
    Key(
        "dn.mask",
        True,
        "False, only to measure the leak: matching queries attend to denoising queries",
        FLAG,
    ),
    Key(
        "dn.contrastive",
        False,
        "True: each object also has a negative with more noise (DINO)",
        FLAG,
    ),
    Key(
        "dn.attend_padding",
        False,
        "True: queries of objects attend to empty slots, as in the PyTorch code",
        FLAG,
    ),
)

_LOSSES = (
    *(
        Key(f"matcher.cost_{name}", default, f"weight of the {cost} in the matching", AT_LEAST_ZERO)
        for name, default, cost in (
            ("class", 2.0, "class cost"),
            ("bbox", 5.0, "L1 distance of boxes"),
            ("giou", 2.0, "GIoU cost"),
        )
    ),
    *(
        Key(f"loss.weight_{name}", default, f"weight of the {loss} in the loss", AT_LEAST_ZERO)
        for name, default, loss in (
            ("class", 1.0, "class loss"),
            ("bbox", 5.0, "L1 distance of boxes"),
            ("giou", 2.0, "GIoU loss"),
        )
    ),
    Key("loss.focal_alpha", 0.25, "weight of positives in the focal loss", PROBABILITY),
    Key("loss.focal_gamma", 2.0, "exponent of the focal loss", AT_LEAST_ZERO),
)

_OPTIMIZER = (
    Key("optimizer.learning_rate", 1e-4, "learning rate of AdamW after the warm-up", ABOVE_ZERO),
    Key(
        "optimizer.lr_multipliers",
        (("^backbone/", 0.1),),
        "(regular expression on the parameter's path, factor) pairs; the first match counts",
        rules.PATTERN_FACTORS,
    ),
    Key("optimizer.weight_decay", 1e-4, "weight decay of AdamW", AT_LEAST_ZERO),
    Key("optimizer.b1", 0.9, "decay of the first moment", BELOW_ONE),
    Key("optimizer.b2", 0.999, "decay of the second moment", BELOW_ONE),
    Key("optimizer.eps", 1e-8, "added to the root of the second moment", ABOVE_ZERO),
    Key(
        "optimizer.clip_norm",
        0.1,
        "limit of the gradients' global norm; 0: no clipping",
        AT_LEAST_ZERO,
    ),
    Key("optimizer.schedule", "step", "schedule of the learning rate", one_of("step", "cosine")),
    Key("optimizer.step_at", "40 epochs", "when the step schedule lowers the rate", duration()),
    Key("optimizer.step_factor", 0.1, "factor of the rate from then on", ABOVE_ZERO),
    Key("optimizer.warmup", "0 steps", "linear increase of the rate from 0", duration()),
)

_TRAIN = (
    Key(
        "train.duration",
        "50 epochs",
        "length of the training",
        duration(positive=True, percent=False),
    ),
    Key(
        "train.batch_size",
        16,
        "images per step, over all devices and processes",
        whole(1),
    ),
    Key(
        "train.accumulate_steps",
        1,
        "parts into which a step splits its batch, one computed after the other",
        whole(1),
        resume="free",
    ),
    Key(
        "train.ema_decay",
        0.0,
        "decay of the parameters' moving average; 0: no average",
        BELOW_ONE,
    ),
    Key(
        "train.log_every",
        "50 steps",
        "interval of the metrics",
        duration(positive=True),
        resume="free",
    ),
    Key(
        "train.eval_every",
        "1 epochs",
        "interval of the evaluations",
        duration(positive=True),
        resume="free",
    ),
    Key(
        "train.checkpoint_every",
        "1 epochs",
        "interval of the checkpoints",
        duration(positive=True),
        resume="free",
    ),
    Key(
        "train.profile",
        "",
        "length of an XProf trace of early steps, for example 10 steps; empty: none",
        duration(positive=True, optional=True),
        resume="free",
    ),
)

_DEVICES = (
    Key(
        "compile.cache_dir",
        "~/.cache/dn_detr_jax",
        "folder where compiled programs are kept for later runs; empty: none. JAX 0.10 keeps no "
        "program that calls the host, such as the training step with its matching",
        TEXT,
        resume="free",
        machines="free",
    ),
    Key(
        "compile.options",
        ("cpu:xla_cpu_enable_concurrency_optimized_scheduler=true",),
        "options of XLA for the platforms cpu, gpu and tpu; the default runs several small "
        "operations of a CPU at a time, if the compiler knows it",
        rules.COMPILER_OPTIONS,
        resume="free",
    ),
    Key(
        "compile.attention",
        "xla",
        "xla, or cudnn: fused kernels for NVIDIA GPUs and bfloat16, which keep no scores for the "
        "backward pass",
        one_of("xla", "cudnn"),
        resume="free",
    ),
    Key("mesh.data", -1, "devices along the data axis; -1: all", rules.ALL_OR_SIZE, resume="free"),
    Key(
        "mesh.shard_optimizer",
        False,
        "True: the state of the optimizer and the moving average are split over these devices",
        FLAG,
        resume="free",
    ),
)

_EVALUATION = (
    Key(
        "eval.batch_size",
        16,
        "images per evaluation step, over all devices and processes",
        whole(1),
        resume="free",
    ),
    Key("eval.num_select", 300, "detections kept for each image", whole(1)),
    Key(
        "eval.instability_images",
        100,
        "images of the fixed subset that measures the instability of the matching; 0: none",
        whole(0),
    ),
    Key(
        "eval.pictures",
        12,
        "validation images in the drawn grid of detections; 0: none",
        whole(0),
        resume="free",
    ),
    Key("checkpoint.keep_latest", 2, "latest checkpoints that are kept", whole(1), resume="free"),
    Key("checkpoint.keep_best", 1, "checkpoints kept for their AP", whole(0), resume="free"),
    Key("init.checkpoint", "", "work directory whose parameters the training starts from", TEXT),
    Key(
        "init.backbone",
        "",
        "weights file for the backbone, of torchvision or timm: .pth, .safetensors or .npz",
        TEXT,
    ),
    Key(
        "init.reset_heads",
        False,
        "True: class head and label embedding do not start from init.checkpoint",
        FLAG,
    ),
)

SHARED_KEYS = (
    *_RUN,
    *_DATA,
    *_MODEL,
    *_DENOISING,
    *_LOSSES,
    *_OPTIMIZER,
    *_TRAIN,
    *_DEVICES,
    *_EVALUATION,
)
