"""Damaged work directories and exported detectors give the saved values or an error.

`test_checkpoints.py` removes, cuts and flips every file once. This module damages any file in any
way, and reads a directory in all ways.
"""

import copy
import functools
import json
import os
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import damaged, examples, one_line, within
from data import tiny as tiny_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_fuzz_config import ANYTHING
from tiny_detector import random_params

from dn_detr_jax.checkpoints.manager import (
    Checkpoints,
)
from dn_detr_jax.config import (
    base_config,
    flat_keys,
)
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import CheckpointError, ConfigError
from dn_detr_jax.inference import exported, predictor
from dn_detr_jax.inference.export import export
from dn_detr_jax.inference.exported import ExportedError, load_exported
from dn_detr_jax.inference.predictor import Run, read_run
from dn_detr_jax.interop import initial
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.training.writers import MetricWriter, read_metrics
from dn_detr_jax.visualize.plots import read_curves

SAME_FIXTURES = [HealthCheck.function_scoped_fixture]
CATEGORIES = tuple(Category(i, f"class {i}") for i in range(5))
HOST = {"epoch": 3, "drawn": np.arange(3)}


def config_of_run():
    config = tiny_config.shared()
    config.train.ema_decay = 0.9
    config.data.eval_short_side, config.data.eval_max_long_side = 48, 64
    return config


