"""Every rule of the config, and the error for each wrong value."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dn_detr_jax.config import (
    base_config,
    check_attention,
    compiler_options,
    flat_keys,
    nearest_key,
    validate,
)
from dn_detr_jax.errors import ConfigError


def _with(changes):
    config = base_config()
    for key, value in changes.items():
        section = config
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        with section.ignore_type():
            section[last] = value
    return config


def test_compiler_options_are_those_of_the_platform():
    """Catches options for a GPU that reach the compiler of CPUs, and values that stay strings."""
    options = "gpu:xla_a=false", "cpu:xla_b=2", "gpu:xla_c=0.5", "gpu:xla_d=auto", "gpu:xla_a=True"
    config = _with({"compile.options": options})
    assert compiler_options(config, "gpu") == {"xla_a": True, "xla_c": 0.5, "xla_d": "auto"}
    assert compiler_options(config, "cpu") == {"xla_b": 2}


def test_cudnn_is_for_gpus_alone():
    config = _with({"compile.attention": "cudnn", "model.dtype": "bfloat16"})
    validate(config)
    check_attention(config, "gpu")
    for platform in "cpu", "tpu":
        with pytest.raises(ConfigError, match=rf"compile\.attention = 'cudnn'.*{platform}"):
            check_attention(config, platform)
        check_attention(base_config(), platform)


def test_cudnn_needs_bfloat16_and_narrow_heads():
    """Catches jax's own exceptions, which come while the step is traced and name no key."""
    for wrong in {"model.dtype": "float32"}, {"model.num_heads": 2}:
        config = _with({"compile.attention": "cudnn", "model.dtype": "bfloat16"} | wrong)
        with pytest.raises(ConfigError, match=r"compile\.attention"):
            validate(config)


