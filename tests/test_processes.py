"""The real train.py in several processes of this machine trains the same as in one.

Each process has two of the simulated devices; collectives go through Gloo. Values that are equal
bit by bit are asserted so. The order of sums over devices differs within and between processes, so
losses and parameters of one and of several processes agree to float32 rounding. Adam divides by the
size of the gradients and so amplifies the rounding of tiny gradients.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

_ROOT = Path(__file__).parent.parent
_CONFIG = _ROOT / "tests" / "data" / "tiny_processes.py"
_SECONDS = 900  # far more than needed, even on a busy machine


class Run:
    """The processes of a run, with their output in files."""

    def __init__(self, workdir, digits_dir, processes, devices, *arguments, each=None):
        self.workdir, self.outputs = Path(workdir), Path(f"{workdir}.outputs")
        self.outputs.mkdir(exist_ok=True)
        command = [sys.executable, str(_ROOT / "train.py"), f"--config={_CONFIG}"]
        command += [f"--workdir={workdir}", f"--config.data.dir={digits_dir}", *arguments]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices // processes)}
        address = f"localhost:{_free_port()}"
        self.processes = []
        for index in range(processes):
            several = [f"--coordinator_address={address}", f"--num_processes={processes}"]
            several = [*several, f"--process_id={index}"] if processes > 1 else []
            several += each[index] if each else []
            with (
                (self.outputs / f"{index}.out").open("w") as stdout,
                (self.outputs / f"{index}.err").open("w") as stderr,
            ):
                self.processes.append(
                    subprocess.Popen([*command, *several], env=env, stdout=stdout, stderr=stderr)
                )

    def wait(self, seconds=_SECONDS):
        """Returns the exit status of each process."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, index, kind="err"):
        """Returns the output of a process."""
        return (self.outputs / f"{index}.{kind}").read_text()

    def until_step(self, step):
        """Waits until a step is logged."""
        deadline = time.monotonic() + _SECONDS
        while all(line["step"] < step for line in _lines(self.workdir)):
            ended = [i for i, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, self.text(ended[0])
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()


def _free_port():
    with socket.create_server(("", 0)) as listening:
        return listening.getsockname()[1]


def _finished(workdir, digits_dir, processes, devices, *arguments):
    with Run(workdir, digits_dir, processes, devices, *arguments) as run:
        assert run.wait() == [0] * processes, "\n".join(run.text(i) for i in range(processes))
    return run


def _lines(workdir):
    path = Path(workdir) / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def _records(workdir, prefix):
    """Returns [(step, {name: value})] for names with a prefix, without times."""
    return [
        (line["step"], {name: value for name, value in line.items() if name.startswith(prefix)})
        for line in _lines(workdir)
        if any(name.startswith(prefix) for name in line)
    ]


def _arrays(workdir, step=12):
    """Returns all arrays of a checkpoint, read without code of this package."""
    folder = Path(workdir) / "checkpoints" / str(step)
    found = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "state"):
            saved = reader.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            found[item] = reader.restore(
                folder / item, ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
    return found


def _assert_same_bits(workdir, other):
    expected, got = _arrays(other), _arrays(workdir)
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    assert _records(workdir, "eval") == _records(other, "eval")


def _thresholds(records):
    """Removes the thresholds of evaluations from their records, and returns them; 0 for none."""
    names = {(i, name) for i, (_, record) in enumerate(records) for name in record}
    return {(i, k): records[i][1].pop(k) or 0.0 for i, k in sorted(names) if "threshold" in k}


def _assert_same_training(workdir, other):
    """Checks equality but for the order of sums over the devices."""
    for (step, got), (expected_step, expected) in zip(
        _records(workdir, "train/"), _records(other, "train/"), strict=True
    ):
        assert step == expected_step
        assert got == pytest.approx(expected, rel=2e-6, abs=1e-7)
    expected, got = _arrays(other)["params"], _arrays(workdir)["params"]
    # A step changes a parameter by 1e-3 at most; twelve of them by a hundred times the tolerance.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-4), expected, got)
    got, expected = _records(workdir, "eval"), _records(other, "eval")
    thresholds = [_thresholds(records) for records in (got, expected)]  # they are scores
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-4)
    # The AP depends on the last digits of scores and boxes; here it is equal.
    assert got == expected


