"""Training steps that split the batch in time and the optimizer's state over devices.

The steps also skip updates that are not finite.
"""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from dn_detr_jax.training.state import moving_average

# Runs in a separate process: the number of simulated devices is fixed at start-up.
_SCRIPT = """
import json, sys
from pathlib import Path
import jax, numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from dn_detr_jax.config import base_config
from dn_detr_jax.models.registry import build_model, abstract_params, trainable
from dn_detr_jax.sharding import make_mesh, put_batch
from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import (
    TrainState, abstract_state, evaluation_params, init_state, start_from)
from dn_detr_jax.training.step import jit_train_step

folder = Path(sys.argv[1])
config = base_config()
config.data.update(canvases=((32, 48),), max_objects=3)
config.model.update(num_classes=4, hidden_dim=16, num_heads=2, ffn_dim=16, encoder_layers=0,
                    decoder_layers=1, num_queries=6)
config.model.backbone.update(depth=18, width=8, stages=1, norm="group_norm", stem="light",
                             frozen_stages=1)
# An update that does not depend on the sign of gradients that are zero but for rounding.
config.optimizer.update(learning_rate=0.01, eps=1e-2, clip_norm=10.0, step_at="100 steps")
config.train.batch_size, config.dn.contrastive = 8, True
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
model = build_model(config.model)
shapes = abstract_params(model)
is_trained = trainable(shapes, config.model)
mask = traverse_util.unflatten_dict(is_trained, sep="/")
# Nothing is zero or neutral, and no assignment is a tie.
start = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)

def flat(tree):
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}

def train(name, config, mesh):
    optimizer, _ = make_optimizer(config, shapes, 10, 100, is_trained)
    step = jit_train_step(model=model, optimizer=optimizer, trainable=mask, config=config,
                          mesh=mesh)
    state = start_from(init_state(model, optimizer, config, mesh), jax.device_put(start))
    put = put_batch(batch, mesh)
    compiled = step.lower(abstract_state(model, optimizer, config, mesh), put).compile()
    (folder / f"{name}.txt").write_text(compiled.as_text())
    for number in (1, 2):
        state, metrics = compiled(state, put)
        arrays = {f"params/{k}": v for k, v in flat(state.params).items()}
        arrays |= {f"ema/{k}": v for k, v in flat(state.ema or {}).items()}
        arrays |= {f"metric/{k}": v for k, v in metrics.as_dict().items()}
        np.savez(folder / f"{name}_{number}.npz", **arrays)
    return state, compiled

train("plain", config, make_mesh(1))
np.savez(folder / "start.npz", **flat(start))
config.train.update(accumulate_steps=2, ema_decay=0.2)
config.mesh.shard_optimizer, config.on_nonfinite = True, "skip"
mesh = make_mesh(4)
state, compiled = train("split", config, mesh)

def bytes_of(tree, per_device):
    size = lambda x: x.addressable_shards[0].data.nbytes if per_device else x.nbytes
    return sum(map(size, jax.tree.leaves(tree)))

facts = {"bytes": {}, "same_bits": {}}
for name, tree in (("params", state.params), ("rest", (state.opt_state, state.ema))):
    facts["bytes"][name] = [bytes_of(tree, True), bytes_of(tree, False)]
facts["replicated"] = all(
    x.sharding.is_fully_replicated for x in jax.tree.leaves(evaluation_params(state, mesh)))

with Checkpoints(folder / "run", config) as checkpoints:
    checkpoints.save(2, state)

def leaves(state):
    return {jax.tree_util.keystr(k): np.array(v) for k, v in jax.tree.leaves_with_path(state)}

def changed(before, after):
    return [k for k in before if before[k].tobytes() != after[k].tobytes()]

# One box of one device's first part is not finite; then the batch as it was, over the same state.
bad = batch | {"boxes": batch["boxes"].copy()}
bad["boxes"][3, 0, 2] = np.nan
copied = jax.tree.map(jax.numpy.copy, state)
states, flags = [leaves(copied)], []
for step_batch in (bad, batch):
    copied, metrics = compiled(copied, put_batch(step_batch, mesh))
    states.append(leaves(copied))
    flags.append(metrics.as_dict())
facts["bad_step_changed"] = changed(states[0], states[1])
facts["next_step_changed"] = len(changed(states[1], states[2]))
facts["skipped"] = [metrics["skipped"] for metrics in flags]
facts["bad_loss"], facts["bad_costs"] = str(flags[0]["loss"]), flags[0]["nonfinite_costs"]
facts["next_finite"] = bool(np.isfinite(list(flags[1].values())).all())
facts["arrays"] = len(states[0])
for devices, sharded in ((4, True), (2, True), (1, False)):
    config.mesh.shard_optimizer = sharded
    optimizer, _ = make_optimizer(config, shapes, 10, 100, is_trained)
    with Checkpoints(folder / "run", config) as checkpoints:
        target = abstract_state(model, optimizer, config, make_mesh(devices))
        restored, _ = checkpoints.restore(target)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
                        state, restored)
    placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target)
    facts["same_bits"][f"{devices} {sharded}"] = all(jax.tree.leaves((same, placed)))
(folder / "facts.json").write_text(json.dumps(facts))
"""

