"""Deformable sampling against plain sums over all pixels, in the form of every platform."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import XLA_FLAGS, fast_jit

from dn_detr_jax.config import base_config
from dn_detr_jax.models import deformable
from dn_detr_jax.models.build import layer_config
from dn_detr_jax.models.deformable import sample_levels

SHAPES = ((3, 5), (2, 2), (1, 4))
BATCH, QUERIES, HEADS, FEATURES, POINTS = 4, 5, 2, 3, 2
TOKENS = sum(height * width for height, width in SHAPES)
sample = fast_jit(sample_levels, static_argnums=1)


def inputs(seed=0, queries=QUERIES):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(BATCH, TOKENS, HEADS, FEATURES)).astype(np.float32)
    shape = (BATCH, queries, HEADS, len(SHAPES), POINTS)
    locations = rng.uniform(-0.3, 1.3, (*shape, 2)).astype(np.float32)
    return value, locations, rng.normal(size=shape).astype(np.float32)


def read(level, x, y):
    """Bilinear value of a map [h, w, d] at x, y in [0, 1], zeros around it."""
    height, width = level.shape[:2]
    column, row = float(x) * width - 0.5, float(y) * height - 0.5
    total = np.zeros(level.shape[2])
    for i, j in np.ndindex(height, width):
        share = max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
        total += share * level[i, j].astype(np.float64)
    return total


def pass_and_gradients(value, locations, weights, cotangent, sample=sample_levels):
    out, pull = jax.vjp(lambda *a: sample(a[0], SHAPES, *a[1:]), value, locations, weights)
    return out, *pull(cotangent)


def hats_and_slopes(locations, size):
    """Shares of all pixels of a row or column in samples at the locations, and derivatives."""
    distance = locations[..., None].astype(np.float64) * size - 0.5 - np.arange(size)
    slopes = np.where(np.abs(distance) < 1, -np.sign(distance) * size, 0.0)
    return np.maximum(0.0, 1 - np.abs(distance)), slopes


def plain_pass_and_gradients(value, locations, weights, cotangent):
    """The same as `pass_and_gradients` in float64: every sample is a sum over all pixels."""
    cotangent = cotangent.reshape(*cotangent.shape[:2], HEADS, -1).astype(np.float64)
    out, of_value, of_locations, of_weights = 0.0, [], [], []
    starts = np.cumsum([height * width for height, width in SHAPES])[:-1]
    for k, level in enumerate(np.split(value.astype(np.float64), starts, axis=1)):
        level = level.reshape(len(level), *SHAPES[k], *level.shape[2:])
        w = weights[..., k, :].astype(np.float64)
        x, along_x = hats_and_slopes(locations[..., k, :, 0], SHAPES[k][1])
        y, along_y = hats_and_slopes(locations[..., k, :, 1], SHAPES[k][0])
        out = out + np.einsum("bqhpi,bqhpj,bqhp,bijhd->bqhd", y, x, w, level)
        back = np.einsum("bqhpi,bqhpj,bqhp,bqhd->bijhd", y, x, w, cotangent)
        of_value.append(back.reshape(len(back), -1, *back.shape[3:]))
        dots = np.einsum("bijhd,bqhd->bqhij", level, cotangent)
        of_weights.append(np.einsum("bqhpi,bqhpj,bqhij->bqhp", y, x, dots))
        by_x = np.einsum("bqhpi,bqhpj,bqhij->bqhp", y, along_x, dots) * w
        by_y = np.einsum("bqhpi,bqhpj,bqhij->bqhp", along_y, x, dots) * w
        of_locations.append(np.stack([by_x, by_y], -1))
    stacked = [np.stack(gradients, 3) for gradients in (of_locations, of_weights)]
    return out.reshape(*out.shape[:2], -1), np.concatenate(of_value, 1), *stacked


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "default"])
def test_values_and_gradients_in_the_form_of_each_platform(platform, most, monkeypatch):
    """Catches wrong gradients at borders and outside, patches put together wrongly, and parts.

    Five queries in parts of at most two leave a part that is not full.
    """
    form = deformable._FORMS[platform]._replace(forward=most, backward=most)
    monkeypatch.setitem(deformable._FORMS, "cpu", form)
    arguments = inputs()
    cotangent = np.random.default_rng(1).normal(size=(BATCH, QUERIES, HEADS * FEATURES))
    arguments = *arguments, cotangent.astype(np.float32)
    got = fast_jit(lambda *a: pass_and_gradients(*a))(*arguments)
    for ours, plain in zip(got, plain_pass_and_gradients(*arguments), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6 * np.abs(plain).max())


def test_a_gpu_samples_in_parts_if_the_config_says_so():
    """Catches a `model.sampling_part` that gets lost between the config and the backward pass."""

    def loops(most):
        config = base_config("dn_deformable_detr").model
        config.sampling_part = most
        part = layer_config(config, "xla", "relu").sampling_part
        sample = functools.partial(sample_levels, part=part)
        trace = jax.jit(functools.partial(pass_and_gradients, sample=sample)).trace
        cotangent = np.ones((BATCH, QUERIES, HEADS * FEATURES), np.float32)
        lowered = trace(*inputs(), cotangent).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("stablehlo.while")

    assert (loops(0), loops(QUERIES), loops(QUERIES - 1)) == (0, 0, 1)


@pytest.fixture(scope="module")
def gradients():
    return fast_jit(pass_and_gradients)


def test_bfloat16_gradients_of_values_are_summed_in_float32(gradients):
    """Catches sums in bfloat16, which lose 1% where many samples meet in a pixel."""
    rng = np.random.default_rng(2)
    value, locations, weights = inputs(queries=300)
    value, cotangent = (
        jnp.asarray(x, jnp.bfloat16)
        for x in (value, rng.normal(size=(BATCH, 300, HEADS * FEATURES)))
    )
    got = gradients(value, locations, np.abs(weights), cotangent)[1]
    assert got.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float32) for x in (value, cotangent)]
    want = gradients(exact[0], locations, np.abs(weights), exact[1])[1]
    error = np.asarray(got, np.float32) - want
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 3e-3


def test_locations_that_are_not_finite_have_no_part(gradients):
    """Catches NaN in gradients, and reads outside of the table."""
    value, locations, weights = inputs()
    cotangent = np.ones((BATCH, QUERIES, HEADS * FEATURES), np.float32)
    locations[:, 0] = np.array([np.nan, np.inf, -np.inf, 1e30]).reshape(4, 1, 1, 1, 1)
    out, *found = gradients(value, locations, weights, cotangent)
    assert not np.any(out[:, 0])
    assert all(np.isfinite(x).all() for x in found)
    assert not np.any(found[1][:, 0]) and not np.any(found[2][:, 0])


def test_samples_equal_a_plain_loop():
    """Catches x and y or levels mixed up, pixel corners for centers, and wrapping at the border."""
    value, locations, weights = inputs()
    got = sample(value, SHAPES, locations, weights)
    want = np.zeros((BATCH, QUERIES, HEADS, FEATURES))
    starts = np.cumsum([0, *(height * width for height, width in SHAPES)])
    for b, q, h, k, p in np.ndindex(*weights.shape):
        level = value[b, starts[k] : starts[k + 1], h].reshape(*SHAPES[k], FEATURES)
        want[b, q, h] += weights[b, q, h, k, p] * read(level, *locations[b, q, h, k, p])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.reshape(BATCH, QUERIES, -1), atol=1e-5)


def test_far_outside_is_zero_whatever_the_values():
    """Catches numbers of pixels that overflow, and 0 * inf."""
    value, locations, weights = inputs()
    locations = np.where(locations < 0.5, np.float32(-1e12), np.float32(1e12))
    assert not np.any(sample(value, SHAPES, locations, weights))


def test_tokens_that_do_not_fit_the_levels():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match=r"22 tokens, but levels of .* pixels have 23"):
        sample_levels(value[:, 1:], SHAPES, locations, weights)


# Runs in a separate process: the number of simulated devices is fixed at start-up.
_SHARDED = """
import functools
import json
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import test_deformable as test
from dn_detr_jax.preflight.hlo import parse_collectives
from dn_detr_jax.sharding import make_mesh, over_data

