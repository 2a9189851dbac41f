"""Compiled programs on disk: found by the next process, and never in the way of a run."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_detector import tiny_config

from dn_detr_jax.evaluation.detect import jit_eval_step, jit_match
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.compile_cache import use_compile_cache
from dn_detr_jax.training.step import abstract_batch

_SCRIPT = """
import logging, sys
import jax, jax.numpy as jnp
from dn_detr_jax.training.compile_cache import compile_and_log, use_compile_cache
logging.basicConfig(level=logging.INFO)
use_compile_cache(sys.argv[1])
def pure(x):
    return jnp.sin(x @ x).sum()
def calling(x):
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((), x.dtype), pure(x))
x = jnp.linspace(0.0, 1.0, 64).reshape(8, 8)
for function in (pure, calling):
    program = compile_and_log(jax.jit(function).lower(x), function.__name__)
    print(function.__name__, float(program(x)))
"""


def _compile(folder):
    """What was printed, and which programs came from the cache."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"compiled \w+ in [\d.]+ s", done.stderr)) == 2
    return done, re.findall(r"compiled (\w+) in [\d.]+ s, from the cache", done.stderr)


def test_the_next_process_finds_programs_and_survives_damaged_ones(tmp_path):
    """Catches a cache that is set up too late, and a kept program that computes something else."""
    first, found = _compile(tmp_path)
    assert found == []
    entries = [path for path in tmp_path.rglob("*-cache") if path.name.startswith("jit_")]
    assert any(path.name.startswith("jit_pure") for path in entries)
    assert not any(path.name.startswith("jit_calling") for path in entries)
    second, found = _compile(tmp_path)
    assert found == ["pure"] and second.stdout == first.stdout
    for path in entries:  # as if the process had been killed while writing
        path.write_bytes(path.read_bytes()[:100])
    third, found = _compile(tmp_path)
    assert found == [] and third.stdout == first.stdout


@pytest.fixture
def cache_allowed():
    """The tests run without a cache, see conftest."""
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", before[0])
    jax.config.update("jax_compilation_cache_dir", before[1])


def test_a_folder_that_cannot_be_written_is_a_warning(cache_allowed, caplog):
    use_compile_cache("/proc/nothing")
    assert jax.config.jax_compilation_cache_dir is None
    assert "config.compile.cache_dir = '/proc/nothing'" in caplog.text
    assert caplog.text.count("\n") == 1


def test_no_folder_and_one_from_elsewhere(cache_allowed, tmp_path):
    use_compile_cache("")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    use_compile_cache(str(tmp_path / "ours"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_detections_do_not_call_the_host():
    """Catches a program of the evaluation that JAX would not keep."""
    config, mesh = tiny_config(), make_mesh(1)
    model = build_model(config.model)
    batch = abstract_batch(config, "eval", mesh)
    detect = jit_eval_step(model=model, config=config, mesh=mesh)
    lowered = detect.lower(abstract_params(model), batch)
    assert "callback" not in lowered.as_text()
    cost = lowered.out_info["cost"]
    assert cost.shape == (16, 1, 8, config.data.max_objects)
    assert "callback" in jit_match(mesh).lower(cost, batch["valid"]).as_text()


def test_matching_apart_is_that_of_the_costs():
    cost = np.array(
        [[[[1.0, 5.0], [2.0, 0.0], [0.5, 3.0]]], [[[1.0, 5.0], [2.0, 0.0], [3.0, 3.0]]]]
    )
    valid = np.array([[True, True], [True, False]])
    found = jit_match(make_mesh(1))(cost.astype(np.float32), valid)
    np.testing.assert_array_equal(found, [[2, 1], [0, -1]])