def test_the_defaults_are_valid():
    validate(base_config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("on_nonfinite", "ignore"),
        ("max_skipped_steps", 0),
        ("data.canvases", ()),
        ("data.canvases", ((800, 0),)),
        ("data.canvases", (800, 1344)),
        ("data.canvases", ((800, 1344, 3),)),
        ("data.max_objects", -1),
        ("data.threads", 1.5),
        ("compile.options", "cpu:xla_x=1"),
        ("compile.options", ("xla_x=1",)),
        ("compile.options", ("cuda:xla_x=1",)),
        ("compile.options", ("gpu:xla_x",)),
        ("compile.options", (("gpu", "xla_x", 1),)),
        ("compile.attention", "flash"),
        ("data.workers", -1),
        ("data.augment.flip", 1.1),
        ("data.augment.flip", float("nan")),
        ("data.augment.crop", -0.1),
        ("data.augment.short_sides", ()),
        ("data.augment.short_sides", ("480",)),
        ("data.augment.crop_size", (600, 384)),
        ("model.num_classes", -1),
        ("model.hidden_dim", 258),
        ("model.num_heads", 7),
        ("model.num_heads", 0),
        ("model.num_heads", True),
        ("model.activation", "gelu"),
        ("model.dtype", "float16"),
        ("model.dropout", 1.0),
        ("model.pe_temperature_h", 0.0),
        ("model.num_patterns", -1),
        ("model.decoder_layers", 0),
        ("model.backbone.depth", 26),
        ("model.backbone.norm", "layer_norm"),
        ("model.backbone.stem", "big"),
        ("model.backbone.stages", 5),
        ("model.backbone.frozen_stages", 5),
        ("model.backbone.frozen_stages", -2),
        ("dn.groups", -1),
        ("dn.groups", 2**20),
        ("dn.label_noise", 1.5),
        ("dn.box_noise", -0.4),
        ("dn.box_noise", 1.1),
        ("dn.attend_padding", 1.5),
        ("dn.layout", "dense"),
        ("dn.slots", 0),
        ("matcher.cost_class", -2.0),
        ("loss.weight_bbox", float("inf")),
        ("loss.focal_alpha", 2.0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.b2", 1.0),
        ("optimizer.clip_norm", -0.1),
        ("optimizer.schedule", "linear"),
        ("optimizer.step_at", "40"),
        ("optimizer.milestones", "40 epochs"),
        ("optimizer.milestones", ("40 epochs", "50")),
        ("optimizer.scale_lr", -16),
        ("optimizer.end_factor", 1.5),
        ("optimizer.lr_multipliers", ("^backbone/", 0.1)),
        ("optimizer.lr_multipliers", (("^backbone(", 0.1),)),
        ("optimizer.lr_multipliers", (("^backbone/", -0.1),)),
        ("train.duration", "50%"),
        ("train.duration", "0 epochs"),
        ("train.batch_size", 0),
        ("train.log_every", "0 steps"),
        ("train.eval_every", "often"),
        ("model.remat", ("decoder", "heads")),
        ("model.remat", "encoder"),
        ("train.accumulate_steps", 0),
        ("train.accumulate_steps", 3),
        ("train.freeze", "^backbone/"),
        ("train.freeze", ("^backbone(",)),
        ("train.freeze", (0,)),
        ("train.ema_decay", 1.0),
        ("train.ema_decay", -0.1),
        ("train.ema_tau", 0.5),
        ("train.stop_after", -1),
        ("mesh.shard_optimizer", 2),
        ("mesh.data", 0),
        ("mesh.data", 3),
        ("eval.num_select", 91 * 300 + 1),
        ("eval.pictures", -1),
        ("checkpoint.keep_latest", 0),
        ("checkpoint.keep_best", -1),
    ],
)
def test_a_wrong_value_is_named_in_one_line(key, value):
    with pytest.raises(ConfigError) as error:
        validate(_with({key: value}))
    message = str(error.value)
    named = "train.batch_size" if key == "mesh.data" and value == 3 else key
    assert message.startswith(f"config.{named} = ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"dn.groups": 0},
        {"model.num_patterns": 3, "eval.num_select": 3 * 300 * 91},
        {"model.backbone.frozen_stages": -1, "model.backbone.norm": "group_norm"},
        {"optimizer.clip_norm": 0.0, "optimizer.warmup": "5%"},
        {"optimizer.lr_multipliers": ()},
        {"mesh.data": 8, "eval.instability_images": 0},
        {"mesh.data": 8, "train.accumulate_steps": 2, "mesh.shard_optimizer": True},
        {"model.remat": ("backbone", "encoder", "decoder"), "train.ema_decay": 0.9999},
        {"data.augment.flip": 0},
    ],
)
def test_the_limits_are_valid(changes):
    validate(_with(changes))


def test_early_stopping_needs_evaluations():
    """Catches a training that would never end early because nothing is measured."""
    validate(_with({"train.stop_after": 3}))
    with pytest.raises(ConfigError, match=r"stop_after = 3: .*eval_every"):
        validate(_with({"train.stop_after": 3, "train.eval_every": ""}))


def test_packed_groups_have_no_empty_slots_to_attend_to():
    validate(_with({"dn.layout": "paper", "dn.attend_padding": True}))
    with pytest.raises(ConfigError, match=r"attend_padding = True: .*dn\.layout=paper"):
        validate(_with({"dn.layout": "packed", "dn.attend_padding": True}))


def test_group_norm_needs_channels_that_its_groups_divide():
    widths = {"model.backbone.norm": "group_norm", "model.backbone.width": 44}
    with pytest.raises(ConfigError, match=r"width = 44"):
        validate(_with(widths))
    validate(_with(widths | {"model.backbone.norm": "frozen_batch_norm"}))


def test_unknown_and_missing_keys():
    config = base_config()
    config.model.hiden_dim = 128
    with pytest.raises(ConfigError, match=r"model\.hiden_dim.*did you mean model\.hidden_dim\?"):
        validate(config)
    config = base_config()
    del config.dn["groups"]
    with pytest.raises(ConfigError, match=r"dn\.groups.*missing.*default is 5"):
        validate(config)


