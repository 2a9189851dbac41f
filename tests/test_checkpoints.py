"""Checkpoints are bit-exact and atomic, and every failure is one line with path and cause."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dn_detr_jax.checkpoints import lock
from dn_detr_jax.checkpoints.categories import match_labels, matched_categories
from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_config
from dn_detr_jax.config import base_config
from dn_detr_jax.data.coco_classes import Category, assumed_categories
from dn_detr_jax.errors import CheckpointError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any


class Nothing(NamedTuple):
    """A part of an optimizer's state without arrays."""


def make_state(seed=0, width=5):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "backbone": {"kernel": jax.random.normal(keys[0], (3, width))},
        "head": {"bias": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16)},
        "scale": jnp.float32(np.nan),  # bits, not values
    }
    mask = {"backbone": {"kernel": True}, "head": {"bias": False}, "scale": True}
    opt_state = optax.masked(optax.adam(1e-3), mask).init(params)
    return State(jnp.int32(seed), params, (Nothing(), opt_state))


CATEGORIES = (Category(3, "three"), Category(7, "seven"))
HOST_STATE = {
    "epoch": 3,
    "best": 0.1 + 0.2,
    "name": "ä",
    "assignments": np.arange(12, dtype=np.int32).reshape(3, 4) - 1,
    "nested": {"list": [1, np.float32(0.5), None], "empty": np.zeros((0, 2), np.float64)},
}


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def assert_same_bits(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with the steps 1 (AP 0.2) and 2; tests change copies only."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, base_config(), categories=CATEGORIES) as checkpoints:
        checkpoints.save(1, make_state(1), HOST_STATE, {"AP": 0.2})
        checkpoints.save(2, make_state(2), HOST_STATE)
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_round_trip_is_bit_exact(saved):
    with Checkpoints(saved, base_config(), read_only=True) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)
        state, host = checkpoints.restore(abstract(make_state()))
        assert_same_bits(state, make_state(2))
        assert isinstance(state, State)
        np.testing.assert_array_equal(host["assignments"], HOST_STATE["assignments"])
        assert host["assignments"].dtype == np.int32
        assert host["nested"]["empty"].shape == (0, 2)
        assert (host["epoch"], host["best"], host["name"]) == (3, 0.1 + 0.2, "ä")
        assert host["nested"]["list"] == [1, 0.5, None]
        best, _ = checkpoints.restore(abstract(make_state()), step="best")
        assert_same_bits(best, make_state(1))
        params = checkpoints.restore_params(abstract(make_state().params), step=1)
        assert_same_bits(params, make_state(1).params)


def test_parameters_to_evaluate_with_are_the_average(tmp_path):
    """Catches an evaluation or an export of the last parameters if there is an average."""
    states = {
        step: {"params": {"w": jnp.full(3, 1.0 * step)}, "ema": ema, "step": jnp.int32(step)}
        for step, ema in ((1, None), (2, {"w": jnp.full(3, 0.5)}))
    }
    with Checkpoints(tmp_path, None) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
        for step, state in states.items():
            assert_same_bits(checkpoints.restore(abstract(state), step)[0], state)
            params = checkpoints.restore_params(abstract(state["params"]), step)
            assert_same_bits(params, state["ema"] or state["params"])
            assert checkpoints.has_average(step) == (step == 2)
        shutil.rmtree(checkpoints.directory / "2" / "ema")
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.restore_params(abstract(states[2]["params"]), 2)


def test_checkpoint_is_self_contained(saved):
    config, categories = read_config(saved)
    assert config == json.loads(json.dumps(base_config().to_dict()))
    assert categories == CATEGORIES
    inside = json.loads((saved / "checkpoints" / "2" / "config" / "metadata").read_text())
    listed = [{"id": 3, "name": "three"}, {"id": 7, "name": "seven"}]
    assert inside == {"config": config, "categories": listed}


