"""Steps that are not finite: their detection, the report, and a run that skips them."""

import copy
import json

import fast_jit
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data import tiny as tiny_config

from dn_detr_jax.config import base_config
from dn_detr_jax.errors import TrainingError
from dn_detr_jax.training import loop
from dn_detr_jax.training.nonfinite import NonFiniteGuard, unless_nonfinite
from dn_detr_jax.training.state import TrainState

_FINE = {"loss": 2.0, "loss_bbox": 1.0, "grad_norm": 3.0, "nonfinite_costs": 0.0}


def _state(step, value):
    return TrainState(jnp.int32(step), {"w": jnp.float32([value, 0.1])}, (jnp.int32(step),), None)


@pytest.mark.parametrize(
    ("change", "skipped"),
    [
        ({}, False),
        ({"loss_bbox": np.nan}, True),
        ({"grad_norm": np.inf}, True),
        ({"grad_norm": -np.inf}, True),
        ({"nonfinite_costs": 1.0}, True),
        ({"loss": 3e38, "grad_norm": 3e38}, False),  # their sum overflows, they do not
    ],
)
def test_the_update_is_kept_if_all_is_finite(change, skipped):
    """Catches a check of the loss alone; only gradients or costs may be not finite."""
    metrics = {name: jnp.float32(value) for name, value in (_FINE | change).items()}
    state, flag = unless_nonfinite(_state(5, 2.0), _state(4, 1.0), metrics)
    assert bool(flag) == skipped
    assert state.step == 5
    kept = _state(4, 1.0) if skipped else _state(5, 2.0)
    np.testing.assert_array_equal(state.params["w"], kept.params["w"])
    assert state.opt_state[0] == kept.opt_state[0]


def test_a_new_state_that_is_not_finite_leaves_no_trace_in_the_old_one():
    """Catches a mask by multiplication; 0 times NaN is NaN."""
    metrics = {name: jnp.float32(value) for name, value in (_FINE | {"loss": np.nan}).items()}
    state, _ = unless_nonfinite(_state(5, np.nan), _state(4, 1.0), metrics)
    np.testing.assert_array_equal(state.params["w"], np.float32([1.0, 0.1]))


_NAMES = [*sorted(_FINE), "skipped"]


def _rows(*changes):
    return np.float32([[(_FINE | {"skipped": 0} | c)[name] for name in _NAMES] for c in changes])


def _guard(limit=10, skipped=0, images=4):
    config = base_config()
    config.max_skipped_steps = limit
    return NonFiniteGuard(config, lambda step: 100 * step + np.arange(images), skipped)


def test_means_are_those_of_the_steps_that_were_not_skipped():
    told = []
    bad = {"loss": np.nan, "loss_bbox": np.nan, "skipped": 1}
    means = _guard().means(7, _NAMES, _rows({"loss": 1.0}, bad, {"loss": 4.0}), told.append)
    assert means == {"loss": 2.5, "loss_bbox": 1.0, "grad_norm": 3.0, "nonfinite_costs": 0.0}
    assert told == [
        "step 8: not finite: loss_bbox, loss; batch of images 800, 801, 802, 803; "
        "skipped 1, config.max_skipped_steps = 10"
    ]
    assert _guard().means(7, _NAMES, _rows(bad), told.append) == {}


def test_costs_alone_are_told():
    told = []
    _guard().means(1, _NAMES, _rows({"nonfinite_costs": 40, "skipped": 1}), told.append)
    assert "step 1: not finite: 40 matching costs; batch of images 100," in told[0]


def test_the_limit_holds_for_the_whole_run():
    """Catches a count that starts again with each log event or restart."""
    bad = {"grad_norm": np.inf, "skipped": 1}
    watch = _guard(limit=3, skipped=1)
    told = []
    watch.means(1, _NAMES, _rows(bad, {}), told.append)
    watch.means(3, _NAMES, _rows({}, bad), told.append)
    assert watch.skipped == 3
    with pytest.raises(TrainingError, match=r"^step 6: .*grad_norm; .*skipped 4, .*steps = 3$"):
        watch.means(5, _NAMES, _rows({}, bad, bad), told.append)
    assert len(told) == 2


