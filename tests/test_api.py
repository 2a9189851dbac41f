"""The public functions of the package, and the notebook that shows them."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fast_jit
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

import dn_detr_jax
import dn_detr_jax.inference.predictor as predictor_module
from dn_detr_jax.config import base_config, overridden
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.evaluation.evaluator import Evaluation, Evaluator
from dn_detr_jax.training import loop
from dn_detr_jax.training.programs import Programs
from dn_detr_jax.training.writers import read_metrics

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


@pytest.fixture(scope="module")
def steps():
    """Lets all trainings share compiled programs; returns the canvases of the steps they asked for.

    The programs depend on the config, which is the same but for keys that may change on resume.
    """
    asked, shared = [], []
    make, train_step = loop._programs, Programs.train_step

    def make_once(setup, optimization):
        if not shared:
            shared.append(make(setup, optimization))
        return shared[0]

    def recorded(self, canvas):
        asked.append(canvas)
        return train_step(self, canvas)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_programs", make_once)
        patch.setattr(Programs, "train_step", recorded)
        patch.setattr(predictor_module, "accepted_options", lambda *_: fast_jit.OPTIONS)
        yield asked


@pytest.fixture(scope="module")
def settings(digits_dir):
    """Overrides of every convenience of a training, and of what makes it small."""
    return {
        "data": {"dir": str(digits_dir)},
        "optimizer": {"schedule": "multi_step", "milestones": ("2 steps", "4 steps")},
        "train": {
            "duration": "6 steps",
            "eval_every": "2 steps",
            "checkpoint_every": "6 steps",
            "freeze": ("^backbone/",),
            "ema_decay": 0.9,
            "ema_tau": 2,
            "stop_after": 9,
        },
        "eval": {"raw": True},
        "compile": {"options": fast_jit.CONFIG, "cache_dir": ""},
    }


@pytest.fixture(scope="module")
def executed(tmp_path_factory, steps, settings):
    """Runs the cells of the notebook; returns its names and the work directory."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells[:2]] == [["parameters"], None]
    assert not any(cell["outputs"] for cell in cells)
    config = folder / "tiny.py"
    config.write_text("from data.tiny import processes as get_config\n")
    workdir = folder / "run"
    names = {"EXPERIMENT": str(config), "WORKDIR": str(workdir), "SETTINGS": settings}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells[1:]:
            exec("".join(cell["source"]), names)
    assert printed.getvalue().count("checkpoint  ") == 2
    return names, workdir


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(executed):
    """Catches cells that call what the package no longer has."""
    names, workdir = executed
    best, latest = names["evaluation"], names["latest"]
    assert set(best.metrics) >= {"AP", "AP50"} and len(best.per_class) == 10
    metrics = [line for line in read_metrics(workdir) if "eval/AP" in line]
    assert [line["step"] for line in metrics] == [2, 4, 6]
    assert latest.metrics["AP"] == metrics[-1]["eval/AP"]
    assert names["drawn"].shape == names["image"].shape


@pytest.mark.slow
def test_frozen_parameters_stay_and_the_average_is_none_of_the_parameters(executed):
    """Catches patterns, a warm-up or a raw evaluation that never reach the training."""
    _, workdir = executed
    state = arrays(workdir, 6)
    trained, average = flat(state["params"]), flat(state["ema"])
    frozen = {path for path in trained if path.startswith("backbone/")}
    for path, value in trained.items():
        assert np.array_equal(value, average[path]) == (path in frozen), path
    assert not any("backbone" in path for path in flat(state["state"]["opt_state"]))
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if "eval_raw/AP" in line] == [2, 4, 6]
    name = "train/learning_rate"
    rates = {line["step"]: line[name] for line in lines if name in line}
    wanted = [0, 5e-4, 1e-4, 1e-4, 1e-5, 1e-5]
    np.testing.assert_allclose([rates[step] for step in range(1, 7)], wanted, rtol=1e-6)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bits(
    executed, steps, settings, tmp_path, monkeypatch
):
    """Catches a count, an average or an evaluation of the conveniences that a restart changes."""
    workdir, config = tmp_path / "run", executed[0]["EXPERIMENT"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_stops", lambda self, received, step: step == 3)
        assert dn_detr_jax.train(config, workdir, **settings) is None
    early = shutil.copytree(workdir, tmp_path / "early")
    assert dn_detr_jax.train(config, workdir, **settings) is not None
    expected, found = arrays(executed[1], 6), arrays(workdir, 6)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, expected, found)

    def evaluations(folder):
        return [
            {name: value for name, value in line.items() if "time" not in name}
            for line in read_metrics(folder)
            if "eval/AP" in line
        ]

    assert evaluations(workdir) == evaluations(executed[1])

    # The AP of step 2 stays the best, so that step 4 exhausts a patience of one evaluation.
    monkeypatch.setattr(
        Evaluator,
        "__call__",
        lambda *_, **__: Evaluation({"AP": 0.0, "AP50": 0.0}, {}, {}, np.zeros((1, 1))),
    )
    monkeypatch.setattr(loop.report, "print_result", lambda *_: None)
    settings = settings | {"train": settings["train"] | {"stop_after": 1}}
    for trains in True, False:
        steps.clear()
        assert dn_detr_jax.train(config, early, **settings) is not None
        assert bool(steps) == trains
        assert max(line["step"] for line in read_metrics(early)) == 4


def arrays(workdir, step):
    """Returns all arrays of a checkpoint, read without code of this package."""
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        return {item: reader.restore(folder / item) for item in ("params", "ema", "state")}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")