def test_restored_arrays_have_the_shardings_asked_for(saved):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()
    )
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract(make_state()),
    )
    with Checkpoints(saved, None, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(target)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state))


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    """Catches an asynchronous save that reads buffers which the next step overwrites."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((1000, 500))}}
    target = abstract(state)
    with Checkpoints(tmp_path, None) as checkpoints:
        state = step(state)
        checkpoints.save(1, state)
        for _ in range(5):
            state = step(state)
        restored, host = checkpoints.restore(target)
    np.testing.assert_array_equal(restored["params"]["w"], np.ones((1000, 500)))
    assert host == {}


def test_keeps_the_latest_and_the_best(tmp_path):
    scores = [0.1, 0.5, 0.2, None, float("nan"), 0.5, 0.3, 0.1]
    with Checkpoints(tmp_path, None, keep_latest=2, keep_best=1) as checkpoints:
        for step, score in enumerate(scores, start=1):
            checkpoints.save(step, make_state(step), {}, None if score is None else {"AP": score})
    with Checkpoints(tmp_path, None, keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.all_steps() == [6, 7, 8]
        assert checkpoints.best_step() == 6  # the later one of two equals
        checkpoints.save(9, make_state(9), {}, {"AP": 0.2})
        checkpoints.wait()
        assert checkpoints.all_steps() == [6, 8, 9]
    folders = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(folders) == ["6", "8", "9"]


def test_best_by_the_average_and_by_the_parameters_themselves(tmp_path):
    """Catches a best of one that replaces that of the other, and the average in place of both."""
    history = [(0.3, 0.1), (0.1, 0.4), (0.2, 0.2), (0.2, None)]
    states = [
        {"params": {"w": jnp.full(3, 1.0 * i)}, "ema": {"w": jnp.full(3, 0.5 + i)}}
        for i in range(1, 5)
    ]
    target = abstract(states[0]["params"])
    with Checkpoints(tmp_path, None, keep_latest=1, keep_best=1) as checkpoints:
        for step, (state, (ap, raw)) in enumerate(zip(states, history, strict=True), start=1):
            metrics = {"AP": ap} | ({} if raw is None else {"AP_raw": raw})
            checkpoints.save(step, state, {}, metrics)
    for step, number, average in ("best", 1, True), ("best_raw", 2, False), ("latest", 4, True):
        found = read_params(tmp_path, target, step)
        assert (found.step, found.is_average) == (number, average)
        item = "ema" if average else "params"
        assert_same_bits(found.params, states[number - 1][item])
    with Checkpoints(tmp_path, None, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 4]
        assert_same_bits(checkpoints.restore_params(target, "best_raw"), states[1]["params"])


def test_no_raw_ap_is_an_error_that_says_how_to_get_one(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint has an AP of .*\(eval\.raw\)"):
        read_params(saved, abstract(make_state().params), "best_raw")


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "never_made", base_config(), read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.best_step() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint") as error:
            checkpoints.restore_params(abstract(make_state().params))
        assert "never_made" in one_line(error)
    assert not (tmp_path / "never_made").exists()


def test_unknown_step_and_missing_best(tmp_path):
    with Checkpoints(tmp_path, None) as checkpoints:
        checkpoints.save(3, make_state())
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; steps: 3"):
            checkpoints.restore(abstract(make_state()), step=4)
        with pytest.raises(CheckpointError, match=r"no checkpoint has an AP.*steps: 3"):
            checkpoints.restore(abstract(make_state()), step="best")


def test_a_step_is_never_overwritten(copied):
    with Checkpoints(copied, None) as checkpoints:
        with pytest.raises(CheckpointError, match="2: exists already"):
            checkpoints.save(2, make_state(9))
        state, _ = checkpoints.restore(abstract(make_state()))
        assert_same_bits(state, make_state(2))


def test_restarting_from_an_earlier_step_sets_the_later_ones_aside(copied):
    for _ in range(2):
        with Checkpoints(copied, None) as checkpoints:
            assert checkpoints.set_aside_after(1) == [2]
            assert checkpoints.latest_step() == 1
            checkpoints.save(2, make_state(5))
            checkpoints.wait()
            assert checkpoints.all_steps() == [1, 2]
    aside = copied / "checkpoints" / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == ["2", "2_"]


# Another config


@pytest.mark.parametrize("read_only", [False, True])
def test_another_model_names_exactly_the_differing_keys(copied, read_only):
    config = base_config()
    config.model.num_queries = 100
    config.model.dtype = "bfloat16"
    config.data.canvases = ((96, 128),)
    config.train.log_every = "7 steps"
    with pytest.raises(CheckpointError, match="another config") as error:
        Checkpoints(copied, config, categories=CATEGORIES, read_only=read_only)
    message = one_line(error)
    assert str(copied) in message
    assert "model.num_queries was 300, now 100" in message
    assert "log_every" not in message
    trained = ["data.canvases was [[800, 1344], [1344, 800]], now [[96, 128]]", "model.dtype was"]
    assert [text in message for text in trained] == [not read_only] * 2
    assert message.count(" was ") == (1 if read_only else 3)


def test_a_run_from_before_a_key_was_there_is_continued_with_its_default(copied):
    """Catches an update of the package after which no run can be resumed."""
    path = copied / "config.json"
    document = json.loads(path.read_text())
    del document["config"]["data"]["snap"]
    for config_file in (path, *copied.glob("checkpoints/*/config/metadata")):
        config_file.write_text(json.dumps(document))
    with Checkpoints(copied, base_config(), categories=CATEGORIES) as checkpoints:
        assert checkpoints.latest_step() == 2
    path.write_text(json.dumps(document))
    config = base_config()
    config.data.snap = 0.1
    with pytest.raises(CheckpointError, match=r"data\.snap was 0\.0, now 0\.1"):
        Checkpoints(copied, config, categories=CATEGORIES)


@pytest.mark.parametrize(
    ("categories", "difference"),
    [
        (CATEGORIES[::-1], r"class 0 was 'three' \(id 3\), now 'seven' \(id 7\)"),
        ((CATEGORIES[0], Category(8, "seven")), r"class 1 was 'seven' \(id 7\), now .*\(id 8\)"),
        (CATEGORIES[:1], "the data had 2 classes, now 1"),
    ],
)
def test_other_classes_are_another_run(copied, categories, difference):
    """Catches a run that continues with other classes under the same labels."""
    with pytest.raises(CheckpointError, match=difference) as error:
        Checkpoints(copied, base_config(), categories=categories)
    one_line(error)
    Checkpoints(copied, base_config(), categories=categories, read_only=True).close()


def test_a_document_of_names_alone_is_read_and_continued(copied):
    """Catches a format change that breaks earlier runs, whose ids are the positions."""
    path = copied / "config.json"
    document = json.loads(path.read_text())
    del document["categories"]
    path.write_text(json.dumps(document | {"class_names": ["zero", "one"]}))
    named = (Category(0, "zero"), Category(1, "one"))
    assert read_config(copied)[1] == named
    with pytest.raises(CheckpointError, match="class 0 was 'zero'"):
        Checkpoints(copied, base_config(), categories=CATEGORIES)
    with Checkpoints(copied, base_config(), categories=named) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert "class_names" not in json.loads(path.read_text())


def test_harmless_keys_may_change_and_are_stored(copied):
    config = base_config()
    config.train.log_every = "7 steps"
    config.data.dir = "/elsewhere"
    config.data.workers = 3
    config.mesh.data = 1
    config.train.accumulate_steps = 4
    config.model.remat = ("encoder",)
    config.checkpoint.keep_latest = 9
    with Checkpoints(copied, config, categories=CATEGORIES) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert read_config(copied)[0]["data"]["workers"] == 3


def test_the_config_inside_a_checkpoint_is_compared_too(copied):
    (copied / "config.json").unlink()
    config = base_config()
    config.dn.groups = 0
    with pytest.raises(CheckpointError, match=r"dn\.groups was 5, now 0"):
        Checkpoints(copied, config, categories=CATEGORIES)


def test_a_directory_without_checkpoints_may_change_its_config(tmp_path):
    Checkpoints(tmp_path, base_config()).close()
    config = base_config()
    config.seed = 7
    Checkpoints(tmp_path, config).close()
    assert read_config(tmp_path)[0]["seed"] == 7


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}', '{"config": {}}'])
def test_a_damaged_config_is_named(copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read") as error:
        Checkpoints(copied, base_config())
    one_line(error)


# The lock

HOLD = """
import sys, time
from pathlib import Path
from dn_detr_jax.checkpoints.lock import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_writes_and_its_death_unlocks(copied):
    """Catches a lock that outlives a killed process, or that keeps readers out."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copied)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        config = (copied / "config.json").read_bytes()
        for _ in range(2):  # a refusal leaves the lock with its owner
            with pytest.raises(CheckpointError, match="in use by process") as error:
                Checkpoints(copied, base_config(), categories=CATEGORIES)
            assert f"process {holder.pid} on {socket.gethostname()}, since" in one_line(error)
        assert (copied / "config.json").read_bytes() == config
        with Checkpoints(copied, None, read_only=True) as checkpoints:
            assert checkpoints.latest_step() == 2
        holder.kill()
    Checkpoints(copied, base_config(), categories=CATEGORIES).close()


def test_a_process_does_not_share_its_own_lock_and_releases_it(copied):
    """Catches two trainings in one notebook, which share the process that holds the lock."""
    with (
        Checkpoints(copied, None),
        pytest.raises(CheckpointError, match=rf"this process \({os.getpid()}\)"),
    ):
        Checkpoints(copied, None)
    with pytest.raises(CheckpointError, match="class 0"):  # after it was locked
        Checkpoints(copied, base_config(), categories=CATEGORIES[::-1])
    Checkpoints(copied, None).close()


def test_a_file_system_without_locks_is_a_warning(copied, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    Checkpoints(copied, None).close()
    assert "No locks available" in caplog.text


def test_parameters_are_read_while_a_training_removes_checkpoints(copied, monkeypatch):
    """Catches an evaluation that reports a removed checkpoint as damaged."""
    restore, calls = Checkpoints.restore_params, []

    def removed_first(self, shapes, step, **options):
        calls.append(step)
        if len(calls) == 1:
            shutil.copytree(copied / "checkpoints" / "2", copied / "checkpoints" / "3")
            shutil.rmtree(copied / "checkpoints" / "2")
        return restore(self, shapes, step, **options)

    monkeypatch.setattr(Checkpoints, "restore_params", removed_first)
    found = read_params(copied, abstract(make_state().params), "latest")
    assert (found.step, calls) == (3, [2, 3])
    assert_same_bits(found.params, make_state(2).params)


# Classes


def test_labels_are_matched_by_name_where_the_sets_agree():
    """Catches labels taken by position, and classes that share a name or are unused."""
    run = (Category(1, "square"), Category(2, "disc"), Category(3, "bar"))
    other_ids = tuple(dataclasses.replace(c, id=5 * c.id) for c in run)
    assert match_labels(run, other_ids, "run", "data") == (0, 1, 2)
    assert match_labels(run, run[::-1], "run", "data") == (2, 1, 0)
    holes = (Category(0, ""), Category(1, "bar"), Category(2, ""), *run[:2])
    labels = match_labels(run, holes, "run", "data")
    assert [labels[i] for i in (1, 3, 4)] == [2, 0, 1]
    assert matched_categories(run, holes, labels) == (run[0], run[1], holes[1])
    unknown = assumed_categories(3)
    assert match_labels(unknown, run, "run", "data") == (0, 1, 2)
    assert matched_categories(unknown, run, (0, 1, 2)) == run
    with pytest.raises(CheckpointError, match=r"only in run: 'bar'; only in data: 'rod'"):
        match_labels(run, (*run[:2], Category(3, "rod")), "run", "data")
    twice = (*run, Category(4, "disc"))
    assert match_labels(twice, twice, "run", "data") == (0, 1, 2, 3)
    with pytest.raises(CheckpointError, match=r"'disc' is the name of several classes"):
        match_labels(twice, twice[::-1], "run", "data")


# Damage


def _files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [os.remove, _cut, _flip])
def test_any_damaged_file_is_an_error_or_without_effect(copied, damage):
    """Catches a lost, cut or changed file that yields other values without an error."""
    reported = 0
    for file in _files(copied / "checkpoints" / "2"):
        content = file.read_bytes()
        damage(file)
        with Checkpoints(copied, None, read_only=True) as checkpoints:
            try:
                state, host = checkpoints.restore(abstract(make_state()))
                assert_same_bits(state, make_state(2))
                assert host["epoch"] == 3
            except CheckpointError as error:
                reported += 1
                assert "\n" not in str(error)
                assert str(copied / "checkpoints" / "2") in str(error)
                assert "damaged" in str(error) and "--step: 1" in str(error)
        if file.name == "_METADATA":
            with Checkpoints(copied, None, read_only=True) as checkpoints:
                previous, _ = checkpoints.restore(abstract(make_state()), step=1)
            assert_same_bits(previous, make_state(1))
        file.write_bytes(content)
    assert reported >= 10


def test_a_missing_item_is_damage(copied):
    shutil.rmtree(copied / "checkpoints" / "2" / "params")
    with (
        Checkpoints(copied, None, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"damaged.*--step: 1") as error,
    ):
        checkpoints.restore(abstract(make_state()))
    one_line(error)


def test_damaged_metrics_hide_nothing_and_are_not_deleted(copied):
    (copied / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    with Checkpoints(copied, None, keep_latest=1) as checkpoints:
        assert checkpoints.best_step() == 1
        for step in (3, 4):
            checkpoints.save(step, make_state(step), {}, {"AP": 0.9})
        checkpoints.wait()
        assert 1 in checkpoints.all_steps()


def test_another_model_names_the_first_differing_parameters(saved):
    with Checkpoints(saved, None, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="does not fit the model") as error:
            checkpoints.restore_params(abstract(make_state(width=6).params))
        assert (
            "backbone/kernel is float32[3, 5] in the checkpoint, float32[3, 6] in the model"
            in one_line(error)
        )
        params = dict(make_state().params, extra={"kernel": jnp.zeros((2,))})
        del params["scale"]
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore_params(abstract(params))
        message = one_line(error)
        assert "extra/kernel is missing in the checkpoint, float32[2] in the model" in message
        assert "scale is float32[] in the checkpoint, missing in the model" in message


# Failures while saving


async def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_tasks_of_a_failed_save_are_not_told_one_by_one(copied, caplog):
    """Catches pages of asyncio after the one-line error."""
    with Checkpoints(copied, None):
        for place in ("/site-packages/orbax/checkpoint/serialization.py", "/mine.py"):
            logging.getLogger("asyncio").error("Task exception ...\nfuture: <defined at %s>", place)
    assert [record.args for record in caplog.records if record.name == "asyncio"] == [("/mine.py",)]


def test_a_full_disk_is_reported_and_leaves_the_others_intact(copied, monkeypatch):
    checkpoints = Checkpoints(copied, base_config(), categories=CATEGORIES, keep_latest=1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", _full_disk)
        checkpoints.save(3, make_state(3), {}, {"AP": 0.9})
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    message = one_line(error)
    assert "saving step 3 failed: no space left" in message
    assert str(copied / "checkpoints") in message
    assert checkpoints.all_steps() == [1, 2]
    assert checkpoints.best_step() == 1
    checkpoints.save(4, make_state(4))  # the disk has space again
    checkpoints.close()
    with Checkpoints(copied, None, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1, 4]
        for step in (1, 4):
            state, _ = checkpoints.restore(abstract(make_state()), step=step)
            assert_same_bits(state, make_state(step))


@pytest.mark.parametrize("finish", [lambda c: c.close(), lambda c: c.save(4, make_state(4))])
def test_a_failed_save_is_reported_by_close_and_by_the_next_save(copied, monkeypatch, finish):
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", _full_disk)
    checkpoints = Checkpoints(copied, None)
    checkpoints.save(3, make_state(3))
    with pytest.raises(CheckpointError, match="saving step 3 failed"):
        finish(checkpoints)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file") as error:
        Checkpoints(tmp_path / "file", base_config())
    one_line(error)


def test_leftovers_of_a_killed_process_are_ignored_and_removed(copied):
    unfinished = copied / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(copied / "checkpoints" / "2", unfinished)
    shutil.copytree(copied / "checkpoints" / "1", copied / "checkpoints" / "trash" / "0")
    with Checkpoints(copied, None, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert unfinished.exists()  # may be the unfinished save of another process
    with Checkpoints(copied, None) as checkpoints:
        checkpoints.save(8, make_state(8))
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["1", "2", "8"]


ENDLESS_SAVES = """
import sys
import jax, jax.numpy as jnp
from dn_detr_jax.checkpoints.manager import Checkpoints
checkpoints = Checkpoints(sys.argv[1], None, keep_latest=2)
first = checkpoints.latest_step() or 0
for step in range(first + 1, 10_000):
    state = {"params": {str(i): jnp.full((200, 300), step + i) for i in range(8)}}
    checkpoints.save(step, state, {"step": step}, {"AP": step % 5})
    print(step, flush=True)
"""


def test_killed_while_saving_only_complete_checkpoints_are_there(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
    }
    target = {"params": {str(i): jax.ShapeDtypeStruct((200, 300), jnp.int32) for i in range(8)}}
    latest = 0
    for delay in (0.0, 0.013, 0.031):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_SAVES, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        lines = [process.stdout.readline() for _ in range(4)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        started = int(lines[-1])
        with Checkpoints(tmp_path, None, read_only=True) as checkpoints:
            # The last save began only after the one before was complete.
            assert checkpoints.latest_step() >= started - 1 > latest
            for step in checkpoints.all_steps():
                state, host = checkpoints.restore(target, step=step)
                assert host == {"step": step}
                for i in range(8):
                    np.testing.assert_array_equal(state["params"][str(i)], step + i)
            latest = checkpoints.latest_step()