def shapes(model=None):
    """Replaces the parameters of the model by a few, since Orbax takes time for each."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return {"backbone": {"conv": {"kernel": of((3, 3, 3, 8))}}, "class_head": {"bias": of((5,))}}


def state_of(step):
    params, average = random_params(shapes(), step), random_params(shapes(), 100 + step)
    return {"params": params, "ema": average, "opt_state": {"mu": params}, "step": np.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the steps 1, the best, and 2, each with a moving average."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(workdir, config_of_run(), categories=CATEGORIES) as checkpoints:
        checkpoints.save(1, state_of(1), HOST, {"AP": 0.4})
        checkpoints.save(2, state_of(2), HOST, {"AP": 0.3})
    with MetricWriter(workdir) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": 3.0 / step})
    return workdir


@pytest.fixture(autouse=True)
def shapes_of_few_parameters(monkeypatch):
    for module in (predictor, initial):
        monkeypatch.setattr(module, "abstract_params", shapes)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(wanted).tobytes()


def read_all_ways(workdir, changed=""):
    """Returns how many ways of reading give the saved values; the others must name the path."""
    target = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state_of(1)))

    def state():
        with Checkpoints(workdir, None, read_only=True) as checkpoints:
            found, host = checkpoints.restore(target, step=2)
        assert_same(found, state_of(2))
        assert host["epoch"] == 3 and host["drawn"].tolist() == [0, 1, 2]

    def evaluated():
        with Checkpoints(workdir, config_of_run(), read_only=True) as checkpoints:
            assert_same(checkpoints.restore_params(shapes(), "best"), state_of(1)["ema"])
            assert_same(checkpoints.restore_params(shapes(), "latest"), state_of(2)["ema"])

    def predicted():
        run = read_run(workdir)
        assert run.step == 1
        assert_same(run.params, state_of(1)["ema"])

    def continued():
        with Checkpoints(workdir, config_of_run(), categories=CATEGORIES) as checkpoints:
            assert checkpoints.latest_step() == 2
            assert_same(checkpoints.restore(target)[0], state_of(2))
        with MetricWriter(workdir, start_step=2):
            assert all(line["step"] <= 2 for line in read_metrics(workdir))
        read_curves(workdir / "metrics.jsonl")

    right = 0
    for read in (state, evaluated, predicted, continued):
        try:
            with within(30):
                read()
            right += 1
        except CheckpointError as error:
            one_line(error, str(workdir))
        except OSError as error:  # of metrics.jsonl, whose name is in it
            assert "metrics.jsonl" in changed and error.filename
    return right


def test_a_whole_directory_is_read_all_ways(saved):
    assert read_all_ways(saved) == 4


def files_of(workdir):
    return sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())


def _to_folder(path, _):
    path.unlink()
    path.mkdir()


def _to_pipe(path, _):
    path.unlink()
    os.mkfifo(path)


def _to_itself(path, _):
    path.unlink()
    path.symlink_to(path.name)


def _to_link(path, _):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _to_device(path, _):
    path.unlink()
    path.symlink_to("/dev/zero")


ACCIDENTS = {
    "removed": lambda path, _: path.unlink(),
    "emptied": lambda path, _: path.write_bytes(b""),
    "empty object": lambda path, _: path.write_text("{}"),
    "deep": lambda path, _: path.write_text("[" * 100_000),
    "folder": _to_folder,
    "pipe": _to_pipe,
    "loop": _to_itself,
    "link": _to_link,
    "device": _to_device,
    "copied over": lambda path, other: shutil.copyfile(other, path),
    "extra": lambda path, other: shutil.copyfile(other, path.with_name("extra")),
    "other's folder": lambda path, other: (
        shutil.rmtree(path.parent),
        shutil.copytree(other.parent, path.parent),
    ),
}
# Files in the work directory itself may be irregular.
NO_PIPE = ("metrics.jsonl",)


@settings(max_examples=examples(12), suppress_health_check=SAME_FIXTURES)
@given(data=st.data())
def test_after_any_accident_values_are_right_or_missing(saved, tmp_path_factory, data):
    """Catches Orbax waiting forever, errors without a path, and other values without an error."""
    workdir = tmp_path_factory.mktemp("copies") / "run"
    shutil.copytree(saved, workdir)
    names = files_of(saved)
    name = data.draw(st.sampled_from(names), label="file")
    other = data.draw(st.sampled_from(names), label="other file")
    accident = data.draw(st.sampled_from(["damaged", "damaged", *ACCIDENTS]), label="accident")
    endless = accident in ("pipe", "device") and name.name in NO_PIPE
    whole_folder = accident == "other's folder" and min(len(name.parts), len(other.parts)) < 3
    if accident == "damaged":
        (workdir / name).write_bytes(data.draw(damaged((saved / name).read_bytes())))
    elif not (endless or whole_folder):  # checkpoints within checkpoints
        ACCIDENTS[accident](workdir / name, saved / other)
    try:
        if name.name == "config.json":  # users may change it
            read_config_only(workdir)
        else:
            read_all_ways(workdir, str(name))
    finally:
        shutil.rmtree(workdir.parent)


def read_config_only(workdir):
    try:
        with within(30):
            assert isinstance(read_run(workdir), Run)
    except CheckpointError as error:
        one_line(error, str(workdir))


@pytest.mark.parametrize(
    "content", ["{}", '{"params/x": [1, 2]}', "[]", "3", '{"ema/x": 5}', "NaN"]
)
def test_checksums_that_say_nothing_are_damage(saved, tmp_path, content):
    """Catches missing checksums: parameters pass as the average, and nothing is compared."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / "checksums.json").write_text(content)
    assert read_all_ways(workdir) == 0


def test_a_pipe_in_an_item_that_is_not_read_is_named(saved, tmp_path):
    """Catches Orbax waiting forever: it reads the array metadata of every item."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    _to_pipe(workdir / "checkpoints" / "1" / "params" / "_METADATA", None)
    with pytest.raises(CheckpointError, match=r"1/params/_METADATA: neither a file nor a folder"):
        Checkpoints(workdir, None, read_only=True)


@pytest.mark.parametrize("accident", ["changed", "metrics lost", "all lost"])
def test_damaged_metrics_do_not_make_another_step_the_best(saved, tmp_path, accident):
    """Catches a damaged metric that changes which step is evaluated and exported."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    folder = workdir / "checkpoints" / "2"
    if accident == "changed":
        (folder / "metrics" / "metrics").write_text('{"AP": 0.9}')
    elif accident == "metrics lost":
        shutil.rmtree(folder / "metrics")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2/metrics: damaged.*--step: 1, 2"):
            checkpoints.find("best")
        assert checkpoints.find("latest") == 2


# The config of a run


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([2**31, 10**30, 10**400, 1e308, float("inf"), float("nan"), 0.5, -1.5]),
    st.sampled_from(["", "a", "x\ny", "float64", [], {}, [[]], [1, 2], {"a": 1}, [[1, 2]], [{}]]),
)


