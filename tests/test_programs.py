"""Programs of a run: traced and compiled once each, when they are needed, and not before."""

import dataclasses
import threading
from types import SimpleNamespace

import fast_jit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import tiny
from flax import linen as nn

from dn_detr_jax.models.initialization import initializer
from dn_detr_jax.models.registry import abstract_params
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training import step as step_module
from dn_detr_jax.training.programs import Programs
from dn_detr_jax.training.setup import Setup
from dn_detr_jax.training.state import abstract_state, init_state
from dn_detr_jax.training.step import jit_train_step

A, B, C = (32, 48), (48, 32), (48, 48)


class _Counted(nn.Module):
    """A detector of one layer that counts how often it is traced."""

    calls = 0

    @nn.compact
    def __call__(self, images, sizes):
        type(self).calls += 1
        features = nn.Conv(4, (3, 3), kernel_init=nn.initializers.truncated_normal(0.5))(images)
        return nn.Dense(2, name="head")(features.mean((1, 2)) * sizes[:, :1])


@pytest.fixture
def config():
    config = tiny.step()
    config.data.canvases = (A, B, C)
    config.train.batch_size = config.eval.batch_size = 1
    config.compile.options = fast_jit.CONFIG
    return config


class _Compiler:
    """Stands in for a jitted function: records what is compiled, each canvas when it is let."""

    def __init__(self):
        self.started, self.allowed = [], {A: threading.Event(), B: threading.Event()}
        self.allowed[C] = self.allowed[B]

    def lower(self, _, batch):
        canvas = batch["image"].shape[1:3]

        def compile(options):
            self.started.append(canvas)
            assert self.allowed[canvas].wait(60)
            if canvas == C:
                raise RuntimeError("out of memory")
            return canvas

        return SimpleNamespace(compile=compile)


@pytest.fixture
def compiler():
    compiler = _Compiler()
    yield compiler
    for event in compiler.allowed.values():
        event.set()


@pytest.fixture
def setup(config, compiler):
    """Of a run whose validation images are all as large as B."""
    images = SimpleNamespace(sizes=np.array([B, B]), image_ids=np.array([1, 2]))
    config.data.update(eval_short_side=32, eval_max_long_side=48)
    return Setup(config, make_mesh(1), _Counted(), (), images, compiler)


def test_the_first_canvas_is_compiled_alone_and_waits_for_no_other(setup, compiler):
    """Catches a training that waits for canvases that it does not need yet, and a lost error."""
    programs = Programs(setup, compiler, state=())
    programs.compile_ahead([A, B, C])
    assert not programs.is_ready(A)
    compiler.allowed[A].set()
    assert programs.train_step(A) == A and programs.is_ready(A)
    assert compiler.started == [A]
    programs.compile_others()
    programs.compile_others()
    assert not programs.is_ready(B)
    compiler.allowed[B].set()
    assert programs.train_step(B) == B
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.train_step(C)
    assert programs.train_step(A) == A
    programs.finish([A, B])
    assert sorted(compiler.started) == sorted([A, B, C, B])  # the last is the detection's


def test_closed_programs_start_no_other(setup, compiler, caplog):
    """Catches a stopped run that compiles on, and lines after the last one of the command.

    What a caller still needs is compiled for it.
    """
    caplog.set_level("INFO")
    programs = Programs(setup, compiler, state=())
    programs.compile_ahead([A, B])
    programs.close()
    for event in compiler.allowed.values():
        event.set()
    assert programs.train_step(A) == A
    programs.compile_others()
    assert compiler.started == [A]
    assert programs.train_step(B) == B
    assert "compiled" not in caplog.text


def test_without_validation_only_training_steps_are_compiled(setup, compiler):
    """Catches a run without evaluation that waits for a detection."""
    for event in compiler.allowed.values():
        event.set()
    programs = Programs(dataclasses.replace(setup, validation=None), compiler, state=())
    programs.compile_ahead([A, B])
    programs.finish([A, B])
    assert compiler.started == [A, B]
    programs.close()


def test_an_accelerator_compiles_what_is_asked_for(setup, compiler):
    """Catches kernels that are timed while the training steps."""
    programs = Programs(setup, compiler, state=())
    programs._on_cpu = False
    for event in compiler.allowed.values():
        event.set()
    programs.compile_ahead([A, B])
    assert programs.train_step(B) == B
    assert compiler.started == [B]


def test_the_step_is_traced_once_for_each_canvas(setup, config, monkeypatch):
    """Catches a trace for the names of the metrics, or for shapes, which costs seconds each."""
    traced = []

    def train_step(state, batch, **_):
        traced.append(batch["image"].shape[1:3])
        metrics = {"loss": jnp.mean(batch["boxes"]), "a": jnp.sum(batch["valid"])}
        return state.replace(step=state.step + 1), metrics

    monkeypatch.setattr(step_module, "train_step", train_step)
    optimizer = optax.adam(1e-3)
    settings = {"model": setup.model, "optimizer": optimizer, "config": config, "mesh": setup.mesh}
    function = jit_train_step(**settings, trainable=None)
    programs = Programs(setup, function, abstract_state(**settings))
    state = init_state(**settings)
    for canvas in (A, B, A):
        batch = step_module.abstract_batch(config, "train", setup.mesh, canvas)
        state, metrics = programs.train_step(canvas)(
            state, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batch)
        )
    assert traced == [A, B]
    assert metrics.names == ("a", "loss")
    assert metrics.as_dict() == {"a": config.data.max_objects, "loss": 1.0}
    assert int(state.step) == 3


def test_parameters_are_traced_once_and_those_of_the_module(config):
    """Catches a trace for each use of the shapes, and initial values of another stream."""
    initializer.cache_clear()  # other tests have traced it
    _Counted.calls = 0
    model, mesh, optimizer = _Counted(), make_mesh(1), optax.adam(1e-3)
    config.train.ema_decay, config.seed = 0.5, 3
    shapes = abstract_params(model)
    assert abstract_params(_Counted()) == shapes and initializer(model) is initializer(_Counted())
    abstract_state(model, optimizer, config, mesh)
    state = init_state(model, optimizer, config, mesh)
    assert _Counted.calls == 1
    images, sizes = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)
    expected = fast_jit.fast_jit(model.init)(jax.random.key(3), images, sizes)["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.ema, expected)
    assert np.std(state.params["head"]["kernel"]) > 0.1
