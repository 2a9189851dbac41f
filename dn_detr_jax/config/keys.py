"""The keys of every config, one row each: default, meaning, rule, and when the value may change.

The keys of a model's architecture stand with its variant, `dn_detr_jax.config.variants`. Defaults,
validation, the check on resuming, the comparison between processes and the printed reference are
all made from these rows.
"""

from dn_detr_jax.config import rules
from dn_detr_jax.config.data_keys import DATA_KEYS
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.rules import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FLAG,
    PROBABILITY,
    TEXT,
    duration,
    one_of,
    whole,
)

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
        rules.between(0, 1),
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
        rules.numbers(rules.between(0, 1)),
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
    Key(
        "optimizer.scale_lr",
        0,
        "batch size that optimizer.learning_rate is for: the rate is multiplied by "
        "train.batch_size / optimizer.scale_lr; 0: it is not",
        whole(0),
    ),
    Key(
        "optimizer.schedule",
        "step",
        "schedule of the learning rate",
        one_of("step", "multi_step", "cosine", "flat_cosine"),
    ),
    Key("optimizer.step_at", "40 epochs", "when the step schedule lowers the rate", duration()),
    Key(
        "optimizer.milestones",
        (),
        "when the multi_step schedule lowers the rate",
        rules.tuple_of(duration(), "durations", '("30 epochs", "40 epochs")'),
    ),
    Key("optimizer.step_factor", 0.1, "factor of the rate from each of these on", ABOVE_ZERO),
    Key("optimizer.flat_until", "50%", "when the flat_cosine schedule begins to fall", duration()),
    Key(
        "optimizer.end_factor",
        0.0,
        "share of the rate that cosine and flat_cosine end at",
        PROBABILITY,
    ),
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
        "train.freeze",
        (),
        "regular expressions on the parameter's path: what one of them matches is not trained",
        rules.tuple_of(rules.PATTERN, "regular expressions", '("^backbone/", "^encoder/")'),
    ),
    Key(
        "train.ema_decay",
        0.0,
        "decay of the parameters' moving average; 0: no average",
        BELOW_ONE,
    ),
    Key(
        "train.ema_tau",
        0,
        "warm-up of the average: its decay after t updates is train.ema_decay * "
        "(1 - exp(-t / tau)); 0: at most (1 + t) / (10 + t)",
        whole(0),
    ),
    Key(
        "train.loggers",
        ("tensorboard",),
        "where the metrics go, beside metrics.jsonl in the work directory",
        rules.some_of("tensorboard", "wandb", "mlflow"),
        resume="free",
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
        "interval of the evaluations; empty: none, no validation split is needed, and the last "
        "checkpoint is the result",
        duration(positive=True, optional=True),
        resume="free",
    ),
    Key(
        "train.stop_after",
        0,
        "evaluations without a higher AP after which the training ends; 0: it does not end early",
        whole(0),
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
    Key(
        "eval.raw",
        False,
        "True, with train.ema_decay: the parameters themselves are evaluated too, and the "
        "checkpoints with their best AP are kept (--step=best_raw)",
        FLAG,
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
        "eval.backend",
        "pycocotools",
        "package that computes AP: pycocotools, or the optional faster-coco-eval",
        one_of("pycocotools", "faster-coco-eval"),
        resume="free",
    ),
    Key(
        "eval.pictures",
        12,
        "validation images in the drawn grid of detections; 0: none",
        whole(0),
        resume="free",
    ),
    Key("checkpoint.keep_latest", 2, "latest checkpoints that are kept", whole(1), resume="free"),
    Key(
        "checkpoint.keep_best",
        1,
        "checkpoints kept for their AP, and with eval.raw as many for that of the parameters",
        whole(0),
        resume="free",
    ),
    Key(
        "init.checkpoint",
        "",
        "work directory, weights file or hf:OWNER/NAME whose parameters the training starts from",
        TEXT,
    ),
    Key(
        "init.backbone",
        "",
        "weights file for the backbone, of torchvision or timm: .pth, .safetensors, .npz, or "
        "hf:OWNER/NAME such as hf:timm/resnet50.tv_in1k",
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
    *DATA_KEYS,
    *_MODEL,
    *_DENOISING,
    *_LOSSES,
    *_OPTIMIZER,
    *_TRAIN,
    *_DEVICES,
    *_EVALUATION,
)
