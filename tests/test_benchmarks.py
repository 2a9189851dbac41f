"""The benchmarks run, report settings that fail, and cut the model where they claim.

No times are tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from data import tiny as tiny_config
from fast_jit import fast_jit
from tiny_detector import denoising_queries, image_batch, object_noise

from benchmarks import common, gpu_plan, matching, peer, start, step_parts, train_step
from dn_detr_jax import denoising
from dn_detr_jax.config import base_config
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.state import abstract_state
from dn_detr_jax.training.step import abstract_batch, jit_train_step

_ROOT = Path(__file__).parent.parent


def _run(benchmark, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_step_is_timed(tmp_path):
    """Catches a benchmark that no longer fits the step, and inconsistent figures."""
    out = tmp_path / "rows.json"
    done = _run(
        "train_step",
        f"--config={_ROOT / 'tests' / 'data' / 'tiny.py'}",
        "--config.model.decoder_layers=1",
        "--config.model.encoder_layers=0",
        "--config.dn.groups=0",
        "--config.model.backbone.stages=1",
        "--canvas=32x32",
        "--batch_size=2",
        "--rounds=1",
        "--steps=1",
        "--noparts",
        f"--json={out}",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["step_s"]["median"] > 0
    assert row["images_per_s"] == pytest.approx(2 / row["step_s"]["median"], rel=0.01)
    assert row["gflop_per_step"] > 0 and row["planned_gb"] > 0
    assert row["mfu"] is None  # the peak of this device is unknown
    assert 0 <= row["matching_share"] < 1
    assert "| 32x32 " in done.stdout


def test_deformable_sampling_is_compared(tmp_path):
    """Catches arguments that no longer fit the sampling, and another result than PyTorch's."""
    out = tmp_path / "rows.json"
    arguments = "--canvas=32x48", "--part=encoder", "--rounds=1", "--steps=1", f"--json={out}"
    done = _run("deformable", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    assert min(row["cpu_s"]["median"] for row in rows) > 0
    assert "| 32x48 " in done.stdout
    if importlib.util.find_spec("torch") is None:
        assert done.stderr.count("PyTorch is not installed") == 1
        assert not any("torch_cpu_s" in row for row in rows)
    else:
        assert max(row["difference"] for row in rows) < 1e-5


def test_the_parts_of_matching_are_timed():
    """Catches arguments that no longer fit the matching; SciPy is a part of the whole callback."""
    arguments = matching.predictions(2, 3, 9, objects=4, slots=5, classes=7)
    assert arguments["valid"].sum(axis=1).tolist() == [4, 4]
    assert arguments["pred_logits"].shape == (3, 2, 9, 7)
    times = matching.measure_alone(arguments, repeats=1)
    assert times.keys() == {"cost_ms", "solve_ms", "transfer_ms", "all_ms"}
    assert min(times.values()) > 0


def test_the_fixed_assignment_is_an_assignment():
    """Catches queries out of range or given twice, and padding that gets one."""
    valid = np.array([[True, True, False], [True, False, False]])
    fixed = matching._fixed_assignment(np.zeros((2, 4, 5, 3), np.float32), valid)
    assert np.asarray(fixed).tolist() == [[[0, 1, -1]] * 4, [[0, -1, -1]] * 4]


def test_a_cut_model_gives_what_the_whole_one_gives(tiny):
    """Catches a measured part that is not a part of this model."""
    batch = {name: jax.numpy.asarray(value) for name, value in image_batch().items()}
    dn = denoising_queries(batch, object_noise())

    @fast_jit
    def run(params, given):
        return step_parts.run_cut(tiny.model, params, batch, dn, given)

    outputs, results = run(tiny.params, {})
    whole = tiny.train(tiny.params, batch, object_noise())
    got = denoising.split(outputs["pred_boxes"], dn)
    np.testing.assert_allclose(got[1], whole.match["pred_boxes"], atol=1e-5)

    without = {k: v for k, v in tiny.params.items() if k not in ("backbone", "encoder")}
    zeros = jax.tree.map(np.zeros_like, {k: tiny.params[k] for k in ("backbone", "encoder")})
    again, _ = run(without | zeros, results)
    np.testing.assert_allclose(again["pred_logits"], outputs["pred_logits"], atol=1e-5)
    changed, _ = run(without | zeros, jax.tree.map(np.zeros_like, results))
    assert not np.allclose(changed["pred_logits"], outputs["pred_logits"], atol=1e-3)


@pytest.mark.parametrize("name", ["dn_dab_detr", "dn_deformable_detr", "dn_dino_detr"])
def test_the_step_of_every_variant_has_parts(name):
    """Catches a variant whose step cannot be cut, and parameters that belong to no part."""
    config = tiny_config.shared() if name == "dn_dab_detr" else tiny_config.levels(name)
    config.data.max_objects = 3
    mesh, model = make_mesh(1), build_model(config.model)
    shapes = abstract_params(model)
    optimizer, _ = make_optimizer(config, shapes, 10, 100)
    step = SimpleNamespace(
        model=model,
        config=config,
        mesh=mesh,
        optimizer=optimizer,
        mask=jax.tree.map(lambda _: True, shapes),
        state=abstract_state(model, optimizer, config, mesh),
        batch=abstract_batch(config, "train", mesh),
    )
    gradients = []

    def traced(function, *arguments):
        shapes = jax.eval_shape(function, *arguments)
        if function.__name__ == "run":
            gradients.append(shapes[1][0])
        return lambda *_: shapes

    calls = step_parts.programs(step, traced)
    assert list(calls) == ["backbone", "encoder", "decoder", "matching", "losses", "optimizer"]
    assert sorted(key for owned in gradients for key in owned) == sorted(step.state.params)
    for call in calls.values():
        call()


def _worker(code, seconds=60.0):
    start = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from benchmarks import common\n"
    return common.Worker([sys.executable, "-c", start + code], time.monotonic() + seconds)


def test_a_worker_answers_through_what_libraries_print():
    """Catches answers that the output of a library breaks, and lost rounds."""
    worker = _worker(
        "import itertools, os\n"
        "count = itertools.count()\n"
        "def more():\n"
        "    print('noise'); os.system('echo noise'); return {'round': next(count)}\n"
        "common.answer(lambda: print('noise') or {'ready': True}, more)"
    )
    try:
        assert worker.ready == {"ready": True}
        assert [worker.ask(time.monotonic() + 60) for _ in range(2)] == [{"round": 0}, {"round": 1}]
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("raise MemoryError('RESOURCE_EXHAUSTED: Out of memory allocating')", 60, "out of memory"),
        ("raise ValueError('a wrong\\nvalue')", 60, "value"),
        ("sys.exit(3)", 60, "ended with status 3"),
        ("import time; time.sleep(60)", 0.5, "out of time"),
    ],
)
def test_a_worker_that_fails_says_why(code, seconds, reason):
    """Catches a benchmark that waits forever, or ends with its worker."""
    with pytest.raises(common.WorkerError, match=f"^{reason}$"):
        _worker(code, seconds)


