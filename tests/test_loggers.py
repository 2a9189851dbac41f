"""Loggers of a training: which run they log into, and that none of them stops a training.

Fakes of Weights & Biases and MLflow run everywhere; the real packages where they are installed.
"""

import json
import sys
import threading
import types

import numpy as np
import pytest

from dn_detr_jax.config import base_config
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training import loggers
from dn_detr_jax.training.loggers import check_installed
from dn_detr_jax.training.writers import MetricWriter, read_metrics

IMAGE = np.full((4, 6, 3), 200, np.uint8)


def config(*names):
    made = base_config()
    made.train.loggers = names
    return made


def log(workdir, names, steps, start=0):
    """Logs into a run as a training does; the last value of every line is not finite."""
    with MetricWriter(workdir, start_step=start, config=config(*names)) as writer:
        if not start:
            writer.text("config", "dn:\n  groups: 5")
        for step in steps:
            writer.scalars(step, {"train/loss": 1.0 / step, "eval/APs": float("nan")})
        writer.images(steps[-1], {"detections": IMAGE})


class FakeWandb(types.ModuleType):
    """Records what a run of Weights & Biases is asked to do."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0
        self.Image = lambda image: ("image", image.shape)
        self.broken = None  # a function that `log` calls

    def init(self, **options):
        self.begun.append(options)
        run = types.SimpleNamespace(id=options["id"] or f"run{len(self.begun)}")
        run.define_metric = lambda *_, **__: None
        run.log, run.finish = self.log, self.finish
        return run

    def log(self, values):
        if self.broken is not None:
            self.broken()
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_a_resumed_training_goes_on_with_the_same_run(wandb, tmp_path):
    """Catches a new run after every restart, and another run's id in another work directory."""
    log(tmp_path / "a", ["wandb"], [1, 2])
    log(tmp_path / "a", ["wandb"], [2, 3], start=1)
    log(tmp_path / "b", ["wandb"], [1])
    begun = [(options["id"], options["resume"], options["name"]) for options in wandb.begun]
    assert begun == [(None, None, "a"), ("run1", "allow", "a"), (None, None, "b")]
    assert wandb.begun[0]["config"]["optimizer.learning_rate"] == 1e-4
    assert wandb.begun[0]["project"] == "dn_detr_jax" and wandb.finished == 3
    steps = [values["step"] for values in wandb.logged if "train/loss" in values]
    assert steps == [1, 2, 2, 3, 1]
    assert wandb.logged[0] == {"train/loss": 1.0, "step": 1}  # without the value that is not finite
    assert {"detections": ("image", (4, 6, 3)), "step": 2} in wandb.logged
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_a_failing_logger_is_one_warning(wandb, tmp_path, caplog):
    """Catches an error that ends the training, or a warning for every step."""

    def fail():
        raise ConnectionError("no route\nto host")

    wandb.broken = fail
    log(tmp_path, ["wandb", "tensorboard"], range(1, 50))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 50))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == ("the logger wandb is left out from now on: no route to host")
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_logger_that_cannot_begin_is_one_warning(wandb, tmp_path, caplog):
    wandb.init = None
    (tmp_path / "tensorboard").write_text("no folder")
    log(tmp_path, ["wandb", "tensorboard"], range(1, 9))
    assert len(read_metrics(tmp_path)) == 8
    messages = sorted(record.getMessage() for record in caplog.records)
    assert [message.split()[2] for message in messages] == ["tensorboard", "wandb"]


@pytest.mark.parametrize("limit", ["_MOST_WAITING", "_CLOSE_SECONDS"])
def test_a_training_does_not_wait_for_a_server(limit, wandb, tmp_path, caplog, monkeypatch):
    """Catches a training that hangs with its logger, at a step or at the end."""
    monkeypatch.setattr(loggers, "_CLOSE_SECONDS", 0.1)
    if limit == "_MOST_WAITING":
        monkeypatch.setattr(loggers, "_MOST_WAITING", 10)
    answered = threading.Event()
    wandb.broken = answered.wait
    log(tmp_path, ["wandb"], range(1, 50))
    assert len(read_metrics(tmp_path)) == 49
    (record,) = caplog.records
    wanted = "10 calls wait" if limit == "_MOST_WAITING" else "not finished 0 s after the training"
    assert wanted in record.getMessage()
    answered.set()


def test_a_missing_package_is_an_error_before_the_training(monkeypatch):
    """Catches a training of days whose metrics a user never finds at the server."""
    check_installed(("tensorboard",))
    for name, package in ("wandb", "wandb"), ("mlflow", "mlflow-skinny"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"train\.loggers = .*: pip install {package}$"):
            check_installed(("tensorboard", name))


def test_tensorboard_itself_reads_the_run(tmp_path):
    """Catches files that only this package's own reader understands."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, ["tensorboard"], [1, 2, 3])
    log(tmp_path, ["tensorboard"], [3, 4], start=2)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in found.Images("detections")] == [4]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """The real MLflow, with runs in local files."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return pytest.importorskip("mlflow")


def test_mlflow_has_one_run_of_a_resumed_training(mlflow, tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "digits"
    log(workdir, ["mlflow"], [1, 2])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the second start finds the first one's runs
    log(workdir, ["mlflow"], [3, 4], start=2)
    assert caplog.records == []
    client = mlflow.tracking.MlflowClient(f"file://{tmp_path}/mlruns")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dn_detr_jax"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert "eval/APs" not in run.data.metrics
    assert run.data.params["optimizer.learning_rate"] == "0.0001"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.txt", "pictures"} <= names


def test_many_metrics_reach_mlflow(mlflow, tmp_path, caplog):
    """Catches requests of more metrics than MLflow takes, and names that it refuses."""
    values = {f"eval_class/kind {i} (a&b)": 0.5 for i in range(1203)}
    with MetricWriter(tmp_path / "lvis", config=config("mlflow")) as writer:
        writer.scalars(1, values)
    assert caplog.records == []
    stored = json.loads((tmp_path / "lvis" / "loggers" / "mlflow.json").read_text())
    run = mlflow.tracking.MlflowClient(stored["uri"]).get_run(stored["run_id"])
    assert len(run.data.metrics) == 1203


def test_weights_and_biases_itself_takes_the_run(tmp_path, monkeypatch, caplog):
    """Catches arguments that the real package refuses; nothing is sent."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path / "run", ["wandb"], [1, 2])
    log(tmp_path / "run", ["wandb"], [2, 3], start=1)
    assert caplog.records == []
    stored = json.loads((tmp_path / "run" / "loggers" / "wandb.json").read_text())
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(stored["run_id"]) for folder in folders)
