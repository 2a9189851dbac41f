"""For any value of any key, `validate` names it, or everything up to the compiler accepts it.

A config that passes and then fails while shapes, plans or schedules are made shows a missing rule.
Nothing is compiled here: models are traced with abstract arrays.
"""

import contextlib
import copy
import io
import json
import math
import sys

import jax
import numpy as np
import pytest
from absl import flags
from damage import examples, one_line, within
from data import tiny as tiny_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.commands import command_line
from dn_detr_jax.config import (
    base_config,
    expand_user,
    flat_keys,
    validate,
)
from dn_detr_jax.data.plan import TrainPlan, plan_eval
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.evaluation.detect import eval_step
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.optimizer import describe, make_optimizer
from dn_detr_jax.training.setup import Plan
from dn_detr_jax.training.state import abstract_state
from dn_detr_jax.training.step import abstract_batch, compute_losses

KEYS = flat_keys(base_config())


def put(config, key, value):
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    if isinstance(value, int) and abs(value) > 10**300 and isinstance(config[last], float):
        value = math.inf  # ml_collections fails to convert it to a float
    with config.ignore_type():
        config[last] = value


def get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


WHOLE = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([2**31 - 1, 2**31 - 4, 2**31, 2**32, 2**63, 10**30, 10**400, -(2**70)]),
)
FRACTIONS = st.one_of(
    st.floats(),
    st.sampled_from([1e-45, 1e-300, 5e-324, 3.4e38, 3.5e38, 1e308, math.inf, -math.inf, math.nan]),
)
WORDS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        ["\n", "a\nb", "\0", "(", "(a+)+$", "a{99999999999}", "(" * 5000, "^", "~nobody/x"]
    ),
    st.sampled_from(
        ["3 steps", "1e9 epochs", "9" * 400 + " steps", "99999999999 steps", "101%", ".%"]
    ),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), WHOLE, FRACTIONS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        st.just(ConfigDict({"x": 1})),
    ),
    max_leaves=6,
)


