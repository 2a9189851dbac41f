"""The preflight: for TPUs without having them, and its report if a step does not fit."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl.flags import FlagValues
from coco_directory import write_coco
from data import tiny
from ml_collections import config_flags

from dn_detr_jax.config import base_config
from dn_detr_jax.errors import ConfigError, PreflightError
from dn_detr_jax.preflight.accelerators import CHIPS, Chip
from dn_detr_jax.preflight.compilation import (
    OutOfMemory,
    abstract_step,
    compile_or_explain,
    compile_step,
    count_operations,
    usable_memory,
)
from dn_detr_jax.preflight.cost import Cost
from dn_detr_jax.preflight.hlo import HostTransfer
from dn_detr_jax.preflight.preflight import Preflight
from dn_detr_jax.preflight.report import run_table
from dn_detr_jax.preflight.suggestions import Outcome, Proposal, suggest
from dn_detr_jax.preflight.topologies import topology_devices
from dn_detr_jax.preflight.whole_run import WholeRun
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.setup import Plan

_ROOT = Path(__file__).parent.parent
_CONFIG = "tests/data/tiny_step.py"


def _has_libtpu():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


needs_libtpu = pytest.mark.skipif(not _has_libtpu(), reason='needs pip install "jax[tpu]"')


def _run(*arguments):
    """Runs the preflight in a separate process; returns (status, stdout, stderr)."""
    command = [sys.executable, "-m", "dn_detr_jax", "preflight", *arguments]
    # Compiles in half the time, to a slower program.
    env = os.environ | {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"}
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@needs_libtpu
@pytest.mark.slow
def test_the_training_step_compiles_for_a_tpu_and_its_cost_is_told(tmp_path):
    """Catches a step that TPUs can't run, and figures that do not belong to the config."""
    file = tmp_path / "cost.json"
    arguments = f"--config {_CONFIG} --topology v5e:2x2 --batch_per_device 2 --json {file}"
    status, out, err = _run(*arguments.split())
    assert status == 0, err
    record = json.loads(file.read_text())
    assert (record["devices"], record["device"], record["fits"]) == (4, "TPU v5 lite", True)
    assert 15 * 2**30 < record["bytes_usable"] < 16 * 2**30
    cost = record["cost"]
    # Parameters and two moments, in float32, are the state; a device has two of the images.
    state = 3 * 4 * record["parameters"]
    assert state + 2 * 32 * 48 * 3 < cost["arguments"]
    assert cost["arguments"] + cost["temporaries"] < record["bytes_needed"] < 2**30
    # The state is donated: results reuse its memory.
    assert cost["outputs"] < 0.1 * state
    assert {c["kind"] for c in cost["collectives"]} == {"all-reduce"}
    exchanged = sum(c["bytes"] for c in cost["collectives"])
    assert 0.5 * 4 * record["parameters"] < exchanged < 1.25 * 4 * record["parameters"]
    assert cost["bytes_sent"] == 2 * 3 / 4 * exchanged
    # Matching costs [2, 1, 6, 3] and the mask of the objects to the host; the assignment back.
    assert cost["host"] == {"to_host": 2 * 6 * 3 * 4 + 2 * 3, "from_host": 2 * 3 * 4}
    least = record["roofline_seconds"]
    assert least["compute"] == cost["flops"] / 197e12 > 0
    assert least["memory"] == cost["main_memory"] / 819e9
    # Parameters and moments are read and written; the compiler counts the chip's own memory too.
    assert 2 * state < cost["main_memory"] < cost["bytes_accessed"]
    sizes = [each["bytes"] for each in cost["traffic"]]
    assert len(sizes) == 10 and sizes == sorted(sizes, reverse=True)
    assert least["bound"] in ("compute", "memory", "collectives")
    for words in (
        "4 x TPU v5e",
        "8 images of 32 x 48",
        "all-reduce",
        f"{record['parameters']:,}",
    ):
        assert words in out