def test_nearest_key():
    keys = flat_keys(base_config())
    assert nearest_key("model.num_head", keys) == "did you mean model.num_heads?"
    assert nearest_key("keep_latest", keys) == "did you mean checkpoint.keep_latest?"
    assert nearest_key("model.learning_rate", keys) == "did you mean optimizer.learning_rate?"
    assert nearest_key("entirely.different", keys) == ""


def test_flat_keys_are_those_of_ml_collections():
    config = ConfigDict({"b": {"c": 1, "a": {"z": (1, 2)}}, "a": None})
    assert flat_keys(config) == ["a", "b.a.z", "b.c"]


PROGRAM = """
from absl import flags
from ml_collections import config_flags
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import validate
CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "where to write", required=True)
def main(argv):
    validate(CONFIG.value)
    if CONFIG.value.seed == 13:
        raise RuntimeError("not expected")
    print("heads", CONFIG.value.model.num_heads, CONFIG.value.data.canvases)
run_main(main)
"""
CONFIG_FILE = """
from dn_detr_jax.config import base_config
def get_config():
    return base_config()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs a program with arguments; returns (status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.py").write_text(CONFIG_FILE)

    def run(*arguments):
        command = [sys.executable, str(folder / "program.py"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_overrides_reach_the_program(program):
    status, out, _ = program(
        "--config=config.py", "--workdir=x", "--config.model.num_heads=4", "--config.data.canvases",
        "((96,128),)",
    )  # fmt: skip
    assert (status, out) == (0, "heads 4 ((96, 128),)\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.model.num_head=1"], ["--config.model.num_head", "mean model.num_heads?"]),
        (["--config.groups", "3"], ["--config.groups", "did you mean dn.groups?"]),
        (["--config.model.num_heads=abc"], ["--config.model.num_heads=abc", "int"]),
        (["--config.model={'num_heads': 1}"], ["--config.model", "no such key"]),
        (["--config.dn.groups=-1"], ["config.dn.groups = -1", "an integer >= 0"]),
        (["stray"], ["'stray'", "--config.section.key=value"]),
        (["--wrkdir=y"], ["wrkdir", "workdir"]),
        (["--config=missing.py"], ["missing.py", "no such file"]),
    ],
)
def test_wrong_command_lines_are_one_line_and_a_status(program, arguments, expected):
    given = ["--workdir=x"]
    if not arguments[0].startswith("--config="):
        given.append("--config=config.py")
    status, out, err = program(*given, *arguments)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    for part in expected:
        assert part in err


PROGRAM_WITH_ARGUMENTS = """
import sys
from absl import flags
from dn_detr_jax.commands.command_line import define_step_flag, run_main
define_step_flag("best")
run_main(lambda argv: print(argv[1:], repr(flags.FLAGS.step)), arguments=("DIR", "FILES..."))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "b"], "['a', 'b'] 'best'\n"),
        (["a", "b", "--step=12", "c"], "['a', 'b', 'c'] 12\n"),
        (["a"], "error: FILES is missing; see --help\n"),
        ([], "error: DIR is missing; see --help\n"),
        (
            ["a", "b", "--step=-1"],
            "error: flag --step=-1: expected best, best_raw, latest or a number",
        ),
        (
            ["a", "b", "--step=last"],
            "error: flag --step=last: expected best, best_raw, latest or a number",
        ),
    ],
)
def test_any_number_of_arguments_and_a_step(arguments, expected):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM_WITH_ARGUMENTS, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
    )
    assert (done.stdout + done.stderr).startswith(expected)
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert done.returncode == (0 if done.stdout else 1)


def test_unexpected_errors_keep_their_traceback(program):
    status, _, err = program("--workdir=x", "--config=config.py", "--config.seed=13")
    assert status == 1
    assert "Traceback" in err and "not expected" in err