def test_peaks_are_those_of_the_device():
    """Catches the rate of bfloat16 for float32 on a GPU, and a figure for an unknown device."""
    assert common.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert common.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert common.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert common.peak_flops("cpu", "float32") is None


def test_a_table_has_the_columns_of_all_rows():
    """Catches rows of failed settings that push cells into wrong columns."""
    times = {"median": 0.12345, "min": 0.1, "max": 1.0}
    rows = [{"a": 1, "s": times}, {"a": 2, "failed": "out of memory", "parts": {"x": 1}}]
    lines = [[cell.strip() for cell in line.split("|")] for line in common.table(rows).splitlines()]
    assert lines[0] == ["", "a", "s", "failed", ""]
    assert lines[2] == ["", "1", "0.1235 (0.1 to 1)", "", ""]
    assert lines[3] == ["", "2", "", "out of memory", ""]


_CONTENDER = """
import os, sys; sys.path.insert(0, {root!r})
from benchmarks import common
if {name!r} == "wrong": raise ValueError("wrong")
device = {{"platform": {platform!r}, "kind": {platform!r}, "count": 1}}
def one_round():
    with open({log!r}, "a") as log: log.write({name!r} + " ")
    return {{"seconds": 1.0}}
common.answer(lambda: {{"device": device}}, one_round)
"""


@pytest.mark.parametrize(
    ("platform", "order"), [("cpu", "first last first last "), ("gpu", "first first last last ")]
)
def test_contenders_take_turns(monkeypatch, tmp_path, platform, order):
    """Catches rounds in the wrong order, and a failed contender that ends the others."""
    log = tmp_path / "log"

    def command(benchmark, setting):
        values = {"root": str(_ROOT), "name": setting.contender, "platform": platform}
        return [sys.executable, "-c", _CONTENDER.format(**values, log=str(log))]

    flags = SimpleNamespace(timeout=60, time_limit=100, rounds=2, interleave=None, json="")
    monkeypatch.setattr(common, "FLAGS", flags)
    monkeypatch.setattr(common, "worker_command", command)
    names = "first", "wrong", "last"
    settings = [common.Setting((64, 96), 2, "float32", name) for name in names]
    results = dict(common.take_turns("peer", settings, common.Report("peer")))
    assert log.read_text() == order
    assert results[settings[1]]["failed"] == "ValueError: wrong"
    for setting in settings[::2]:
        assert [answer["seconds"] for answer in results[setting]["rounds"]] == [1.0, 1.0]
    flags.time_limit = 0
    (late,) = dict(common.take_turns("peer", settings[:1], common.Report("peer"))).values()
    assert late["failed"] == "not run: over 0 s"


def test_ratios_are_to_the_fastest_peer_of_the_same_setting():
    """Catches a comparison with a peer of another dtype or batch, or with the slower one."""

    def row(contender, dtype, median):
        setting = common.Setting((64, 96), 2, dtype, contender)
        times = {"median": median, "min": median, "max": median}
        return {"contender": contender} | setting.columns() | {"step_s": times}

    rows = [
        row("ours", "float32", 2.0),
        row("peer", "float32", 8.0),
        row("peer_compiled", "float32", 6.0),
        row("ours", "bfloat16", 1.0),
        {**row("peer", "bfloat16", 1.0), "failed": "out of memory"},
    ]
    del rows[-1]["step_s"]
    peer.add_ratios(rows, "step_s")
    assert [row.get("ratio") for row in rows] == [3.0, 0.75, 1.0, None, None]