@pytest.mark.slow
def test_the_devices_present_are_a_topology_too(tmp_path):
    """Catches figures for a missing chip, and a step that does not compile."""
    file = tmp_path / "cost.json"
    arguments = f"--config {_CONFIG} --topology local --batch_per_device 2 --canvas 32x32"
    status, out, err = _run(*arguments.split(), "--json", str(file))
    assert status == 0, err
    record = json.loads(file.read_text())
    assert record["canvas"] == [32, 32]
    assert record["fits"]
    assert "roofline_seconds" not in record
    assert record["cost"]["flops"] > 0
    assert "least time" not in out


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices", "usable"),
    [
        ("v5e:1x1", 1, 16),
        ("v5e:2x4", 8, 16),
        ("v6e:16x16", 256, 32),
        ("v4:2x2x2", 8, 32),
        ("v5p:2x2x1", 4, 96),
    ],
)
def test_topologies_and_the_memory_that_programs_may_use(topology, devices, usable):
    """Catches cores taken for chips, chips missing from the table, and wrong units."""
    found = topology_devices(topology)
    assert len(found) == devices
    assert found[0].device_kind in CHIPS
    memory = usable_memory(make_mesh(devices=found)) / 2**30
    assert usable * 0.95 <= memory <= usable


@needs_libtpu
def test_the_compilers_message_about_memory_is_understood():
    """Catches a message of another form, which would end in a traceback."""
    mesh = make_mesh(devices=topology_devices("v5e:2x2"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    part = jax.ShapeDtypeStruct((2**30,), jnp.float32, sharding=sharding)  # 4 GiB
    lowered = jax.jit(lambda xs: [x + 1 for x in xs]).lower([part] * 5)
    with pytest.raises(OutOfMemory) as caught:
        compile_or_explain(lowered)
    assert caught.value.needed >= 5 * 4 * 2**30
    assert caught.value.available < 16 * 2**30


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e", ("v5e:4x4", "local")),
        ("v3:2x2", ("unknown", "v5e:4x4")),
        ("v5e:2x2x2", ("2 dimensions",)),
        ("v4:4x4", ("3 dimensions",)),
        pytest.param("v5e:3x5", ("v5e:3x5", "v5e:4x4"), marks=needs_libtpu),
    ],
)
def test_unknown_topologies_are_named_with_examples(topology, words):
    """Catches the compiler's own messages, which give none."""
    with pytest.raises(PreflightError) as caught:
        topology_devices(topology)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_without_the_compiler_for_tpus_the_message_says_how_to_get_it(monkeypatch):
    """Catches jax's own message, which points to a page."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(PreflightError, match=r'pip install "jax\[tpu\]"'):
        topology_devices("v5e:2x2")


def test_what_only_the_data_knows_must_be_given():
    """Catches a shape of 0 classes that compiles."""
    config = base_config()
    config.data.max_objects = 0
    with pytest.raises(ConfigError, match=r"data\.max_objects"):
        abstract_step(config, make_mesh(1))


def _suggestions(config, batch, available, fixed, each):
    """Returns outcomes if an image costs `each`, for float32, bfloat16, and recomputation."""

    def bytes_of(proposal):
        dtype = proposal.options.get("model.dtype", config.model.dtype)
        recomputed = "model.remat" in proposal.options
        return fixed + each[(dtype == "bfloat16") + 2 * recomputed] * proposal.batch_per_device

    def attempt(proposal):
        return Outcome(proposal, bytes_of(proposal), bytes_of(proposal) <= available)

    needed = bytes_of(Proposal({}, batch))
    return list(suggest(config, batch, needed, fixed, available, attempt)), attempt


@pytest.mark.parametrize("available", [4.1, 7.0, 9.0, 18.9, 23.5, 34.9])
def test_suggestions_end_with_the_largest_batch_that_fits(available):
    """Catches a search that stops early or late; compared with trying every batch."""
    tried, attempt = _suggestions(base_config(), 16, available, 3.0, (2.0, 1.3, 1.2, 1.0))
    assert tried[-1].fits
    options, found = tried[-1].proposal
    most = max(b for b in range(1, 16) if attempt(Proposal(options, b)).fits)
    assert found == most
    assert len(tried) <= 4


def test_each_option_is_tried_alone_then_together():
    """Catches proposals that go beyond what is needed, and combinations that are left out."""
    each = (2.0, 1.3, 1.2, 1.0)
    same = [
        [(set(o.proposal.options), o.fits) for o in tried if o.proposal.batch_per_device == 16]
        for available in (25.0, 18.0, 12.0)
        for tried in [_suggestions(base_config(), 16, available, 1.0, each)[0]]
    ]
    dtype, remat = {"model.dtype"}, {"model.remat"}
    assert same[0] == [(dtype, True), (remat, True)]
    assert same[1] == [(dtype, False), (remat, False), (dtype | remat, True)]
    assert same[2] == [(dtype, False), (remat, False), (dtype | remat, False)]


def test_a_smaller_batch_alone_is_offered_where_an_option_would_do():
    """Covers both proposals: one changes precision or time, the other the batch."""
    tried, _ = _suggestions(base_config(), 16, 25.0, 1.0, (2.0, 1.3, 1.2, 1.0))
    assert tried[-1].proposal == Proposal({}, 12)


def test_batches_that_are_accumulated_stay_divisible():
    """Catches a batch size that the training refuses."""
    config = base_config()
    config.train.accumulate_steps = 4
    tried, _ = _suggestions(config, 16, 11.0, 1.0, (2.0, 1.3, 1.2, 1.0))
    assert tried[-1].fits
    assert tried[-1].proposal.batch_per_device == 8


def test_nothing_fits():
    """Catches a search that never ends."""
    tried, _ = _suggestions(base_config(), 16, 20.0, 50.0, (1.0,) * 4)
    assert not any(o.fits for o in tried)
    assert tried[-1].proposal.batch_per_device == 1


def test_a_proposal_is_what_the_command_line_says():
    """Catches options that are printed in a form that the flags do not take."""
    mesh = make_mesh(1)
    proposal = Proposal({"model.dtype": "bfloat16", "model.remat": ("encoder", "decoder")}, 3)
    applied = proposal.applied(base_config(), mesh)
    assert (applied.model.dtype, applied.train.batch_size) == ("bfloat16", 3)
    batch, *overrides = shlex.split(proposal.text())
    assert batch == "--batch_per_device=3"
    values = FlagValues()
    arguments = ["preflight", f"--config={_ROOT / 'configs/coco_r50.py'}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    given = values.config.model
    assert (given.dtype, given.remat) == (applied.model.dtype, applied.model.remat)


def _run_of(needed, steps, seconds, total):
    """A whole run on devices of one operation a second; `seconds` of None does not fit."""
    chip = Chip("toy", 10.0, 1.0, 1.0, 1.0)
    canvases = []
    for each, time in zip(needed, seconds, strict=True):
        cost = time and Cost(
            *(0, 0, 0, 0),
            flops=time,
            bytes_accessed=9 * time,
            main_memory=time / 2,
            traffic=[],
            collectives=[],
            host=HostTransfer(0, 0),
            rematerialized=0,
            loops=[],
        )
        config = base_config()
        config.train.batch_size = 6
        fixed = {"chip": chip, "usable": 10.0, "num_parameters": 1, "fixed": 1, "seconds": 1.0}
        result = {"cost": cost, "needed": each, "fits": each <= 10, "canvas": (8, 8 + each)}
        canvases.append(
            Preflight(config=config, topology="toy", mesh=make_mesh(1), **fixed, **result)
        )
    return WholeRun(Plan(10, total, 1, 0, 1), canvases, steps)


def test_the_time_of_a_training_weights_each_canvas_by_its_steps():
    """Catches a mean over canvases, and hours of an epoch for those of the training."""
    run = _run_of(needed=(4, 9), steps=[30, 10], seconds=(2.0, 6.0), total=1200)
    assert run.step_seconds == 3.0
    assert run.images_per_second == 2.0
    assert run.hours == 1.0
    assert run.fits
    assert run.worst.needed == 9
    text = run_table(run)
    for words in ("8 x 12", " 75.0% of the steps", "2 images per second", "1.0 hours"):
        assert words in text


def test_a_training_with_a_canvas_that_does_not_fit_has_no_time():
    """Catches a time that leaves the largest canvas out, and a proposal for a smaller one."""
    run = _run_of(needed=(4, 11, 9), steps=[1, 1, 1], seconds=(2.0, None, 1.0), total=3)
    assert run.step_seconds is run.hours is run.images_per_second is None
    assert not run.fits
    assert run.worst.needed == 11
    assert "DOES NOT FIT" in run_table(run)
    assert "hours" not in run_table(run)


@needs_libtpu
@pytest.mark.slow
def test_a_whole_run_compiles_the_canvases_that_the_data_uses(tmp_path):
    """Catches canvases that no image has, classes left to be given, and images that are packed."""
    folder, file = write_coco(tmp_path / "data"), tmp_path / "run.json"
    before = sorted(folder.rglob("*"))
    arguments = f"--config {_CONFIG} --topology v5e:1x1 --whole_run --json {file}"
    overrides = {
        "data.name": "coco",
        "data.dir": folder,
        "data.canvases": "((64,64),(900,900))",
        "data.max_objects": 0,
        "data.augment.short_sides": "(32,)",
        "data.augment.max_long_side": 64,
        "data.augment.crop": 0.0,
        "model.num_classes": 0,
        "train.batch_size": 2,
        "train.duration": "5 epochs",
    }
    status, out, err = _run(
        *arguments.split(), *(f"--config.{key}={value}" for key, value in overrides.items())
    )
    assert status == 0, err
    record = json.loads(file.read_text())
    assert [canvas["canvas"] for canvas in record["canvases"]] == [[64, 64]]
    assert record["canvases"][0]["steps_of_first_epoch"] == record["steps_per_epoch"] == 3
    assert record["steps"] == 15
    least = record["canvases"][0]["roofline_seconds"]
    seconds = max(least[name] for name in ("compute", "memory", "collectives"))
    assert record["hours_at_least"] == pytest.approx(15 * seconds / 3600)
    assert record["images_per_second_at_most"] == pytest.approx(2 / seconds)
    assert "100.0% of the steps" in out
    assert sorted(folder.rglob("*")) == before


def test_a_whole_run_has_no_canvas_of_its_own():
    """Catches a flag that is ignored."""
    arguments = f"--config {_CONFIG} --topology local --whole_run --canvas 32x32"
    status, _, err = _run(*arguments.split())
    assert status == 1
    assert "--canvas" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("topology", ["h100:0", "h100:9", "h200", "h100:2x4"])
def test_gpus_are_those_of_one_machine(topology):
    """Catches a slice of TPUs that is asked for."""
    with pytest.raises(PreflightError, match="1 to 8 GPUs of one machine"):
        topology_devices(topology)


def test_without_the_compiler_for_gpus_the_message_says_how_to_get_it():
    """Catches jax's own message, which names no package."""
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("it is installed")
    with pytest.raises(PreflightError, match=r"h100:1.*pip install --no-deps jax-cuda13-plugin"):
        topology_devices("h100:1")


def test_the_operations_for_gpus_are_those_that_another_compiler_counts():
    """Catches a count of one device, and one without the backward pass."""
    config = tiny.step()
    config.train.batch_size = 2
    counted = count_operations(config, (32, 48))
    cost = Cost.of(compile_step(config, make_mesh(1), (32, 48)), 1)
    assert 0.7 * cost.flops < counted < 1.4 * cost.flops