rng, mesh = np.random.default_rng(1), make_mesh()
cotangent = rng.normal(size=(test.BATCH, 70, test.HEADS * test.FEATURES)).astype(np.float32)
arguments = *test.inputs(queries=70), cotangent
plain = test.plain_pass_and_gradients(*arguments)
split = [jax.device_put(x, over_data(mesh)) for x in arguments]

def of_device(*arguments):
    rematerialized = jax.checkpoint(test.sample_levels, static_argnums=1)
    return test.pass_and_gradients(*arguments, sample=rematerialized)

mapped = jax.shard_map(of_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
answer = {}
for name, function in {"jit": test.pass_and_gradients, "shard_map": mapped}.items():
    compiled = jax.jit(function).lower(*split).compile()
    collectives = parse_collectives(compiled.as_text(), 4)
    got = compiled(*split)
    answer[name] = {
        "collectives": [c.kind for c in collectives],
        "split": all(x.sharding.shard_shape(x.shape)[0] == test.BATCH // 4 for x in got),
        "error": max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(got, plain)),
    }
print(json.dumps(answer))
"""


def test_a_batch_that_is_split_over_devices_needs_no_collective():
    """Catches row numbers that count over images, and a carry that shard_map does not take."""
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"
    here = os.path.dirname(__file__)
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{here}{os.pathsep}{here}/.."}
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for program, found in json.loads(done.stdout).items():
        assert found["collectives"] == [], program
        assert found["split"], program
        assert found["error"] < 1e-6, program
