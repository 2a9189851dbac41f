"""The next process finds compiled programs on disk, and the cache never stops a run."""

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from data import tiny as tiny_config

from dn_detr_jax.evaluation.detect import jit_eval_step, jit_match
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.compile_cache import use_compile_cache
from dn_detr_jax.training.step import abstract_batch

_ROOT = Path(__file__).parents[1]

# The first version of jax that keeps programs which call the host:
# https://github.com/jax-ml/jax/pull/38405
_KEEPS_CALLS = jax.__version_info__ >= (0, 11)

# Runs a program that does not call the host, and two steps of a training, which do. With "moved" as
# second argument, the Python function of the call is at another address and comes after others.
_SCRIPT = """
import hashlib, logging, sys
import jax, jax.numpy as jnp, numpy as np
import tiny
from flax import traverse_util
from dn_detr_jax.matching import host_timer
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.training.compile_cache import compile_and_log, use_compile_cache
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import abstract_state
from dn_detr_jax.training.step import abstract_batch, jit_train_step

logging.basicConfig(level=logging.INFO)
use_compile_cache(sys.argv[1])
if sys.argv[2:] == ["moved"]:
    kept = [bytearray(1000 + i) for i in range(10_000)]
    calls = [lambda x, i=i: x + np.float32(i) for i in range(20)]
    others = [jax.jit(lambda x, f=f: jax.pure_callback(f, x, x)) for f in calls]
    assert [float(other(jnp.float32(0))) for other in others] == list(range(20))

x = jnp.linspace(0.0, 1.0, 64).reshape(8, 8)
pure = jax.jit(lambda x: jnp.sin(x @ x).sum())
print(float(compile_and_log(pure.lower(x), "pure")(x)))

config, mesh = tiny.step(), make_mesh(1)
config.data.canvases = ((32, 32),)
config.model.encoder_layers = 0
config.model.backbone.norm = "group_norm"
config.train.batch_size = 2
model = build_model(config.model)
shapes = abstract_params(model)
is_trained = trainable(shapes, config.model)
optimizer, _ = make_optimizer(config, shapes, 10, 100, is_trained)
mask = traverse_util.unflatten_dict(is_trained, sep="/")
step = jit_train_step(
    model=model, optimizer=optimizer, trainable=mask, config=config, mesh=mesh)
batch = {
    "image": np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3),
    "size": np.int32([[32, 32], [20, 32]]),
    "labels": np.int32([[0, 1, 2], [3, 0, 0]]),
    "boxes": np.linspace(0.2, 0.6, 24, dtype=np.float32).reshape(2, 3, 4),
    "valid": np.array([[True, True, True], [True, False, False]]),
    "image_id": np.arange(2, dtype=np.int32),
}
abstract = abstract_state(model, optimizer, config, mesh)
program = compile_and_log(
    step.lower(abstract, abstract_batch(config, "train", mesh)), "step")
rng = np.random.default_rng(0)
state = jax.tree.map(
    lambda x: jax.device_put(rng.uniform(0, 0.3, x.shape).astype(x.dtype), x.sharding), abstract)
for _ in range(2):
    state, metrics = program(state, put_batch(batch, mesh))
    jax.block_until_ready(metrics)
    assert host_timer.take() > 0  # the call came to this process
    print(metrics.as_dict())
leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
print(hashlib.sha256(b"".join(leaves)).hexdigest())
"""


def _compile(folder, *arguments):
    """Returns the output, and the programs that came from the cache."""
    env = os.environ | {
        "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'tests' / 'data'}",
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"compiled \w+ in [\d.]+ s", done.stderr)) == 2
    return done.stdout, re.findall(r"compiled (\w+) in [\d.]+ s, from the cache", done.stderr)


@pytest.mark.smoke
def test_the_next_process_finds_programs_and_survives_damaged_ones(tmp_path):
    """Catches a cache that is set up too late, a kept program that computes something else, and a
    kept step that calls an outdated address."""
    everything = ["pure", "step"] if _KEEPS_CALLS else ["pure"]
    first, found = _compile(tmp_path)
    assert found == []
    second, found = _compile(tmp_path, "moved")
    assert found == everything and second == first
    entries = [path for path in tmp_path.rglob("*-cache") if path.name.startswith("jit_")]
    assert len(entries) >= len(everything)
    for path in entries:  # as if the process had been killed while writing
        path.write_bytes(path.read_bytes()[:100])
    third, found = _compile(tmp_path)
    assert found == [] and third == first


@pytest.fixture
def no_folder():
    """Takes away the folder that `fast_jit` names for the tests."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_cannot_be_written_is_a_warning(no_folder, caplog, monkeypatch):
    use_compile_cache("/proc/nothing")
    assert jax.config.jax_compilation_cache_dir is None
    assert "not kept: config.compile.cache_dir = '/proc/nothing': " in caplog.text

    def no_such_user(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    use_compile_cache("~/.cache/dn_detr_jax")  # of a container with a user id of its own
    assert jax.config.jax_compilation_cache_dir is None
    assert "home directory" in caplog.text and caplog.text.count("\n") == 2


def test_no_folder_and_one_from_elsewhere(no_folder, tmp_path):
    use_compile_cache("")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    use_compile_cache(str(tmp_path / "ours"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_detections_do_not_call_the_host():
    """Catches a program of the evaluation that JAX 0.10 does not keep."""
    config, mesh = tiny_config.shared(), make_mesh(1)
    model = build_model(config.model)
    batch = abstract_batch(config, "eval", mesh)
    detect = jit_eval_step(model=model, config=config, mesh=mesh)
    lowered = detect.lower(abstract_params(model), batch)
    assert "callback" not in lowered.as_text()
    cost = lowered.out_info["cost"]
    assert cost.shape == (16, config.model.decoder_layers, 8, config.data.max_objects)
    assert "callback" in jit_match(mesh).lower(cost, batch["valid"]).as_text()


def test_matching_apart_is_that_of_the_costs():
    cost = np.array(
        [[[[1.0, 5.0], [2.0, 0.0], [0.5, 3.0]]], [[[1.0, 5.0], [2.0, 0.0], [3.0, 3.0]]]]
    )
    valid = np.array([[True, True], [True, False]])
    found = jit_match(make_mesh(1))(cost.astype(np.float32), valid)
    np.testing.assert_array_equal(found, [[[2, 1]], [[0, -1]]])


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.1), (0.3, 0.3), (0.0, 0.0)])
def test_short_programs_are_kept_unless_the_user_says_from_when(before, after):
    """Catches programs of a start that are compiled anew each time, and a lost setting."""
    name = "jax_persistent_cache_min_compile_time_secs"
    kept = getattr(jax.config, name)
    try:
        jax.config.update(name, before)
        use_compile_cache("")
        assert getattr(jax.config, name) == after
    finally:
        jax.config.update(name, kept)