@settings(max_examples=examples(40), suppress_health_check=SAME_FIXTURES)
@given(data=st.data())
def test_any_config_of_a_run_is_used_or_named(saved, tmp_path_factory, data):
    """Catches errors of ml_collections, flax and NumPy while the parameters are read."""
    workdir = tmp_path_factory.mktemp("config") / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(saved / "checkpoints")
    document = json.loads((saved / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        keys = [*flat_keys(tiny_config.shared()), "model", "data.augment", ""]
        key = data.draw(st.sampled_from(keys))
        place, value = document["config"], data.draw(JSON_VALUES)
        *path, last = key.split(".")
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not key:
            where = data.draw(st.sampled_from(["config", "categories", "class", "id", "name"]))
            classes = document["categories"]
            if where in document:
                document[where] = value
                break
            if where == "class":
                classes[2] = value
            elif isinstance(classes[2], dict):
                classes[2][where] = value
        elif isinstance(place, dict) and key != "model.hidden_dim":
            place[last] = value
    (workdir / "config.json").write_text(json.dumps(document))
    try:
        read_config_only(workdir)
        start = config_of_run()
        start.init.checkpoint = str(workdir)
        params = jax.tree.map(jnp.asarray, state_of(1)["params"])
        try:
            with within(30):
                initial.load_initial(params, start)
        except (CheckpointError, ConfigError) as error:
            one_line(error, str(workdir))
    finally:
        shutil.rmtree(workdir.parent)


def test_compiled_programs_are_not_taken_from_where_a_run_says(saved, tmp_path, monkeypatch):
    """Catches compiled programs from a work directory, which may be from another user."""
    workdir, given = shutil.copytree(saved, tmp_path / "run"), []
    monkeypatch.setattr(predictor, "use_compile_cache", given.append)
    document = json.loads((workdir / "config.json").read_text())
    for cache_dir in (str(workdir / "cache"), ""):
        document["config"]["compile"]["cache_dir"] = cache_dir
        (workdir / "config.json").write_text(json.dumps(document))
        predictor.load(workdir)
    assert given == [base_config().compile.cache_dir, ""]


def test_no_pickle_of_a_work_directory_is_read(saved, tmp_path):
    """Catches a reader that guesses the format of any file and runs a pickle."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Touch(str(marker)))
    np.save(tmp_path / "hostile.npy", np.array([Touch(str(marker))], object), allow_pickle=True)
    array = (tmp_path / "hostile.npy").read_bytes()
    contents = {name: (saved / name).read_bytes() for name in files_of(saved)}
    for content in (hostile, array):
        for name in contents:
            (workdir / name).write_bytes(content)
        assert read_all_ways(workdir) == 0
        for name, good in contents.items():
            (workdir / name).write_bytes(good)
    # Strings in JSON stay strings, and arrays of objects are not read.
    host = {"x": {"__array__": "AAAAAAAAAAA=", "dtype": "|O", "shape": [1]}}
    with Checkpoints(tmp_path / "objects", None) as checkpoints:
        checkpoints.save(1, state_of(1), host)
        target = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state_of(1)))
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(target)
        one_line(error.value)
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Exported detectors


@pytest.fixture(scope="module")
def exported_file(tmp_path_factory):
    config = config_of_run()
    params = random_params(abstract_params(build_model(config.model)))
    run = Run(config, CATEGORIES, params, 1)
    path = tmp_path_factory.mktemp("exported") / "detector.zip"
    export(run, path, platforms=("cpu",))
    return path


@pytest.fixture(scope="module")
def whole(exported_file):
    return load_exported(exported_file)


def load(path):
    """Returns a detector with usable metadata, or None after an error that names the file."""
    try:
        with within(30):
            detector = load_exported(path)
            image, size = detector.prepare(np.zeros((30, 50, 3), np.uint8))
    except ExportedError as error:
        one_line(error, str(path))
        return None
    assert image.shape == (*detector.canvas, 3) and (size <= detector.canvas).all()
    return detector


@settings(max_examples=examples(20), suppress_health_check=SAME_FIXTURES)
@given(data=st.data())
def test_a_damaged_exported_detector_is_the_same_or_named(
    exported_file, whole, tmp_path_factory, data
):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(data.draw(damaged(exported_file.read_bytes())))
    detector = load(path)
    if detector is not None:
        assert detector.metadata == whole.metadata
        assert_same(detector._params, whole._params)


def rewritten(source, target, change, members=lambda name, data: data):
    """Writes a copy with right checksums and other metadata or members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == exported.METADATA:
                data = json.dumps(change(json.loads(data))).encode()
            data = members(name, data)
            if data is not None:
                new.writestr(name, data)
    return target


METADATA_KEYS = (
    *("format", "canvas", "batch_size", "num_select", "short_side", "max_long_side"),
    *("classes", "platforms", "versions", "step"),
)


@settings(max_examples=examples(15), suppress_health_check=SAME_FIXTURES)
@given(changes=st.dictionaries(st.sampled_from(METADATA_KEYS), st.one_of(JSON_VALUES, ANYTHING)))
@example({"canvas": [64]})
@example({"classes": [{}]})
@example({"versions": {}})
@example({"platforms": 5})
def test_any_metadata_is_used_or_named(exported_file, tmp_path_factory, changes):
    """Catches errors that appear only when the detector is used."""

    def change(metadata):
        try:
            return metadata | json.loads(json.dumps(changes))
        except (TypeError, ValueError):  # what JSON does not hold
            return metadata

    path = tmp_path_factory.getbasetemp() / "metadata.zip"
    detector = load(rewritten(exported_file, path, change))
    if detector is not None:
        assert detector.canvas == (64, 64) and detector.batch_size == 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (lambda name, data: None if name.endswith("anchors.npy") else data, "not for the"),
        (lambda name, data: data[:-1] if name.endswith("anchors.npy") else data, "damaged"),
        (lambda name, data: b"" if name == exported.PROGRAM else data, "can't read"),
        (lambda name, data: data[: len(data) // 2] if name == exported.PROGRAM else data, "read"),
    ],
)
def test_parameters_and_program_belong_together(exported_file, tmp_path, members, words):
    path = rewritten(exported_file, tmp_path / "other.zip", lambda metadata: metadata, members)
    with pytest.raises(ExportedError, match=words) as error:
        load_exported(path)
    one_line(error.value, str(path))


@settings(max_examples=examples(8), suppress_health_check=SAME_FIXTURES)
@given(data=st.data())
def test_a_damaged_program_does_not_end_the_process(exported_file, tmp_path_factory, data):
    """Catches a crash of the reader of StableHLO, which is written in C++."""
    path = tmp_path_factory.getbasetemp() / "program.zip"

    def members(name, content):
        return data.draw(damaged(content, 2)) if name == exported.PROGRAM else content

    load(rewritten(exported_file, path, copy.copy, members))


def test_a_program_that_calls_out_is_refused(exported_file, tmp_path):
    """Catches a program that calls an address of the process."""

    def program(params, images, sizes):
        called = jax.ffi.ffi_call("any_address", jax.ShapeDtypeStruct((), jnp.float32))(0.0)
        return {name: jnp.full(aval.shape, called, aval.dtype) for name, aval in found.items()}

    with zipfile.ZipFile(exported_file) as archive:
        good = jax.export.deserialize(bytearray(archive.read(exported.PROGRAM)))
    arguments, _ = jax.tree.unflatten(good.in_tree, good.in_avals)
    found = jax.tree.unflatten(good.out_tree, good.out_avals)
    shapes = jax.tree.map(lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype), arguments)
    checks = [jax.export.DisabledSafetyCheck.custom_call("any_address")]
    hostile = jax.export.export(jax.jit(program), platforms=("cpu",), disabled_checks=checks)

    def members(name, content):
        if name != exported.PROGRAM:
            return content
        return bytes(hostile(*shapes).serialize())

    path = rewritten(exported_file, tmp_path / "hostile.zip", lambda x: x, members)
    with pytest.raises(ExportedError, match="its program calls any_address, which no"):
        load_exported(path)
