"""The configuration of an experiment: every key, its default and its meaning.

A file in `configs/` starts from `base_config()` and changes what its experiment changes; the
command line overrides any value with `--config.section.key=value`. The defaults are those of the
DN-DAB-DETR with ResNet-50 of the paper (Li et al., CVPR 2022, section 6.1), 50 epochs.

Durations are strings with a unit: `"300 steps"`, `"2 epochs"`, `"5%"` (of the whole training).

`validate` checks every rule that the config alone decides, so that a mistake is one line before
any data is read or anything is compiled.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.errors import ConfigError


def base_config() -> ConfigDict:
    """The default of every key, as a `ConfigDict` with locked keys and types."""
    config = ConfigDict()
    config.seed = 0
    # What a loss, gradients or matching costs that are not finite do: "stop" the run, or "skip" the
    # update, in the whole run, restarts included, at most max_skipped_steps times.
    config.on_nonfinite = "stop"
    config.max_skipped_steps = 10

    config.data = ConfigDict(
        {
            "name": "coco",  # a key of dn_detr_jax.data.datasets
            "dir": "",  # where the data lies, or is prepared
            "packed_dir": "",  # where COCO-format data is packed once; empty: packed/ in data.dir
            "labels": "category_ids",  # are the classes; or contiguous: 0, 1, ... in their order
            "skip_bad": False,  # True: an image that can't be read is replaced and counted
            # Which pixels boxes are drawn on where EXIF turns or mirrors an image: "as_shown" by
            # viewers or "as_stored"; "auto": as stored unless the annotated size says otherwise.
            "exif": "auto",
            "canvases": ((800, 1344), (1344, 800)),  # (height, width), each compiled once
            "snap": 0.0,  # share by which an image's scale may move so that it fills its canvas
            "max_objects": 100,  # slots for objects; a larger image keeps a random subset; 0: all
            "workers": 0,  # processes that read and augment; 0: threads of this process
            "threads": 4,  # reading threads of each of those processes
            "prefetch": 4,  # batches made ahead, per worker
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
    # COCO-format data: an annotation file and the folder of its images, relative to data.dir.
    # Empty: found in the usual layouts, such as annotations/instances_train2017.json, train2017/.
    config.data.train = ConfigDict({"annotations": "", "images": ""})
    config.data.validation = ConfigDict({"annotations": "", "images": ""})

    config.model = ConfigDict(
        {
            "name": "dn_dab_detr",  # a key of dn_detr_jax.models.registry
            "num_classes": 91,  # 0: as many as the data has
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
            "pe_temperature_box": 10000.0,  # of the sine encoding of the anchors
            "position_gain": 0.0,  # above 0: cross-attention starts at the anchors, see Decoder
            "random_refpoints_xy": False,  # anchors' centres uniform over the image at the start
            "dtype": "float32",  # of the compute; parameters are always float32
            # Of "backbone", "encoder", "decoder": parts whose layers keep only their inputs for the
            # backward pass and compute the rest again; and of "attention": the scores of encoder
            # and decoder alone. Less memory, more compute, the same numbers.
            "remat": (),
        }
    )
    config.model.backbone = ConfigDict(
        {
            "depth": 50,  # 18, 34, 50 or 101
            "width": 64,  # channels of the first stage
            "stages": 4,  # the output has stride 4 * 2 ** (stages - 1)
            "norm": "frozen_batch_norm",  # or group_norm, for training from scratch
            "stem": "standard",  # 7x7 stride 2 and max pooling; or light: 3x3 stride 2, no pooling
            "dilation": False,  # last stage without stride, dilated (DC5)
            "mask_padding": True,  # features do not depend on the canvas; False: as in PyTorch
            "frozen_stages": 1,  # stem and that many stages get no gradient; -1: none frozen
        }
    )

    config.dn = ConfigDict(
        {
            "groups": 5,  # denoising groups; 0 trains plain DAB-DETR
            # "packed": each picture gets as many whole groups as fit into `slots`; "paper": all the
            # groups, with groups x data.max_objects slots for every picture (twice if contrastive).
            "layout": "packed",
            "slots": 200,  # denoising queries per picture of the packed layout
            "label_noise": 0.2,  # probability that a label is replaced
            "box_noise": 0.4,  # centre shift and scaling, as a share of the box size
            "contrastive": False,  # True: each object also has a negative, with more noise (DINO)
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
            "accumulate_steps": 1,  # parts into which a step splits its batch, one after the other
            "ema_decay": 0.0,  # of the moving average of the parameters; 0: none
            "log_every": "50 steps",
            "eval_every": "1 epochs",
            "checkpoint_every": "1 epochs",
            "profile": "",  # "10 steps": an XProf trace of early steps; empty: none
        }
    )
    # Compiled programs are kept there for the next run; empty: they are not. JAX 0.10 keeps none
    # that call the host, as those of the training step do for the matching; later ones do.
    config.compile = ConfigDict(
        {
            "cache_dir": "~/.cache/dn_detr_jax",
            # Of XLA, "platform:name=value", for the platforms cpu, gpu and tpu. On a CPU many
            # operations are too small for all cores: run several at a time. A compiler that does
            # not know this default goes without.
            "options": ("cpu:xla_cpu_enable_concurrency_optimized_scheduler=true",),
            # "cudnn": fused kernels, on NVIDIA's GPUs and with model.dtype "bfloat16". They keep no
            # scores for the backward pass. Not measured, see docs/performance.md.
            "attention": "xla",
        }
    )
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices along the data axis; -1: all of them
            "shard_optimizer": False,  # True: split the optimizer's state and the average over them
        }
    )

    config.eval = ConfigDict(
        {
            "batch_size": 16,
            "num_select": 300,  # detections kept per image
            "instability_images": 100,  # fixed subset for the instability of matching; 0: none
            "pictures": 12,  # validation pictures in the grid of detections
        }
    )
    config.checkpoint = ConfigDict({"keep_latest": 2, "keep_best": 1})
    config.init = ConfigDict(
        {
            "checkpoint": "",  # a work directory whose parameters to start from
            "backbone": "",  # a ResNet's weights of torchvision or timm: .pth, .safetensors, .npz
            "reset_heads": False,  # of the checkpoint, keep all but class head and label embedding
        }
    )
    return config


def expand_user(path: str, key: str) -> Path:
    """Returns a local path, its `~` replaced by the home directory.

    Args:
      path: of a file or folder.
      key: config key or flag it comes from, for the error.

    Raises:
      ConfigError: a URL such as that of a bucket, or a home directory that is not known.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ConfigError(
            key, path, "expected a local path; mount a bucket first, for example with gcsfuse"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(key, path, f"a path; {error}") from None


_LIMIT = 2**31  # of whole numbers: shapes, ids and steps are int32 on the devices
_MOST_PIXELS = 2**28  # of a canvas; no picture of more can be read
_MOST_COPIES = 2**20  # of a picture's objects; the mask of the paper's layout has that many rows
_LEAST_FLOAT, _MOST_FLOAT = 1e-37, 1e38  # which float32 holds
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%)\s*")


