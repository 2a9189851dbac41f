"""The sharded step is one program on any number of devices, and gathers nothing of the batch."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dn_detr_jax.preflight.hlo import parse_collectives, total_bytes

# Runs in a separate process: the number of simulated devices is fixed at start-up. Writes losses
# and gradients of 1 and of 8 devices, and the programs for 8 devices with 6 and with 10 queries.
_SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
import tiny
from flax import traverse_util
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh, over_data, put_batch, replicated
from dn_detr_jax.training import step as steps

folder = Path(sys.argv[1])
config = tiny.step()
config.model.decoder_layers = 2
config.model.backbone.update(norm="group_norm", frozen_stages=-1)
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

def lower(config, mesh):
    model = build_model(config.model)
    def losses(params, batch):
        key = jax.random.fold_in(jax.random.key(0), 7)
        return steps.compute_losses(params, batch, key, model=model, config=config, mesh=mesh)
    jitted = jax.jit(jax.value_and_grad(losses, has_aux=True),
                     in_shardings=(replicated(mesh), over_data(mesh)),
                     out_shardings=replicated(mesh))
    shapes = steps.abstract_batch(config, "train", mesh)
    return jitted.lower(abstract_params(model), shapes)

init = jax.jit(build_model(config.model).init)
params = init(jax.random.key(0), np.zeros((1, 32, 48, 3)), np.array([[32, 48]]))["params"]
params = jax.tree.map(np.array, params)
# Boxes and classes that differ between queries, so that no assignment is a tie.
params["box_head"]["layer2"]["kernel"] += rng.normal(0, 0.3, (16, 4))
params["class_head"]["kernel"] *= 3
for devices in (1, 8):
    mesh = make_mesh(devices)
    program = lower(config, mesh).compile()
    on_devices = jax.device_put(params, replicated(mesh))
    (loss, terms), grads = program(on_devices, put_batch(batch, mesh))
    np.savez(folder / f"{devices}.npz", loss=loss,
             **{"term/" + k: v for k, v in terms.items()},
             **{"grad/" + k: v for k, v in traverse_util.flatten_dict(grads, sep="/").items()})
(folder / "6.txt").write_text(program.as_text())
config.model.num_queries = 10
(folder / "10.txt").write_text(lower(config, mesh).compile().as_text())
"""

_ROOT = Path(__file__).parents[1]
_EIGHT_DEVICES = {
    "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'tests' / 'data'}",
    "JAX_NUM_CPU_DEVICES": "8",
}


class Runs(NamedTuple):
    """Losses and gradients by number of devices; programs for 8 devices by number of queries."""

    arrays: dict[int, dict[str, np.ndarray]]
    programs: dict[int, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the results of the same step on 1 and on 8 devices."""
    folder = tmp_path_factory.mktemp("devices")
    env = os.environ | _EIGHT_DEVICES
    subprocess.run([sys.executable, "-c", _SCRIPT, str(folder)], env=env, check=True)
    return Runs(
        {devices: dict(np.load(folder / f"{devices}.npz")) for devices in (1, 8)},
        {queries: (folder / f"{queries}.txt").read_text() for queries in (6, 10)},
    )


def test_eight_devices_give_the_loss_and_the_gradients_of_one(runs):
    """Catches losses normalized per device, and noise that depends on the devices."""
    one, eight = runs.arrays[1], runs.arrays[8]
    assert one.keys() == eight.keys()
    assert one["term/num_objects"] == 12
    for name in one:
        scale = np.abs(one[name]).max()
        if ("key_" in name and name.endswith("bias")) or name.endswith("/key/bias"):
            scale = 1.0  # softmax ignores these biases: only rounding is left
        np.testing.assert_allclose(
            eight[name], one[name], rtol=1e-5, atol=1e-5 * max(scale, 1e-3), err_msg=name
        )


def test_the_gradients_are_not_zero(runs):
    """Catches a comparison of zeros in the test above."""
    one = runs.arrays[1]
    norms = {name: np.linalg.norm(g) for name, g in one.items() if name.startswith("grad/")}
    assert sum(norm > 1e-6 for norm in norms.values()) > 0.8 * len(norms)


def test_collectives_sum_gradients_and_scalars_and_nothing_else(runs):
    """Catches the gather of the cost tensor that a callback outside `shard_map` brings."""
    arrays, program = runs.arrays[8], runs.programs[6]
    assert "callback" in program
    assert "maximal device" not in program
    collectives = parse_collectives(program, num_devices=8)
    assert {c.kind for c in collectives} == {"all-reduce"}
    gradients = [g for name, g in arrays.items() if name.startswith("grad/")]
    largest = max(g.nbytes for g in gradients)
    # Each gradient once, scalars, and some gradients as parts before they are joined.
    assert max(c.bytes / len(c.shapes) for c in collectives) <= largest
    size, needed = total_bytes(collectives), sum(g.nbytes for g in gradients)
    assert needed <= size <= 1.25 * needed, (size, needed)
    # The matching costs of a device are [1, 2, 3, 6] before the host reads them.
    assert "f32[1,2,3,6]" in program
    assert not re.search(WHOLE_COSTS, program)


# The costs of all devices in one array, as [B, L, N, M], [B, L, M, N] or flat.
WHOLE_COSTS = r"f32\[(8,2,6,3|8,2,3,6|288)\]"


def test_nothing_but_gradients_grows_with_the_number_of_queries(runs):
    """Catches predictions, costs or assignments that are sent between devices."""
    few, many = (
        total_bytes(parse_collectives(runs.programs[queries], num_devices=8)) for queries in (6, 10)
    )
    # The anchors' is [N, 4]. That of the queries' one content is summed over the devices before
    # it is summed over the queries, [N, 16]. The images would come on top, eight of them.
    assert 0 < many - few <= 4 * (10 - 6) * (4 + 16)


def test_the_check_sees_a_gathered_cost_tensor(tmp_path):
    """The counter-example: a plain callback in a sharded program does move the cost tensor."""
    script = """
import re, sys
import jax, numpy as np
from dn_detr_jax import matching
from dn_detr_jax.sharding import make_mesh, over_data
mesh = make_mesh(8)
cost = jax.ShapeDtypeStruct((8, 2, 6, 3), np.float32, sharding=over_data(mesh))
valid = jax.ShapeDtypeStruct((8, 3), np.bool_, sharding=over_data(mesh))
for given in (None, mesh):
    jitted = jax.jit(lambda c, v: matching.assign(c, v, given), out_shardings=over_data(mesh))
    text = jitted.lower(cost, valid).compile().as_text()
    print("gathered" if re.search(sys.argv[1], text) else "local")
"""
    env = os.environ | _EIGHT_DEVICES
    done = subprocess.run(
        [sys.executable, "-c", script, WHOLE_COSTS],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["gathered", "local"]
