"""What the benchmarks of survival and of memory measure with; the runs themselves are theirs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import host_memory, processes, survival, trainings
from dn_detr_jax.config import validate


def test_the_slope_and_its_error_are_those_of_the_noise():
    """Catches a slope per sample, and an error that does not fall with more samples."""
    rng = np.random.default_rng(0)
    steps = np.sort(rng.uniform(1000, 2000, 200))
    found = np.array(
        [host_memory.slope(steps, 500 + 0.03 * steps + rng.normal(0, 2, 200)) for _ in range(300)]
    )
    rises, errors = found.T
    # Least squares over all samples would have this error; means over parts lose next to nothing.
    expected = 2 / np.sqrt(200) / steps.std()
    assert abs(rises.mean() - 0.03) < 4 * expected / np.sqrt(300)
    assert 0.9 * expected < rises.std() < 1.15 * expected
    assert 0.85 * expected < errors.mean() < 1.15 * expected
    assert host_memory.slope(steps, 0.5 * steps) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux only")
def test_memory_is_that_of_the_process_and_its_children():
    """Catches children that are not counted, where the workers of a loader are."""
    code = (
        "import subprocess, sys\n"
        "block = b'x' * (30 << 20)\n"
        "if len(sys.argv) > 1: child = subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE); child.stdout.readline()\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        members = processes.family(process.pid)
        assert len(members) == 2 and members[0] == process.pid
        for kind in ("Pss", "Pss_Anon"):
            alone = processes.megabytes(members[:1], kind)
            assert 30 < alone < 60 < processes.megabytes(members, kind) < 120
        process.communicate(b"\n")
    assert processes.megabytes(members[:1]) == 0


def test_the_last_line_is_the_last_complete_one(tmp_path):
    """Catches a reader that takes half a line, or all of a long file, for the state of a run."""
    assert trainings.last_line(tmp_path) == {}
    lines = [json.dumps({"step": i, "text": "x" * 100}) for i in range(1000)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert trainings.last_line(tmp_path)["step"] == 999
    path.write_text("\n".join(lines) + "\n" + '{"step": 1000')
    assert trainings.last_line(tmp_path)["step"] == 999


def test_differences_see_a_missing_and_a_changed_part():
    one = {"a": b"1", "b": b"2", "c": b"3"}
    assert survival.differences(one, dict(one)) == []
    assert survival.differences(one, {"a": b"1", "b": b"0", "d": b"3"}) == ["b", "c", "d"]


def test_the_config_is_written_as_it_is(tmp_path):
    config = host_memory.long_config()
    path = trainings.write_config(config, tmp_path)
    namespace = {}
    exec(path.read_text(), namespace)
    read = namespace["get_config"]()
    validate(read)
    assert read.to_dict() == config.to_dict()
    assert config.train.ema_decay and config.model.dropout  # what a run has to remember