def parse_duration(duration: str, key: str) -> tuple[float, str]:
    """Splits a duration into its number and its unit.

    Args:
      duration: for example "300 steps", "1.5 epochs" or "5%".
      key: config key it comes from, for the error.

    Returns:
      The number, at least 0, and one of "steps", "epochs", "%".

    Raises:
      ConfigError: not such a duration, a part of a step, more than 100%, or too many of them.

    Examples:
      >>> parse_duration("1.5 epochs", "optimizer.warmup")
      (1.5, 'epochs')
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if not match:
        raise ConfigError(key, duration, 'a duration is like "300 steps", "2 epochs" or "5%"')
    number, unit = float(match[1]), match[2]
    if number >= _LIMIT:
        raise ConfigError(key, duration, "steps are counted up to 2**31 - 1")
    if unit.startswith("step") and number != int(number):
        raise ConfigError(key, duration, "steps are whole numbers")
    if unit == "%" and number > 100:
        raise ConfigError(key, duration, "a percentage is at most 100%")
    return number, unit if unit == "%" else unit.rstrip("s") + "s"


_OPTION = re.compile(r"(cpu|gpu|tpu):([A-Za-z]\w*)=(\S+)")


def compiler_options(config: ConfigDict, platform: str) -> dict[str, Any]:
    """The options that the programs for a platform are compiled with.

    Args:
      config: of which `compile.options` is read.
      platform: of the devices, "cpu", "gpu" or "tpu".

    Returns:
      For `jax.stages.Lowered.compile` and `jax.jit`: values by name.

    Raises:
      ConfigError: an entry that can't be read.

    Examples:
      >>> compiler_options(base_config(), "cpu")
      {'xla_cpu_enable_concurrency_optimized_scheduler': True}
      >>> compiler_options(base_config(), "tpu")
      {}
    """
    entries = config.compile.options
    expected = 'XLA\'s options, for example ("gpu:xla_gpu_enable_triton_gemm=false",)'
    if not isinstance(entries, tuple | list):
        raise ConfigError("compile.options", entries, expected)
    options = {}
    for entry in entries:
        match = _OPTION.fullmatch(entry) if isinstance(entry, str) else None
        if match is None:
            raise ConfigError("compile.options", entry, expected)
        if match[1] == platform:
            options[match[2]] = _option_value(match[3])
    return options


def _option_value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def check_attention(config: ConfigDict, platform: str) -> None:
    """Raises ConfigError if a platform ("cpu", "gpu", "tpu") lacks the attention of the config."""
    if config.compile.attention == "cudnn" and platform != "gpu":
        expected = f'"xla" on the platform {platform}: cuDNN is for NVIDIA\'s GPUs'
        raise ConfigError("compile.attention", "cudnn", expected)


def flat_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted path of every value in `config`, sections left out.

    Examples:
      >>> flat_keys(ConfigDict({"dn": {"groups": 5}, "seed": 0}))
      ['dn.groups', 'seed']
    """
    return list(_flat(config, prefix))


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        path = f"{prefix}{key}"
        values |= _flat(value, f"{path}.") if isinstance(value, ConfigDict) else {path: value}
    return values


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """A "did you mean" for an unknown dotted key; the empty string if nothing is near.

    Examples:
      >>> nearest_key("model.num_head", ["model.num_heads", "model.num_classes"])
      'did you mean model.num_heads?'
      >>> nearest_key("groups", ["dn.groups", "seed"])
      'did you mean dn.groups?'
    """
    keys = list(keys)
    by_name = {path.rsplit(".", 1)[-1]: path for path in reversed(keys)}
    last = key.rsplit(".", 1)[-1]
    near = [by_name[last]] if last in by_name else []  # the right name in the wrong section
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [by_name[name] for name in difflib.get_close_matches(last, by_name, cutoff=0.8)]
    return f"did you mean {near[0]}?" if near else ""


