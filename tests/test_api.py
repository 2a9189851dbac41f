"""The public functions of the package, and the notebook that shows them."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import fast_jit
import pytest

import dn_detr_jax.inference.predictor as predictor_module
from dn_detr_jax.config import base_config, overridden
from dn_detr_jax.errors import ConfigError

_ROOT = Path(__file__).parent.parent
_NOTEBOOK = _ROOT / "docs" / "notebook.ipynb"

_IMPORT = """
import sys
import dn_detr_jax
try:
    dn_detr_jax.train("digits", "runs/none", train={"batch_size": 0})
except dn_detr_jax.errors.ConfigError as error:
    print(error)
heavy = {"jax", "flax", "orbax", "matplotlib", "cv2", "pycocotools"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_and_a_wrong_value_need_no_jax():
    """Catches seconds of start-up before a notebook reports a wrong value."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "config.train.batch_size = 0: an integer >= 1\n"


def test_overrides_are_sections_or_dotted_keys_and_leave_the_config():
    config = base_config()
    changed = overridden(
        config, {"seed": 3, "train": {"batch_size": 4}, "data.augment": {"flip": 0}, "dn.groups": 0}
    )
    assert (changed.seed, changed.train.batch_size, changed.dn.groups) == (3, 4, 0)
    assert changed.data.augment.flip == 0.0
    assert config == base_config()
    same = overridden(changed, {"seed": 0, "train.batch_size": 16, "dn": {"groups": 5}})
    assert overridden(same, {"data.augment.flip": config.data.augment.flip}) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train": {"batch": 4}}, r"config\.train\.batch = 4: no such key"),
        ({"optimiser": {"learning_rate": 1.0}}, r"no such key; did you mean optimizer\.learning_"),
        ({"train": 4}, r"config\.train = 4: no such key"),
        ({"train": {"batch_size": "four"}}, r"batch_size = 'four': an integer >= 1"),
        ({"dn.groups": 2.5}, r"config\.dn\.groups = 2\.5: an integer >= 0"),
    ],
)
def test_wrong_overrides_are_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        overridden(base_config(), overrides)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, digits_dir, monkeypatch):
    """Catches cells that call what the package no longer has."""
    notebook = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells[:2]] == [["parameters"], None]
    assert not any(cell["outputs"] for cell in cells)
    config = tmp_path / "tiny.py"
    config.write_text("from data.tiny import processes as get_config\n")
    monkeypatch.setattr(predictor_module, "accepted_options", lambda *_: fast_jit.OPTIONS)
    settings = {
        "data": {"dir": str(digits_dir)},
        "train": {"duration": "3 steps", "eval_every": "2 steps"},
        "compile": {"options": fast_jit.CONFIG, "cache_dir": ""},
    }
    names = {"EXPERIMENT": str(config), "WORKDIR": str(tmp_path / "run"), "SETTINGS": settings}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells[1:]:
            exec("".join(cell["source"]), names)
    best, latest = names["evaluation"], names["latest"]
    assert set(best.metrics) >= {"AP", "AP50"} and len(best.per_class) == 10
    metrics = [line for line in names["read_metrics"](tmp_path / "run") if "eval/AP" in line]
    assert [line["step"] for line in metrics] == [2, 3]
    assert latest.metrics["AP"] == metrics[-1]["eval/AP"]
    assert printed.getvalue().count("checkpoint  ") == 2
    assert names["drawn"].shape == names["image"].shape