@settings(max_examples=examples(300))
@given(changes=st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
@example({"model.hidden_dim": 2**31 - 4})
@example({"train.log_every": "9" * 400 + " steps"})
@example({"optimizer.lr_multipliers": (("^a", 10**400),)})
@example({"optimizer.lr_multipliers": (("a{99999999999}", 1.0),)})
@example({"model.backbone.stages": 2.0})
@example({"model.name": ["dn_dab_detr"]})
def test_any_value_is_right_or_named(changes):
    """Catches rules that crash, or run for hours, on values that they should refuse."""
    config = base_config()
    for key, value in changes.items():
        put(config, key, value)
    try:
        with within(5):
            validate(config)
    except ConfigError as error:
        one_line(error)
        assert str(error).startswith("config.") and len(str(error)) < 1000


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_another_type_is_named(key):
    """None, a function's worth of text or a list where a single value belongs: for every key."""
    default = get(base_config(), key)
    for value in (None, "\0", -math.inf, 10**5000, ConfigDict({"x": 1}), {"x": 1}):
        config = base_config()
        put(config, key, value)
        with pytest.raises(ConfigError, match=f"config.{key}"):
            validate(config)
    config = base_config()
    put(config, key, [default] if not isinstance(default, tuple | str) else 7)
    with pytest.raises(ConfigError, match=f"config.{key} "):
        validate(config)


# Results of a valid config


def small_values(key, default):
    """Draws values of the right type, mostly valid and small enough for quick tracing."""
    if isinstance(default, bool):
        return st.booleans()
    if key == "optimizer.lr_multipliers":
        pattern = st.sampled_from(["^backbone/", ".", "^$", "kernel$", "(?i)HEAD", "a|b", "^head"])
        factor = st.sampled_from([0, 0.0, 0.1, 1, 3.0, 1e-37])
        return st.lists(st.tuples(pattern, factor), max_size=3).map(tuple)
    if key == "train.freeze":
        pattern = st.sampled_from(["^backbone/", "^$", "kernel$", "(?i)HEAD"])
        return st.lists(pattern, max_size=2).map(tuple)
    if key == "optimizer.milestones":
        duration = st.sampled_from(["0 steps", "3 steps", "1 epochs", "100%"])
        return st.lists(duration, max_size=3).map(tuple)
    if key == "data.canvases":
        side = st.sampled_from([1, 2, 3, 5, 16, 31, 64, 100])
        return st.lists(st.tuples(side, side), min_size=1, max_size=3).map(tuple)
    if key == "model.remat":
        return st.lists(st.sampled_from(["backbone", "encoder", "decoder"]), max_size=4).map(tuple)
    if isinstance(default, tuple):
        return st.lists(st.sampled_from([1, 2, 40, 2**31 - 1]), min_size=1, max_size=3).map(tuple)
    if isinstance(default, int):
        return SMALL_WHOLE.get(key, st.sampled_from([0, 1, 2, 3, 4, 8]))
    if isinstance(default, float):
        return st.sampled_from([0, 0.0, 1e-37, 0.3, 0.5, 0.999, 1, 1.0, 2.5, 1e30])
    if key in CHOICES:
        return st.sampled_from(CHOICES[key])
    return st.sampled_from(
        ["0 steps", "1 steps", "3 steps", "0.1 epochs", "1 epochs", "5%", "100%"]
    )


HUGE = st.sampled_from([1, 3, 1000, 2**31 - 1])
SMALL_WHOLE = {
    "seed": st.sampled_from([0, 2**31, 2**32 - 1]),
    "model.backbone.depth": st.sampled_from([18, 34]),
    "model.encoder_layers": st.integers(0, 2),
    "model.decoder_layers": st.integers(0, 3),
    "model.hidden_dim": st.sampled_from([4, 8, 12, 36]),
    "mesh.data": st.sampled_from([-1, 1]),
    "model.backbone.frozen_stages": st.integers(-1, 4),
    "model.backbone.stages": st.integers(1, 4),
    "dn.groups": st.sampled_from([0, 1, 2, 7, 2**31 - 1]),
    "dn.slots": st.sampled_from([1, 2, 3, 7]),
    "data.eval_short_side": HUGE,
    "data.eval_max_long_side": HUGE,
    "data.augment.max_long_side": HUGE,
    "eval.num_select": st.integers(1, 60),
    "train.accumulate_steps": st.sampled_from([1, 2, 4]),
}
CHOICES = {
    "model.activation": ["prelu", "relu"],
    "model.dtype": ["float32", "bfloat16"],
    "model.backbone.norm": ["frozen_batch_norm", "group_norm"],
    "model.backbone.stem": ["standard", "light"],
    "model.name": ["dn_dab_detr", "detr"],
    "dn.layout": ["packed", "paper"],
    "optimizer.schedule": ["step", "multi_step", "cosine", "flat_cosine"],
}
# Keys of what is read, written or started; they shape no array and no plan.
ELSEWHERE = (
    "data.name",
    "data.dir",
    "data.packed_dir",
    "init.",
    "compile.",
    "data.train",
    "data.val",
)
SHAPING = [key for key in KEYS if not key.startswith(ELSEWHERE)]
SIZES = np.array([[60, 80], [100, 20], [1, 90], [2000, 3000], [64, 64]])


def make_all(config):
    """Makes everything that a run makes of its config before it compiles."""
    validate(config)
    durations = Plan.of(config, 100)
    data = config.data
    common = {"sizes": SIZES, "image_ids": np.arange(len(SIZES)), "canvases": data.canvases}
    with contextlib.suppress(DataError):  # canvases that are too small, named
        plan = TrainPlan(
            seed=config.seed, augment=data.augment, batch_size=2, snap=data.snap, **common
        ).epoch(0)
        canvases = np.array(plan.canvases)[plan.canvas][:, None]
        assert ((plan.geometry.size >= 1) & (plan.geometry.size <= canvases)).all()
    with contextlib.suppress(DataError):
        sides = {"short_side": data.eval_short_side, "max_long_side": data.eval_max_long_side}
        plan_eval(batch_size=config.eval.batch_size, **sides, **common)
    model, mesh = build_model(config.model), make_mesh(config.mesh.data)
    params = abstract_params(model)
    is_trained = trainable(params, config.model, config.train.freeze)
    arguments = (config, params, durations.per_epoch, durations.total, is_trained)
    optimizer, schedule = make_optimizer(*arguments)
    describe(params, config, is_trained)
    rates = jax.eval_shape(schedule, 0)
    assert rates.shape == ()
    state = abstract_state(model, optimizer, config, mesh)
    jax.eval_shape(optimizer.update, state.params, state.opt_state, state.params)
    batch = abstract_batch(config, "train", mesh)
    key = jax.eval_shape(jax.random.key, 0)

    def losses(params, batch, key):
        return compute_losses(params, batch, key, model=model, config=config, mesh=mesh)

    assert jax.eval_shape(losses, state.params, batch, key)[0].shape == ()
    batch = abstract_batch(config, "eval", mesh)
    found = jax.eval_shape(
        lambda params, batch: eval_step(params, batch, model=model, config=config), params, batch
    )
    assert found["scores"].shape == (config.eval.batch_size, config.eval.num_select)


@settings(max_examples=examples(5))
@given(data=st.data())
def test_what_is_valid_can_be_traced(data):
    """Catches missing rules, which lead to errors of JAX or NumPy."""
    config = tiny_config.shared()
    config.train.batch_size = config.eval.batch_size = 4
    config.optimizer.lr_multipliers = ()
    config.train.duration = "200 steps"
    config.model.decoder_layers = 1
    keys = data.draw(st.lists(st.sampled_from(SHAPING), min_size=1, max_size=8, unique=True))
    for key in keys:
        put(config, key, data.draw(small_values(key, get(base_config(), key)), label=key))
    for key in "model.num_classes", "data.max_objects":
        if get(config, key) == 0:  # left to the data
            put(config, key, 3)
    try:
        make_all(config)
    except ConfigError as error:
        one_line(error)


# The command line


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """Parses overrides as a command does; returns the config, or the error line."""
    file = tmp_path / "config.py"
    file.write_text(
        "from dn_detr_jax.config import base_config\ndef get_config():\n    return base_config()\n"
    )

    def run(*overrides):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        argv = ["program", f"--config={file}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            command_line._parse_flags(argv, ())
            validate(values.config)
        except ConfigError as error:
            return str(error)
        except SystemExit as error:
            return str(error.code)
        return values.config

    return run


ARGUMENTS = st.one_of(
    ANYTHING.map(repr),
    WORDS,
    st.sampled_from(
        ["(" * 300, "(" * 100_000, "9" * 5000, "1e999", "((1,2),", "[1", "{}", "()", "="]
    ),
    st.sampled_from(["__import__('os')", "open('x')", "lambda: 1", "1+1", "1_0", "0x10", "\u0661"]),
)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), argument=ARGUMENTS)
@example("data.canvases", "(" * 100_000)
@example("optimizer.lr_multipliers", "((1," * 80)
@example("seed", "9" * 5000)
def test_any_argument_is_taken_or_is_one_line(parse, key, argument):
    argument = argument.replace("\0", "")  # no argument of a process contains it
    with within(20), contextlib.redirect_stderr(io.StringIO()):
        result = parse(f"--config.{key}={argument}")
    if isinstance(result, str):
        assert key in result and "\n" not in result and len(result) < 3000


@pytest.mark.parametrize("key", ["data.canvases", "seed", "optimizer.lr_multipliers", "data.dir"])
def test_no_argument_is_run(parse, tmp_path, key):
    """Catches evaluated code in values of tuples, which are literals of Python."""
    marker = tmp_path / "marker"
    for code in (f"__import__('os').mkdir({str(marker)!r})", f"[open({str(marker)!r}, 'w')]"):
        parse(f"--config.{key}={code}")
        parse(f"--config.{key}=({code}, {code})")
    assert not marker.exists()


def test_no_user_of_that_name():
    with pytest.raises(ConfigError, match=r"config\.data\.dir = '~nobody-x/y'"):
        expand_user("~nobody-x/y", "data.dir")
    assert expand_user("/a", "data.dir").as_posix() == "/a"


def test_a_config_of_another_version_of_json_is_the_same():
    """Catches a rule that refuses lists for tuples, as `read_run_config` reads them."""
    config = copy.deepcopy(base_config())
    config.update(json.loads(json.dumps(config.to_dict())))
    validate(config)