class _Checker:
    """Looks values up by dotted key and raises `ConfigError` where a rule is broken."""

    def __init__(self, config: ConfigDict):
        self.config = config

    def __getitem__(self, key: str) -> Any:
        value: Any = self.config
        for part in key.split("."):
            value = value[part]
        return value

    def check(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(key, self[key], expected)

    def whole(self, least: int, *keys: str) -> None:
        for key in keys:
            self.check(key, _is_int(self[key]) and self[key] >= least, f"an integer >= {least}")
            self.check(key, self[key] < _LIMIT, "an integer below 2**31")

    def number(self, holds: Callable[[float], bool], expected: str, *keys: str) -> None:
        for key in keys:
            self.check(key, _is_number(self[key]) and holds(self[key]), f"a number {expected}")

    def one_of(self, key: str, *names: Any) -> None:
        value = self[key]
        found = any(type(value) is type(name) and value == name for name in names)
        self.check(key, found, f"one of {', '.join(map(repr, names))}")

    def text(self, *keys: str) -> None:
        for key in keys:
            right = isinstance(self[key], str) and "\0" not in self[key]
            self.check(key, right, "a text, empty for none")

    def sizes(self, *keys: str) -> None:
        for key in keys:
            value = self[key]
            right = isinstance(value, tuple | list) and value and all(map(_is_size, value))
            self.check(key, bool(right), "positive integers, for example (480, 512)")

    def duration(self, *keys: str, positive: bool) -> None:
        for key in keys:
            number, _ = parse_duration(self[key], key)
            self.check(key, number > 0 or not positive, "longer than 0")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value < _LIMIT


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or _LEAST_FLOAT <= abs(value) <= _MOST_FLOAT


def validate(config: ConfigDict) -> None:
    """Checks every rule that can be checked from the config alone.

    Args:
      config: an experiment's config, the command line's overrides applied.

    Raises:
      ConfigError: naming the first wrong key, its value and what would be right.
    """
    _check_keys(config)
    checker = _Checker(config)
    right = _is_int(config.seed) and 0 <= config.seed < 2**32
    checker.check("seed", right, "an integer >= 0 and below 2**32")
    checker.one_of("on_nonfinite", "stop", "skip")
    checker.whole(1, "max_skipped_steps")
    _check_data(checker)
    _check_model(checker)
    _check_losses(checker)
    _check_optimizer(checker)
    _check_run(checker)


def _check_keys(config: ConfigDict) -> None:
    known, present = _flat(base_config()), _flat(config)
    for key, value in present.items():
        if key not in known:
            raise ConfigError(key, value, f"no such key; {nearest_key(key, known)}".rstrip("; "))
    for key, default in known.items():
        if key not in present:
            raise ConfigError(key, None, f"the key is missing; its default is {default!r}")


_SPLIT_PATHS = ("annotations", "images")


def _check_data(checker: _Checker) -> None:
    canvases = checker["data.canvases"]
    right = isinstance(canvases, tuple | list) and bool(canvases)
    right = right and all(
        isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_size, size))
        for size in canvases
    )
    expected = "(height, width) pairs of positive integers, for example ((800, 1344), (1344, 800))"
    checker.check("data.canvases", right, expected)
    fits = all(height * width <= _MOST_PIXELS for height, width in canvases)
    checker.check("data.canvases", fits, f"canvases of at most {_MOST_PIXELS} pixels")
    paths = [f"data.{split}.{part}" for split in ("train", "validation") for part in _SPLIT_PATHS]
    checker.text("data.name", "data.dir", "data.packed_dir", *paths)
    checker.whole(0, "data.workers")
    checker.whole(0, "data.max_objects")
    checker.whole(1, "data.threads", "data.prefetch")
    checker.one_of("data.labels", "category_ids", "contiguous")
    checker.one_of("data.skip_bad", True, False)
    checker.one_of("data.exif", "auto", "as_shown", "as_stored")
    checker.number(lambda value: 0 <= value <= 0.5, "from 0 to 0.5", "data.snap")
    checker.whole(1, "data.eval_short_side", "data.eval_max_long_side")
    checker.whole(1, "data.augment.max_long_side")
    _check_probabilities(checker, "data.augment.flip", "data.augment.crop")
    checker.sizes("data.augment.short_sides", "data.augment.crop_resize", "data.augment.crop_size")
    crop_size = checker["data.augment.crop_size"]
    ordered = len(crop_size) == 2 and crop_size[0] <= crop_size[1]
    checker.check("data.augment.crop_size", ordered, "(least, largest) side")


