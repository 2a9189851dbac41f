"""The measuring parts of the survival and memory benchmarks, without the runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import host_memory, processes, public_cases, survival, trainings
from dn_detr_jax.config import validate
from dn_detr_jax.data.datasets import SPLITS, open_dataset
from dn_detr_jax.errors import ConfigError


def test_the_slope_and_its_error_are_those_of_the_noise():
    """Catches a slope per sample, and an error that does not fall with more samples."""
    rng = np.random.default_rng(0)
    steps = np.sort(rng.uniform(1000, 2000, 200))
    found = np.array(
        [host_memory.slope(steps, 500 + 0.03 * steps + rng.normal(0, 2, 200)) for _ in range(300)]
    )
    rises, errors = found.T
    # The error of least squares over all samples; means over parts lose little.
    expected = 2 / np.sqrt(200) / steps.std()
    assert abs(rises.mean() - 0.03) < 4 * expected / np.sqrt(300)
    assert 0.9 * expected < rises.std() < 1.15 * expected
    assert 0.85 * expected < errors.mean() < 1.15 * expected
    assert host_memory.slope(steps, 0.5 * steps) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))


def test_a_training_has_enough_logged_steps_for_the_slope():
    """Catches a slope of no samples, found out after the training."""
    config = host_memory.long_config()
    assert host_memory.checked_steps(config) == 2000
    config.train.duration = "100 steps"
    assert host_memory.checked_steps(config) == 100
    wrongs = ("duration", "99 steps"), ("log_every", "6 steps"), ("duration", "1 epochs")
    for key, value in wrongs:
        wrong = config.copy_and_resolve_references()
        wrong.train[key] = value
        with pytest.raises(ConfigError, match=r"train\.duration"):
            host_memory.checked_steps(wrong)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux only")
def test_memory_is_that_of_the_process_and_its_children():
    """Catches uncounted child processes, such as the workers of a loader."""
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
    """Catches a reader that accepts half a line, or reads all of a long file."""
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


def test_a_row_is_good_only_if_all_ended_as_they_must():
    """Catches a survival benchmark that can't fail."""
    rows = [
        {"run": "undisturbed, twice", "different": 0},
        {"run": "under SIGKILL", "different": 0, "statuses": "-9"},
        {"run": "under SIGINT", "different": 0, "statuses": "0"},
        {"run": "twice", "different": 0, "runs": 3, "refused": 3},
        {"run": "beside", "different": 0, "runs": 3, "evaluations": 5, "tables": 5},
        {"run": "full disk", "different": 0, "runs": 3, "full": 2, "told": 2},
    ]
    assert all(map(survival.is_good, rows))
    worse = {"statuses": "0, 130", "refused": 2, "tables": 4, "told": 1}
    for row in rows:
        assert not survival.is_good(row | {"different": 1})
        for name in row.keys() & worse.keys():
            expected = row["run"] == "under SIGKILL"  # whose status is that of the signal
            assert survival.is_good(row | {name: worse[name]}) == expected


def test_outcomes_of_public_cases_are_compared():
    """Catches a runner that accepts every outcome."""
    expected = public_cases.Expected(("AP 0.283",), ("mixed up",), 0, r"logged (.*), kept (.*)")
    good = "AP 0.283\nlogged 7, kept 7\n"
    assert public_cases.failures(good, 0, expected) == []
    wrong = {
        good.replace("283", "106"): "is not printed",
        f"{good}classes mixed up": "is printed",
        good.replace("kept 7", "kept 6"): "7 and 6 differ",
        f"{good}Traceback (most recent call last):": "Traceback",
    }
    for output, words in wrong.items():
        (found,) = public_cases.failures(output, 0, expected)
        assert words in found
    assert public_cases.failures(good, 1, expected) == ["exit status 1, expected 0"]


def test_the_data_of_the_survival_benchmark_can_be_trained_on(tmp_path):
    """Catches boxes beyond their image, and splits with other categories."""
    trainings.write_coco_data(tmp_path / "data", images=20)
    config = survival.survival_config()
    config.data.update(dir=str(tmp_path / "data"), packed_dir=str(tmp_path / "packed"))
    training, validation = (open_dataset(config.data, split) for split in SPLITS)
    assert (len(training), len(validation)) == (20, 2)
    assert training.categories == validation.categories and len(training.categories) == 10
    corners = training.annotations.corners(np.arange(len(training.annotations.ids)))
    assert len(corners) >= 20 and corners.min() >= 0
    assert (corners.max(axis=0) <= (96, 80, 96, 80)).all()


def test_the_config_is_written_as_it_is(tmp_path):
    config = host_memory.long_config()
    path = trainings.write_config(config, tmp_path)
    namespace = {}
    exec(path.read_text(), namespace)
    read = namespace["get_config"]()
    validate(read)
    assert read.to_dict() == config.to_dict()
    assert config.train.ema_decay and config.model.dropout  # the state of a run
