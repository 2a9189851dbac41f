"""Training without an evaluation: no validation data, and the last checkpoint is the result."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import fast_jit
import pytest
from coco_directory import document, write_split
from data import tiny as tiny_config

from dn_detr_jax.data.check import check
from dn_detr_jax.data.check_report import report
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.predictor import read_run
from dn_detr_jax.training import loop

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory in the format of COCO with training images alone."""
    directory = tmp_path_factory.mktemp("data")
    path = directory / "annotations" / "instances_train.json"
    write_split(path, directory / "train", document(8))
    return directory


@pytest.fixture(scope="module")
def config(directory):
    config = tiny_config.processes()
    config.data.update(
        name="coco", dir=str(directory), labels="contiguous", canvases=((64, 64),), max_objects=4
    )
    config.data.update(eval_short_side=64, eval_max_long_side=64)
    config.data.augment.update(short_sides=(48,), max_long_side=64)
    config.model.num_classes = 3
    config.train.update(duration="3 steps", batch_size=4, eval_every="", checkpoint_every="2 steps")
    config.eval.update(batch_size=4, instability_images=0)
    config.compile.options = fast_jit.CONFIG
    return config


def test_the_last_checkpoint_is_the_result(config, directory, tmp_path, capsys, caplog):
    """Catches an evaluation, a run without its last step, and a "best" that is not found."""
    with caplog.at_level(logging.INFO):
        assert loop.train(config, tmp_path) is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert not [key for line in lines for key in line if key.startswith("eval")]
    told = [r for r in caplog.messages if "no evaluation (train.eval_every): the last" in r]
    assert len(told) == 1
    printed = capsys.readouterr().out
    assert "AP" not in printed and f"checkpoint  {tmp_path / 'checkpoints' / '3'}\n" in printed
    drawn = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert {"noised_boxes", "curves"} <= drawn and "detections" not in drawn
    assert read_run(tmp_path).step == 3  # its default is "best"


def test_missing_validation_data_names_the_ways_out(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.train.eval_every = "1 epochs"
    with pytest.raises(DataError, match=r"prepare_split=0\.2; or .*--config\.train\.eval_every="):
        loop.train(changed, tmp_path)


def test_check_and_canvases_need_no_validation_data(config, directory):
    """Catches commands that ask for a split that no training would read."""
    train, validation = check(config.data)
    assert not train.findings.errors and validation.findings.errors
    splits = check(config.data, evaluates=False)
    assert [split.name for split in splits] == ["train"]
    assert re.search(r"^0 errors", report(splits), re.MULTILINE)
    command = [sys.executable, "-m", "dn_detr_jax", "canvases", "--images=50", "--num_canvases=1"]
    command += [f"--config={ROOT / 'tests' / 'data' / 'tiny.py'}", "--config.data.name=coco"]
    command += [f"--config.data.dir={directory}", "--config.train.eval_every="]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "8 training and 0 validation images" in done.stdout, done.stderr