def _check_probabilities(checker: _Checker, *keys: str) -> None:
    checker.number(lambda value: 0 <= value <= 1, "from 0 to 1", *keys)


def _check_model(checker: _Checker) -> None:
    checker.text("model.name")
    checker.whole(1, "model.hidden_dim", "model.num_heads", "model.ffn_dim")
    checker.whole(0, "model.num_classes", "model.encoder_layers", "model.num_patterns")
    checker.whole(1, "model.decoder_layers", "model.num_queries")
    hidden, heads = checker["model.hidden_dim"], checker["model.num_heads"]
    checker.check(
        "model.hidden_dim", hidden % 4 == 0, "a multiple of 4: sine and cosine for height and width"
    )
    near = ", ".join(str(n) for n in range(1, min(hidden, 32) + 1) if hidden % n == 0)
    checker.check(
        "model.num_heads", hidden % heads == 0, f"a divisor of model.hidden_dim = {hidden}: {near}"
    )
    checker.one_of("model.activation", "prelu", "relu")
    checker.one_of("model.dtype", "float32", "bfloat16")
    checker.one_of("compile.attention", "xla", "cudnn")
    fused, widest = checker["compile.attention"] == "cudnn", 2 * hidden // heads
    checker.check(
        "compile.attention",
        not fused or checker["model.dtype"] == "bfloat16",
        '"xla" for model.dtype = "float32": cuDNN\'s attention takes "bfloat16"',
    )
    checker.check(
        "compile.attention",
        not fused or widest <= 128,
        f'"xla" for heads of {widest} channels, 2 x model.hidden_dim / model.num_heads: cuDNN\'s '
        "attention takes at most 128",
    )
    remat, parts = checker["model.remat"], ("backbone", "encoder", "decoder", "attention")
    right = isinstance(remat, tuple | list) and all(part in parts for part in remat)
    checker.check("model.remat", right, f'some of {parts}, for example ("encoder",)')
    checker.number(lambda value: 0 <= value < 1, "from 0 to below 1", "model.dropout")
    above_zero = (lambda value: value > 0), "above 0"
    temperatures = [f"model.pe_temperature_{part}" for part in ("h", "w", "box")]
    checker.number(*above_zero, *temperatures)
    checker.number(lambda value: value >= 0, "of at least 0", "model.position_gain")
    checker.one_of("model.random_refpoints_xy", True, False)
    checker.one_of("model.backbone.depth", 18, 34, 50, 101)
    checker.one_of("model.backbone.norm", "frozen_batch_norm", "group_norm")
    checker.one_of("model.backbone.stem", "standard", "light")
    checker.one_of("model.backbone.dilation", True, False)
    checker.one_of("model.backbone.mask_padding", True, False)
    checker.whole(4, "model.backbone.width")
    checker.one_of("model.backbone.stages", 1, 2, 3, 4)
    stages = checker["model.backbone.stages"]
    checker.check(
        "model.backbone.dilation",
        stages > 1 or not checker["model.backbone.dilation"],
        "the first stage has no stride to dilate: more stages, or False",
    )
    # The group norm of the backbone has at most 32 groups, of at least 4 channels; the channels
    # double from stage to stage, and bottlenecks have four times as many.
    width = checker["model.backbone.width"]
    fits = all(c % min(32, c // 4) == 0 for c in (width * 2**i for i in range(6)))
    checker.check(
        "model.backbone.width",
        fits or checker["model.backbone.norm"] != "group_norm",
        "with group norm a width such as 8, 16, 32, 48, 64, 96 or 128",
    )
    checker.whole(-1, "model.backbone.frozen_stages")
    checker.check(
        "model.backbone.frozen_stages",
        checker["model.backbone.frozen_stages"] <= stages,
        f"from -1 (none) to model.backbone.stages = {stages}",
    )


def _check_losses(checker: _Checker) -> None:
    checker.whole(0, "dn.groups")
    copies = checker["dn.groups"] * checker["data.max_objects"]
    checker.check(
        "dn.groups",
        copies <= _MOST_COPIES,
        f"fewer: times data.max_objects = {checker['data.max_objects']} they make {copies} queries "
        f"for a picture, of at most {_MOST_COPIES}",
    )
    _check_probabilities(checker, "dn.label_noise", "loss.focal_alpha")
    checker.number(lambda value: 0 <= value < 1, "from 0 to below 1", "dn.box_noise")
    checker.one_of("dn.contrastive", True, False)
    checker.one_of("dn.attend_padding", True, False)
    checker.one_of("dn.layout", "packed", "paper")
    checker.whole(2 if checker["dn.contrastive"] else 1, "dn.slots")
    checker.check(
        "dn.attend_padding",
        not checker["dn.attend_padding"] or checker["dn.layout"] == "paper",
        "False, or dn.layout=paper: packed groups have no empty slots to attend to",
    )
    costs = ["matcher.cost_class", "matcher.cost_bbox", "matcher.cost_giou"]
    weights = ["loss.weight_class", "loss.weight_bbox", "loss.weight_giou"]
    checker.number(lambda value: value >= 0, "of at least 0", *costs, *weights, "loss.focal_gamma")
    for keys in (costs, weights):
        checker.check(keys[0], any(checker[key] for key in keys), f"one of {keys} must be above 0")


def _check_optimizer(checker: _Checker) -> None:
    above_zero = (lambda value: value > 0), "above 0"
    at_least_zero = (lambda value: value >= 0), "of at least 0"
    checker.number(*above_zero, "optimizer.learning_rate", "optimizer.eps", "optimizer.step_factor")
    checker.number(*at_least_zero, "optimizer.weight_decay", "optimizer.clip_norm")
    checker.number(
        lambda value: 0 <= value < 1, "from 0 to below 1", "optimizer.b1", "optimizer.b2"
    )
    checker.one_of("optimizer.schedule", "step", "cosine")
    checker.duration("optimizer.step_at", "optimizer.warmup", positive=False)
    expected = '(regular expression, factor >= 0) pairs, for example (("^backbone/", 0.1),)'
    key = "optimizer.lr_multipliers"
    checker.check(key, isinstance(checker[key], tuple | list), expected)
    for pair in checker[key]:
        right = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        checker.check(key, right and _is_number(pair[1]) and pair[1] >= 0, expected)
        try:
            re.compile(pair[0])
        except (re.error, OverflowError, RecursionError) as error:
            reason = f"{pair[0]!r} is no regular expression: {error}"
            raise ConfigError(key, checker[key], reason) from None


def _check_run(checker: _Checker) -> None:
    checker.whole(1, "train.batch_size", "eval.batch_size", "eval.num_select")
    checker.duration("train.duration", positive=True)
    checker.check(
        "train.duration",
        not checker["train.duration"].strip().endswith("%"),
        "in steps or epochs: it is what percentages are of",
    )
    checker.duration("train.log_every", "train.eval_every", "train.checkpoint_every", positive=True)
    checker.text("train.profile")
    if checker["train.profile"]:
        checker.duration("train.profile", positive=True)
    devices = checker["mesh.data"]
    checker.check("mesh.data", devices == -1 or _is_size(devices), "-1 (all) or a positive integer")
    for key in ("train.batch_size", "eval.batch_size"):
        fits = devices == -1 or checker[key] % devices == 0
        checker.check(key, fits, f"a multiple of mesh.data = {devices}")
    compiler_options(checker.config, "cpu")
    checker.one_of("mesh.shard_optimizer", True, False)
    checker.whole(1, "train.accumulate_steps")
    rows = checker["train.batch_size"] // max(devices, 1)
    fits = rows % checker["train.accumulate_steps"] == 0
    expected = f"a divisor of the pictures per device: train.batch_size / devices = {rows}"
    checker.check("train.accumulate_steps", fits, expected)
    checker.number(lambda value: 0 <= value < 1, "from 0 to below 1", "train.ema_decay")
    queries = checker["model.num_queries"] * max(1, checker["model.num_patterns"])
    most = queries * checker["model.num_classes"]
    checker.check(
        "eval.num_select",
        checker["eval.num_select"] <= most or not most,
        f"at most model.num_queries x model.num_classes (x model.num_patterns) = {most}",
    )
    checker.whole(0, "eval.instability_images", "eval.pictures", "checkpoint.keep_best")
    checker.whole(1, "checkpoint.keep_latest")
    checker.text("compile.cache_dir", "init.checkpoint", "init.backbone")
    checker.one_of("init.reset_heads", True, False)
    checker.check(
        "init.backbone",
        not (checker["init.backbone"] and checker["init.checkpoint"]),
        "empty, since init.checkpoint has a backbone; give one of the two",
    )