@pytest.mark.parametrize("name", ["dn_dab_detr", "dn_deformable_detr"])
def test_the_peer_is_the_same_architecture(name):
    """Catches a comparison with a smaller or larger model; all but the queries is equal."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks import torch_peer

    config = base_config(name)
    config.model.update(encoder_layers=1, decoder_layers=2)
    ours = abstract_params(build_model(config.model))
    assert ours.pop("label_embedding").shape == (92, 255)
    model = torch_peer.build(config, torch.device("cpu"))
    found = torch_peer.count_parameters(model)
    if name == "dn_deformable_detr":  # anchors, and in the peer points, with their embeddings
        for part in ("anchors", "content", "class_head_1"):  # the peer has one head for all layers
            del ours[part]
        for of_queries in ("query_scale", "reference_point_head"):
            del ours["decoder"][of_queries]
        points = model.model.query_position_embeddings, model.model.reference_points
        found -= sum(p.numel() for module in points for p in module.parameters())
    assert found == sum(leaf.size for leaf in jax.tree.leaves(ours))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 11
    assert all("embedder" in name or "stages.0" in name for name in frozen)


def test_flops_are_counted_where_jax_counts_none(monkeypatch):
    """Catches rows without flops on a GPU, where jax counts none, and a different count."""
    config = tiny_config.shared()
    config.model.update(encoder_layers=0, decoder_layers=1)
    config.model.backbone.stages, config.dn.groups = 1, 0
    model, mesh = build_model(config.model), make_mesh(1, jax.devices("cpu"))
    shapes = abstract_params(model)
    step = object.__new__(train_step.Step)  # without compiling it
    step.config, step.mask = config, jax.tree.map(lambda _: True, shapes)
    step.optimizer, _ = make_optimizer(config, shapes, 10, 100)
    made = jit_train_step(
        model=model, optimizer=step.optimizer, trainable=step.mask, config=config, mesh=mesh
    )
    monkeypatch.setattr(train_step, "jit_train_step", lambda **_: made)  # traced only once
    state = abstract_state(model, step.optimizer, config, mesh)
    step.lowered = made.lower(state, abstract_batch(config, "train", mesh))
    counted = step.flops()
    assert counted == step.lowered.cost_analysis()["flops"] > 1e6
    step.lowered = SimpleNamespace(cost_analysis=lambda: None)
    assert step.flops() == counted


# --- start ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at the process in /proc")
def test_a_start_is_measured_by_its_own_seconds_and_log():
    """Catches CPU seconds of another unit, and programs of the log that are not found."""
    before = time.process_time()
    assert before - 0.1 <= start.cpu_seconds(os.getpid()) <= time.process_time() + 0.1
    log = "10:00:01 compiled train for 8 x 9 in 2.0 s, from the cache\n10:00:02 other\n"
    assert start.compiled(log) == ["train for 8 x 9 in 2.0 s, from the cache"]


# --- what the compiler plans for a GPU ------------------------------------------------------------


def test_kernels_are_those_of_the_entry():
    """Catches counted operations inside other kernels, and missed results of several arrays."""
    program = """%fused (p: f32[]) -> f32[] {
  ROOT %copy.1 = f32[] copy(%p)
}

ENTRY %main (a: f32[]) -> (f32[], f32[]) {
  %a = f32[] parameter(0)
  %fusion.1 = (f32[], f32[]) fusion(%a), kind=kLoop, calls=%fused
  %get-tuple-element = f32[] get-tuple-element(%fusion.1), index=0
  %call.2 = (f32[2]{0}, s8[8]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %copy = f32[] copy(%get-tuple-element)
}
"""
    assert gpu_plan.count_kernels(program) == 3


def test_a_step_is_compiled_for_gpus_that_are_not_there(tmp_path):
    """Catches an attention that cuDNN refuses, and one that still keeps its scores."""
    pytest.importorskip("jax_cuda13_plugin")
    config, out = _ROOT / "tests" / "data" / "tiny.py", tmp_path / "rows.json"
    arguments = "--batch_size=4", "--devices=2", f"--json={out}"
    done = _run("gpu_plan", f"--config={config}", *arguments)
    assert done.returncode == 0, done.stderr
    kept, recomputed, fused = json.loads(out.read_text())["rows"]
    attentions = 1 + 2 * 2  # of one encoder and two decoder layers
    assert fused["cudnn_attentions"] == 2 * attentions  # forward and backward
    assert kept["cudnn_attentions"] == recomputed["cudnn_attentions"] == 0
    assert fused["temporaries_gib"] <= kept["temporaries_gib"] >= recomputed["temporaries_gib"]
    assert kept["collectives"] == fused["collectives"] > 0 < kept["kernels"]
