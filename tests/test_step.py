"""The sharded step: one program on any number of devices, and nothing of the batch in one place."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

# Runs in a process of its own: the number of simulated devices is fixed at start-up.
_SCRIPT = """
import json, sys
import jax, numpy as np
from flax import traverse_util
from dn_detr_jax.config import base_config
from dn_detr_jax.models.registry import build_model
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.training import step as steps

config = base_config()
config.data.update(canvases=((32, 48),), max_objects=3)
config.model.update(num_classes=4, hidden_dim=16, num_heads=2, ffn_dim=16, encoder_layers=1,
                    decoder_layers=2, num_queries=6)
config.model.backbone.update(depth=18, width=8, stages=1, norm="group_norm", stem="light",
                             frozen_stages=-1)
config.train.batch_size = 8
rng = np.random.default_rng(0)
counts = np.array([0, 1, 2, 3, 3, 0, 1, 2])
batch = {
    "image": rng.integers(0, 256, (8, 32, 48, 3), dtype=np.uint8),
    "size": np.array([[32, 48], [20, 48], [32, 30], [24, 24]] * 2, np.int32),
    "labels": rng.integers(0, 4, (8, 3)).astype(np.int32),
    "boxes": rng.uniform(0.2, 0.6, (8, 3, 4)).astype(np.float32),
    "valid": np.arange(3) < counts[:, None],
    "image_id": np.arange(8, dtype=np.int32),
}
mesh, model = make_mesh(int(sys.argv[1])), build_model(config.model)
params = model.init(jax.random.key(0), np.zeros((1, 32, 48, 3)), np.array([[32, 48]]))["params"]
# Boxes and classes that differ between queries, so that no assignment is a tie.
params["box_head"]["layer2"]["kernel"] += rng.normal(0, 0.3, (16, 4))
params["class_head"]["kernel"] *= 3

def losses(params, batch):
    key = jax.random.fold_in(jax.random.key(0), 7)
    return steps.compute_losses(params, batch, key, model=model, config=config, mesh=mesh)

from dn_detr_jax.sharding import over_data, replicated
jitted = jax.jit(jax.value_and_grad(losses, has_aux=True),
                 in_shardings=(replicated(mesh), over_data(mesh)), out_shardings=replicated(mesh))
compiled = jitted.lower(params, put_batch(batch, mesh)).compile()
(loss, terms), grads = compiled(params, put_batch(batch, mesh))
np.savez(sys.argv[2], loss=loss, **{"term/" + k: v for k, v in terms.items()},
         **{"grad/" + k: v for k, v in traverse_util.flatten_dict(grads, sep="/").items()})
open(sys.argv[3], "w").write(compiled.as_text())
"""

_DEVICES = (1, 8)
# Eight devices; and compile quickly.
_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Losses, gradients and compiled program of the same step on 1 and on 8 devices."""
    folder = tmp_path_factory.mktemp("devices")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _FLAGS,
    }
    found = {}
    for devices in _DEVICES:
        arrays, program = folder / f"{devices}.npz", folder / f"{devices}.txt"
        arguments = [sys.executable, "-c", _SCRIPT, str(devices), str(arrays), str(program)]
        subprocess.run(arguments, env=env, check=True)
        found[devices] = dict(np.load(arrays)), program.read_text()
    return found


def test_eight_devices_give_the_loss_and_the_gradients_of_one(runs):
    """Catches losses normalised per device, and noise that depends on the devices."""
    (one, _), (eight, _) = (runs[n] for n in _DEVICES)
    assert one.keys() == eight.keys()
    assert one["term/num_objects"] == 12
    for name in one:
        scale = np.abs(one[name]).max()
        if ("key_" in name and name.endswith("bias")) or name.endswith("/key/bias"):
            scale = 1.0  # softmax does not see these biases: what is left is rounding
        np.testing.assert_allclose(
            eight[name], one[name], rtol=1e-5, atol=1e-5 * max(scale, 1e-3), err_msg=name
        )


def test_the_gradients_are_not_zero(runs):
    """So that the comparison above compares something."""
    one = runs[1][0]
    norms = {name: np.linalg.norm(g) for name, g in one.items() if name.startswith("grad/")}
    assert sum(norm > 1e-6 for norm in norms.values()) > 0.8 * len(norms)


def test_collectives_sum_gradients_and_scalars_and_nothing_else(runs):
    """Catches the gather of the cost tensor that a callback outside `shard_map` brings."""
    program = runs[8][1]
    assert "callback" in program
    assert "maximal device" not in program
    collectives = re.findall(r" = (.*?) (all-[a-z-]+|collective-[a-z-]+|reduce-scatter)\(", program)
    assert {kind for _, kind in collectives} <= {"all-reduce", "all-reduce-start"}
    parameters = {shape for name, shape in _shapes(runs[8][0]) if name.startswith("grad/")}
    summed = set(re.findall(r"[a-z]+\d+\[([\d,]*)\]", " ".join(kind[0] for kind in collectives)))
    unknown = {s for s in summed if s and s not in parameters}
    # What is left are parts of gradients, before they are put together: of the heads' size at most.
    assert all(np.prod([int(n) for n in s.split(",")]) <= 16 * 16 * 9 for s in unknown), unknown
    # The matching costs of a device are [1, 2, 6, 3]; gathered they would be [8, 2, 6, 3].
    assert "f32[8,2,6,3]" not in program


def _shapes(arrays):
    return [(name, ",".join(map(str, array.shape))) for name, array in arrays.items()]


def test_the_check_sees_a_gathered_cost_tensor(tmp_path):
    """The counter-example: a plain callback in a sharded program does move the cost tensor."""
    script = """
import jax, numpy as np
from dn_detr_jax import matching
from dn_detr_jax.sharding import make_mesh, over_data
mesh = make_mesh(8)
cost = jax.ShapeDtypeStruct((8, 2, 6, 3), np.float32, sharding=over_data(mesh))
valid = jax.ShapeDtypeStruct((8, 3), np.bool_, sharding=over_data(mesh))
for given in (None, mesh):
    jitted = jax.jit(lambda c, v: matching.assign(c, v, given), out_shardings=over_data(mesh))
    text = jitted.lower(cost, valid).compile().as_text()
    print("gathered" if "f32[8,2,6,3]" in text else "local")
"""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _FLAGS,
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["gathered", "local"]
