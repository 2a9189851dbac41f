"""The sample of COCO 2017 that may lie beside the repository, for tests on real photographs."""

import subprocess
from pathlib import Path

import pytest


def _beside_the_repository() -> Path:
    """Returns `../shared/coco_sample` beside the repository or the main one of a worktree."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        root = Path(found.stdout.strip()).parent
    return root.parent / "shared" / "coco_sample"


COCO_SAMPLE = _beside_the_repository()

needs_coco_sample = pytest.mark.skipif(
    not COCO_SAMPLE.is_dir(), reason="the sample of COCO 2017 is missing"
)