@pytest.mark.parametrize("names", [_NAMES, _NAMES[:-1]], ids=["skip", "stop"])
def test_what_was_not_skipped_stops(names):
    """Catches an update that overflows although the gradients are finite, with "skip" too."""
    rows = _rows({}, {"grad_norm": np.inf})[:, : len(names)]
    with pytest.raises(TrainingError, match=r"^step 10: not finite: grad_norm; .* images 1000,"):
        _guard().means(9, names, rows, lambda line: None)


def test_a_message_stays_short():
    """Catches a line of a thousand names, which hides the cause."""
    names = [f"loss_{i}" for i in range(30)] + ["loss", "nonfinite_costs"]
    rows = np.full((1, len(names)), np.nan, np.float32)
    with pytest.raises(TrainingError) as error:
        _guard(images=1000).means(1, names, rows, lambda line: None)
    text = str(error.value)
    assert "loss_0, loss_1, loss_2, loss_3, loss_4, loss_5 and 26 more; " in text
    assert text.endswith("161, 162, 163 and 936 more") and "\n" not in text


def _arrays(workdir, step):
    """Returns all arrays of a checkpoint, read without code of this package."""
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        found = {item: reader.restore(folder / item) for item in ("params", "ema", "state")}
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(found)}


def _differing(workdir, *steps):
    one, other = (_arrays(workdir, step) for step in steps)
    assert one.keys() == other.keys()
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]


@pytest.fixture
def run(tmp_path, digits_dir, monkeypatch):
    """Returns a function that trains, with a box that is not finite in some batches."""
    config = tiny_config.get_config()
    config.data.dir, config.data.threads = str(digits_dir), 1
    config.on_nonfinite, config.max_skipped_steps = "skip", 1
    config.train.update(
        ema_decay=0.9, duration="6 steps", eval_every="100 steps", checkpoint_every="1 steps"
    )
    config.train.log_every = "2 steps"
    config.model.update(encoder_layers=0, decoder_layers=1, num_queries=6)
    config.model.backbone.stages = 1
    config.eval.num_select = 10
    config.checkpoint.keep_latest = 10
    config.compile.options = fast_jit.CONFIG
    compiled, seen = [], {}

    def compile_once(*arguments):
        if not compiled:
            compiled.append(programs(*arguments))
        return compiled[0]

    programs, put_batch = loop.Programs, loop.put_batch
    monkeypatch.setattr(loop, "Programs", compile_once)

    def train(first_step, bad_steps):
        steps = iter(range(first_step, 100))

        def put(batch, mesh):
            step = next(steps)
            seen[step] = batch["image_id"].tolist()
            if step in bad_steps:
                batch["boxes"][0, 0, 0] = np.nan
            return put_batch(batch, mesh)

        monkeypatch.setattr(loop, "put_batch", put)
        loop.train(copy.deepcopy(config), tmp_path)

    return train, tmp_path, seen


@pytest.mark.slow
def test_a_run_skips_a_step_and_stops_at_one_too_many(run, capsys):
    """Catches a skipped step that is saved, logged or repeated wrongly, or forgotten by a restart.

    Steps 2 and 5 are not finite; the run stops at step 5, and so does the continued run.
    """
    train, workdir, seen = run
    for first_step in (1, 5):
        with pytest.raises(TrainingError) as error:
            train(first_step, (2, 5))
        text = str(error.value)
        assert text.startswith("step 5: not finite: ") and "skipped 2" in text
        assert f"of images {', '.join(map(str, seen[5]))};" in text
        assert "Step 4 is saved" in text
    told = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(told) == 1
    assert told[0].startswith("step 2: ") and f"images {', '.join(map(str, seen[2]))}; " in told[0]

    assert _differing(workdir, 1, 2) == ["['state']['step']"]
    assert len(_differing(workdir, 2, 3)) > 50
    for step in (1, 2, 3, 4):
        assert all(np.isfinite(array).all() for array in _arrays(workdir, step).values())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines}
    assert list(logged) == [1, 2, 3, 4]
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert "train/loss" not in logged[2] and all(v is not None for v in logged[2].values())
    # The update of step 3 is the second one: it has the learning rate that step 2 would have had.
    assert logged[3]["train/learning_rate"] == pytest.approx(0.5e-3)