_FOUR_DEVICES = {"JAX_NUM_CPU_DEVICES": "4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs two steps on one device, and on four with everything split."""
    folder = tmp_path_factory.mktemp("split")
    env = os.environ | _FOUR_DEVICES
    subprocess.run([sys.executable, "-c", _SCRIPT, str(folder)], env=env, check=True)
    return folder


def _arrays(folder, name, prefix=""):
    found = np.load(folder / f"{name}.npz")
    return {k.removeprefix(prefix): found[k] for k in found if k.startswith(prefix)}


@pytest.mark.parametrize("step", [1, 2])
def test_parts_of_a_batch_give_the_update_of_the_whole(folder, step):
    """Catches parts divided by their own counts, other noise, and gradients summed twice.

    The parts have 0 to 6 objects. The second step starts from the first one's moments.
    """
    before = _arrays(folder, "start") if step == 1 else _arrays(folder, "plain_1", "params/")
    want, got = (_arrays(folder, f"{name}_{step}", "params/") for name in ("plain", "split"))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-7, err_msg=name)
        # The backbone is frozen, and softmax ignores the biases of keys.
        if not name.startswith("backbone/") and not re.search("key.*/bias", name):
            assert np.abs(want[name] - before[name]).max() > 1e-5, name


def test_parts_of_a_batch_give_the_metrics_of_the_whole(folder):
    """Catches a metric that is the mean over the parts, or that of the last one."""
    want, got = (_arrays(folder, f"{name}_1", "metric/") for name in ("plain", "split"))
    assert got.pop("skipped") == 0
    assert want.keys() == got.keys()
    assert want["num_objects"] == got["num_objects"] == 12
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-5, err_msg=name)
    assert len({float(value) for value in want.values()}) > 12


def test_moving_average_follows_its_formula(folder):
    """The first update counts nine tenths, the second 1 - 0.2, the decay asked for, not 9 / 11."""
    start = _arrays(folder, "start")
    first, second = (_arrays(folder, f"split_{i}", "params/") for i in (1, 2))
    averages = [_arrays(folder, f"split_{i}", "ema/") for i in (1, 2)]
    for name in start:
        want = 0.1 * start[name] + 0.9 * first[name]
        np.testing.assert_allclose(averages[0][name], want, atol=1e-6)
        share = 1 - 2 / 11
        want = (1 - share) * want + share * second[name]
        np.testing.assert_allclose(averages[1][name], want, atol=1e-6)
        if name.startswith("backbone/"):  # frozen
            np.testing.assert_array_equal(averages[1][name], start[name])


def test_warm_up_of_the_moving_average_against_numpy():
    """Catches a count of updates that is one off, and 1 - exp(-x) that rounds to 0 in float32."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4)).astype(np.float32)
    for decay, tau in (0.9997, 2000), (0.9, 2), (0.99, 10**9):
        average, want = values[0], values[0].astype(np.float64)
        for t, value in enumerate(values[1:], start=1):
            step = np.int32(t - 1)
            average = moving_average(average, value, step, decay, tau)
            d = decay * -math.expm1(-t / tau)
            want = d * want + (1 - d) * value
        np.testing.assert_allclose(average, want, rtol=1e-6)


def test_each_device_holds_its_part(folder):
    facts = json.loads((folder / "facts.json").read_text())
    mine, all_of_it = facts["bytes"]["rest"]
    assert 0.25 * all_of_it <= mine < 0.3 * all_of_it  # arrays of 2 or 6 numbers stay whole
    assert facts["bytes"]["params"][0] == facts["bytes"]["params"][1]
    assert facts["replicated"]


def test_a_checkpoint_is_restored_on_other_numbers_of_devices(folder):
    """Checks equality bit by bit, with and without a split state."""
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["same_bits"] == {"4 True": True, "2 True": True, "1 False": True}


def test_a_step_that_is_not_finite_changes_the_count_of_steps_alone(folder):
    """Catches a skipped update that moves a moment, its count or the average, on any device."""
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["bad_loss"] == "nan" and facts["bad_costs"] == 6  # of 6 queries with one object
    assert facts["bad_step_changed"] == [".step"]
    assert facts["skipped"] == [1, 0]
    # The state is intact: the next update changes everything but the frozen backbone.
    assert facts["next_finite"]
    assert facts["next_step_changed"] > facts["arrays"] / 2


def _computations(program):
    """Returns the text of each computation of a compiled program, by name."""
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", program)
    return {re.match(r"(?:ENTRY )?%([\w.-]+)", part)[1]: part for part in parts[1:]}


def test_gradients_are_summed_once_not_in_every_part(folder):
    """Catches an all-reduce in the loop over parts, which costs as much as another step's."""
    computations = _computations((folder / "split.txt").read_text())
    bodies = set(re.findall(r"body=%([\w.-]+)", "".join(computations.values())))
    assert bodies
    reached, new = set(), bodies
    while new:
        reached |= new
        named = {n for body in new for n in re.findall(r"%([\w.-]+)", computations[body])}
        new = (named & computations.keys()) - reached
    collective = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
    assert not any(re.search(collective, computations[name]) for name in reached)
    kinds = set(re.findall(collective, "".join(computations.values())))
    assert kinds <= {"all-reduce", "all-gather", "reduce-scatter"}
