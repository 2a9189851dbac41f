"""The real train.py on a tiny detector: interruptions, evaluation, errors, output files."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from PIL import Image

from dn_detr_jax.checkpoints.lock import WorkdirLock
from dn_detr_jax.commands import command_line, train
from dn_detr_jax.training import stop

_ROOT = Path(__file__).parent.parent
_CONFIG = _ROOT / "tests" / "data" / "tiny.py"
_SMALLER = _ROOT / "tests" / "data" / "tiny_processes.py"


def _command(workdir, digits_dir, *arguments, config=_CONFIG):
    return [
        sys.executable,
        str(_ROOT / "train.py"),
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.dir={digits_dir}",
        "--config.model.encoder_layers=0",  # compiles faster
        *arguments,
    ]


def _run(workdir, digits_dir, *arguments, config=_CONFIG):
    return subprocess.run(
        _command(workdir, digits_dir, *arguments, config=config),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _lines(workdir):
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # being written now
            break
    return found


def _interrupt(workdir, digits_dir, number, at_step):
    """Runs until `at_step` is logged, then sends the signal; returns (exit status, stderr)."""
    command = _command(workdir, digits_dir, "--config.eval.pictures=0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 500
        while all(line["step"] < at_step for line in _lines(workdir)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        return process.returncode, stderr


def _arrays(workdir, step):
    """Returns all arrays of a checkpoint, read without code of this package."""
    folder = Path(workdir) / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        return {item: reader.restore(folder / item) for item in ("params", "state")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_dir):
    """Returns the work directory and the output of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("finished")
    done = _run(workdir, digits_dir)
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.mark.smoke
@pytest.mark.slow
def test_killed_and_terminated_run_ends_like_an_undisturbed_one(
    finished, tmp_path_factory, digits_dir
):
    """Catches state outside the checkpoint: data order, noise, schedule, matching of last epoch.

    The last start is profiled, which must change nothing.
    """
    workdir = tmp_path_factory.mktemp("interrupted")
    status, _ = _interrupt(workdir, digits_dir, signal.SIGKILL, at_step=3)
    assert status == -signal.SIGKILL
    status, stderr = _interrupt(workdir, digits_dir, signal.SIGINT, at_step=4)
    assert status == 0, stderr
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 4 <= stopped < 8, stderr
    assert f"Ctrl-C: saved step {stopped}; the same command continues" in stderr
    done = _run(workdir, digits_dir, "--config.train.profile=1 steps", "--config.eval.pictures=0")
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {stopped}" in done.stderr
    assert "steps 8 to 8 profiled" in done.stderr
    assert [path.stat().st_size > 0 for path in workdir.glob("profile/**/*.xplane.pb")] == [True]

    expected, got = _arrays(finished[0], 8), _arrays(workdir, 8)
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    jax.tree.map(np.testing.assert_array_equal, expected, got)

    def evaluations(folder):
        times = ("time", "time/eval_seconds")
        lines = [line for line in _lines(folder) if "eval/AP" in line]
        return [{k: v for k, v in line.items() if k not in times} for line in lines]

    assert evaluations(workdir) == evaluations(finished[0])
    assert [line["step"] for line in evaluations(workdir)] == [3, 6, 8]
    last = evaluations(workdir)[-1]
    assert {"eval/threshold", "eval/F1", "eval_class_F1/3"} <= last.keys()
    layers = {name for name in last if name.startswith("eval/instability")}
    assert layers == {"eval/instability", "eval/instability_layer_1"}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at the process in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_up_ends_at_once_with_status_0(tmp_path, digits_dir, number):
    """Catches a job that counts as failed if it is preempted before its first step."""
    command = _command(tmp_path, digits_dir)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
        handled = 0
        while not handled >> (signal.SIGTERM - 1) & 1:  # its handler is installed last
            assert time.monotonic() < deadline
            time.sleep(0.01)
            handled = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert stderr == f"{name}: ended; nothing was to be saved; the same command continues\n"
    assert not (tmp_path / "checkpoints").exists()


def test_output_ends_with_table_checkpoint_and_images(finished):
    workdir, done = finished
    tail = done.stdout.strip().splitlines()
    assert tail[-2].split()[0] == "checkpoint" and Path(tail[-2].split()[1]).is_dir()
    assert tail[-1].split() == ["pictures", str(workdir / "pictures")]
    assert re.search(r"AP +@\[ IoU=0.50:0.95 .*= 0\.\d{3}", done.stdout)
    for name in ("detections", "attention_mask", "noised_boxes", "curves"):
        with Image.open(workdir / "pictures" / f"{name}.png") as image:
            assert min(image.size) > 200
    assert list((workdir / "tensorboard").iterdir())