@pytest.fixture(scope="module")
def one(tmp_path_factory, digits_dir):
    """Returns the work directory of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    _finished(workdir, digits_dir, 1, 4)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, digits_dir):
    """Returns the run of two processes with two devices each."""
    return _finished(tmp_path_factory.mktemp("two") / "run", digits_dir, 2, 4)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(one, two):
    """Catches rows on the wrong devices, losses per process, AP of a part, other noise."""
    _assert_same_training(two.workdir, one)


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(one, two):
    """Catches files of every process, lines written twice, images left out."""

    def files(workdir):
        paths = [p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file()]
        outside = [p for p in paths if p.parts[0] not in ("checkpoints", "tensorboard")]
        return sorted(outside) + sorted({Path(*p.parts[:3]) for p in paths} - set(outside))

    def without_names_of_runs(paths):
        return [p for p in paths if p.parts[0] != "tensorboard"]

    assert without_names_of_runs(files(two.workdir)) == without_names_of_runs(files(one))
    assert len(list((two.workdir / "tensorboard").iterdir())) == len(
        list((one / "tensorboard").iterdir())
    )
    assert [line["step"] for line in _lines(two.workdir)] == [line["step"] for line in _lines(one)]
    # Counts that a process has only for its rows are summed.
    assert _records(two.workdir, "data/") == _records(one, "data/")
    assert sum(record["data/dropped_objects"] for _, record in _records(one, "data/")) > 0


@pytest.mark.slow
def test_only_the_first_process_speaks(two):
    """Catches a table printed by every process."""
    assert "AP50" in two.text(0, "out") and "step 12/12" in two.text(0)
    assert two.text(1) == ""
    lines = two.text(1, "out").splitlines()  # two threads of Gloo may write two ends of lines
    assert [line for line in lines if line and not line.startswith("[Gloo]")] == []


@pytest.mark.slow
def test_a_signal_stops_all_a_lost_process_ends_the_other_and_both_resume(
    two, tmp_path, digits_dir
):
    """Catches hangs, processes that stop at different steps, damaged checkpoints, lost bits."""
    with Run(tmp_path / "run", digits_dir, 2, 4, "--config.eval.pictures=0") as run:
        run.until_step(2)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == [0, 0], run.text(0) + run.text(1)
    assert "SIGTERM: saved step" in run.text(0)
    steps = [int(p.name) for p in (run.workdir / "checkpoints").iterdir() if p.name.isdigit()]
    stopped = max(steps)
    assert 2 <= stopped < 12

    with Run(tmp_path / "run", digits_dir, 2, 4, "--config.eval.pictures=0") as run:
        run.until_step(stopped + 1)
        killed = time.monotonic()
        run.processes[1].kill()
        assert run.processes[0].wait(60) == 1
        assert time.monotonic() - killed < 30
    last = run.text(0).strip().splitlines()[-1]
    assert last.startswith("error: process 0: process 1 has ended unexpectedly"), run.text(0)
    assert "Traceback" not in run.text(0) and "Check failure" not in run.text(0)

    resumed = _finished(tmp_path / "run", digits_dir, 2, 4, "--config.eval.pictures=0")
    assert "continuing from step" in resumed.text(0)
    _assert_same_bits(run.workdir, two.workdir)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(one, two, tmp_path, digits_dir):
    """On twice the devices; catches checkpoints that depend on the number of processes."""
    workdir = shutil.copytree(two.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    run = _finished(workdir, digits_dir, 1, 8, "--config.eval.pictures=0")
    assert "continuing from step 6" in run.text(0)
    _assert_same_training(run.workdir, one)


def test_processes_with_different_configs_end_before_anything_is_compiled(tmp_path, digits_dir):
    """Catches runs that hang, or that ignore the given settings."""
    seeds = [["--config.seed=0"], ["--config.seed=1"]]
    with Run(tmp_path / "run", digits_dir, 2, 2, each=seeds) as run:
        assert run.wait() == [1, 1]
    for index in range(2):
        error = run.text(index).strip().splitlines()[-1]
        assert error.startswith(f"error: process {index}: "), run.text(index)
        assert "config.seed" in error and "compiled" not in run.text(index)
    assert not (tmp_path / "run" / "checkpoints").exists()