def test_metrics_file_holds_every_term_and_is_finite(finished):
    """Catches loss terms that are not logged, or logged for the wrong layers."""
    logged = [line for line in _lines(finished[0]) if "train/loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 9))
    names = {
        f"train/{part}{term}{layer}"
        for part in ("", "dn_")
        for term in ("loss_ce", "loss_bbox", "loss_giou")
        for layer in ("", "_0")
    }
    names |= {f"train/{norm}_norm" for norm in ("grad", "update", "param")}
    names |= {"train/learning_rate", "time/images_per_second", "time/data_wait_seconds"}
    names |= {"time/matching_seconds", "train/class_error", "train/cardinality_error"}
    for line in logged:
        assert names <= line.keys()
        assert all(math.isfinite(line[name]) for name in names)
        weighted = sum(
            weight * line[f"train/{part}{term}{layer}"]
            for term, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2))
            for part in ("", "dn_")
            for layer in ("", "_0")
        )
        assert weighted == pytest.approx(line["train/loss"], rel=1e-5)
    assert logged[0]["train/learning_rate"] == 0  # warm-up starts there
    assert logged[0]["train/update_norm"] == 0 < logged[1]["train/update_norm"]


@pytest.mark.smoke
@pytest.mark.slow
def test_eval_only_prints_the_table_of_the_training(finished, digits_dir):
    """Catches another result, a rewritten file of the run, and a lock that excludes evaluation.

    A file blocks the folder of the results; the table must be printed nevertheless.
    """
    workdir, trained = finished
    (workdir / "evaluations").write_text("")
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()}
    lock = WorkdirLock(workdir)  # as of a training that goes on
    done = _run(workdir, digits_dir, "--eval_only")
    lock.release()
    assert done.returncode == 0, done.stderr
    table = trained.stdout[: trained.stdout.index("pictures ")]
    assert done.stdout == table
    after = {p: (p.stat().st_ino, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()}
    lock_file = workdir / "lock"
    assert after | {lock_file: None} == before | {lock_file: None}
    for warning in ("the evaluation is not recorded", "the figures are not complete"):
        assert f"{warning}: " in done.stderr


def test_a_second_training_in_a_work_directory_is_refused(tmp_path, digits_dir):
    """Catches two trainings that delete each other's unfinished checkpoints."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    lock = WorkdirLock(workdir)
    done = _run(workdir, digits_dir)
    lock.release()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {workdir}: in use by process {os.getpid()} on ")
    assert "compiled" not in done.stderr
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "lock"]


def test_loss_that_is_not_finite_ends_the_run(tmp_path, digits_dir):
    """Catches a run that continues with NaN, or saves it."""
    done = _run(tmp_path, digits_dir, "--config.optimizer.learning_rate=1e30", config=_SMALLER)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    pattern = r"error: step [2-5]: not finite: \w+.*; batch of images (\d+, ){7}\d+\. "
    assert re.match(pattern, last), last
    assert "optimizer.learning_rate" in last
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved, default=0) < int(re.search(r"step (\d+)", last)[1])
    for step in saved:
        jax.tree.map(
            lambda x: np.testing.assert_array_equal(np.isfinite(x), True), _arrays(tmp_path, step)
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.model.num_header=2"], ["num_header", "num_heads"]),
        (["--config.model.num_heads=many"], ["num_heads", "many"]),
        (["--config.model.num_classes=91"], ["num_classes", "91", "10"]),
        (["--config.train.batch_size=9", "--config.mesh.data=2"], ["batch_size", "9", "2"]),
        (["--config.data.dir=/proc/nothing"], ["/proc/nothing"]),
        (["--config.data.name=pets"], ["pets", "digits"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
        (["--config.mesh.data=4"], ["mesh.data", "4"]),
        (["--eval_only"], ["no complete checkpoint"]),
        (["--config.data.canvases=((64, 64),)"], ["canvases", "128"]),
        (["--config.compile.options=('cpu:xla_fast=1',)"], ["compile.options", "xla_fast"]),
        (["--config.compile.attention=cudnn", "--config.model.dtype=bfloat16"], ["cudnn", "cpu"]),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if value[0].startswith("--") else "",
)
def test_wrong_input_is_one_line_and_an_exit_status(
    arguments, words, tmp_path, digits_dir, monkeypatch, capsys, caplog
):
    """Catches tracebacks, and errors after minutes of compiling.

    Runs in this process, which has imported JAX. Handlers of signals and of the log would stay.
    """
    monkeypatch.setattr(sys, "argv", _command(tmp_path / "run", digits_dir, *arguments)[1:])
    monkeypatch.setattr(train, "log_to_terminal", lambda *_: None)
    monkeypatch.setattr(stop, "end_on_signals", lambda *_: None)
    before = set(flags.FLAGS)
    try:
        with caplog.at_level(logging.INFO, "dn_detr_jax"), pytest.raises(SystemExit) as ended:
            command_line.run_command(train, "python train.py")
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    message = ended.value.code  # Python prints it on stderr, and the status is 1
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert "compiled" not in caplog.text
    assert "".join(capsys.readouterr()) == ""
