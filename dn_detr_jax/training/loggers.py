"""The loggers of a run: TensorBoard, Weights & Biases and MLflow (`train.loggers`).

A logger that fails is left out from then on, with one warning: it never stops a training.
Weights & Biases and MLflow may wait for a server; they work in threads, for which the training does
not wait. Their packages are imported when they are used.

`loggers/NAME.json` of the work directory has the id of the run, so that a resumed training goes on
with the same run.
"""

import importlib.util
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.config import flat_values
from dn_detr_jax.errors import ConfigError, short_reason
from dn_detr_jax.files import write_json_atomically
from dn_detr_jax.training.tensorboard import TensorBoard

log = logging.getLogger(__name__)

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> what pip installs
_PROJECT = "dn_detr_jax"  # of Weights & Biases, and MLflow's experiment, unless the user names one
_MOST_WAITING = 10_000  # calls that wait for a thread
_CLOSE_SECONDS = 60.0  # that the end of a training waits for a thread


class Logger(Protocol):
    """A destination of what a run logs. Every method may raise, and may take any time."""

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Takes finite numbers by name, and the time in seconds since 1970."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Takes images, uint8 [H, W, 3], by name."""

    def text(self, name: str, text: str) -> None:
        """Takes a text."""

    def close(self) -> None:
        """Writes what is left."""


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a logger of `train.loggers` whose package is missing."""
    for name in names:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            reason = f"{name} is not installed: pip install {_PACKAGES[name]}"
            raise ConfigError("train.loggers", tuple(names), reason)


class Loggers:
    """All loggers of a run, each until it fails. No method raises."""

    def __init__(self, workdir: Path, start_step: int, config: ConfigDict | None = None):
        """Opens the loggers.

        Args:
          workdir: of the run.
          start_step: step that the run starts or resumes from.
          config: of the run; None: TensorBoard alone.
        """
        values = flat_values(config) if config is not None else {}
        self._open: dict[str, Logger] = {}
        for name in values.get("train.loggers", ("tensorboard",)):
            self._add(name, _makers(workdir, start_step, values)[name])

    def _add(self, name: str, make: Callable[[], Logger]) -> None:
        if name != "tensorboard":
            self._open[name] = _Background(name, make)
            return
        try:
            self._open[name] = make()
        except Exception as error:
            _warn(name, error)

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Hands over finite numbers by name."""
        self._each(lambda logger: logger.scalars(step, values, now))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Hands over images, uint8 [H, W, 3], by name."""
        self._each(lambda logger: logger.images(step, images))

    def text(self, name: str, text: str) -> None:
        """Hands over a text, for example the config."""
        self._each(lambda logger: logger.text(name, text))

    def close(self) -> None:
        """Waits for what is left, at most a minute for each logger."""
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                call(logger)
            except Exception as error:
                del self._open[name]
                _warn(name, error)


def _makers(
    workdir: Path, start_step: int, values: dict[str, Any]
) -> dict[str, Callable[[], Logger]]:
    return {
        "tensorboard": lambda: TensorBoard(workdir, start_step),
        "wandb": lambda: WeightsAndBiases(workdir, values),
        "mlflow": lambda: MLflow(workdir, values),
    }


def _warn(name: str, error: Exception) -> None:
    log.warning("the logger %s is left out from now on: %s", name, short_reason(error))


class _Background:
    """Calls a logger in a thread of its own, in order; its errors come from the next call."""

    def __init__(self, name: str, make: Callable[[], Logger]):
        self._name, self._make = name, make
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        # A daemon: a server that never answers must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            logger = self._make()
            while (call := self._calls.get()) is not None:
                call(logger)
            logger.close()
        except Exception as error:
            self._error = error

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._put(lambda logger: logger.scalars(step, values, now))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._put(lambda logger: logger.images(step, images))

    def text(self, name: str, text: str) -> None:
        self._put(lambda logger: logger.text(name, text))

    def close(self) -> None:
        self._put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"not finished {_CLOSE_SECONDS:.0f} s after the training")
        self._raise()

    def _put(self, call: Callable[[Logger], None] | None) -> None:
        self._raise()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise TimeoutError(f"{_MOST_WAITING} calls wait for it") from None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class WeightsAndBiases:
    """A run of Weights & Biases; its environment variables, such as WANDB_PROJECT, count."""

    def __init__(self, workdir: Path, values: dict[str, Any]):
        """Begins a run, or continues that of the work directory."""
        import wandb

        self._image = wandb.Image
        stored = _stored_run(workdir, "wandb")
        self._run = wandb.init(
            id=stored.get("run_id"),
            resume="allow" if stored else None,
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=workdir.name,
            dir=os.fspath(workdir),
            config=values,
        )
        _store_run(workdir, "wandb", {"run_id": self._run.id})
        # W&B's own count can't go back to the checkpoint that a run is resumed from.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Logs the numbers."""
        del now
        self._run.log({**values, "step": step})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Logs the images."""
        self._run.log({name: self._image(image) for name, image in images.items()} | {"step": step})

    def text(self, name: str, text: str) -> None:
        """Does nothing: the run has the config."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or where the run of the work directory began."""

    def __init__(self, workdir: Path, values: dict[str, Any]):
        """Begins a run in the experiment MLFLOW_EXPERIMENT_NAME, or continues."""
        from mlflow import get_tracking_uri
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        stored = _stored_run(workdir, "mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or stored.get("uri") or get_tracking_uri()
        self._client = MlflowClient(uri)
        if stored:
            self._id = stored["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=workdir.name).info.run_id
        _store_run(workdir, "mlflow", {"run_id": self._id, "uri": uri})
        params = [Param(_mlflow_name(path), str(value)[:500]) for path, value in values.items()]
        for start in range(0, len(params), 100):  # as many as a request may have
            self._client.log_batch(self._id, params=params[start : start + 100])

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Logs the numbers."""
        milliseconds = round(1000 * now)
        metrics = [
            self._metric(_mlflow_name(name), value, milliseconds, step)
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):  # as many as a request may have
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Stores the images as artifacts, in place of those of earlier steps."""
        del step
        for name, image in images.items():
            self._client.log_image(self._id, image, f"pictures/{_mlflow_name(name)}.png")

    def text(self, name: str, text: str) -> None:
        """Stores a text as an artifact."""
        self._client.log_text(self._id, text, f"{_mlflow_name(name)}.txt")

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._id)


def _mlflow_name(name: str) -> str:
    """Replaces characters that names in MLflow may not have.

    Examples:
      >>> _mlflow_name("train/learning_rate_decoder.*norm")
      'train/learning_rate_decoder._norm'
    """
    return re.sub(r"[^\w\-. /]", "_", name)


def _stored_run(workdir: Path, name: str) -> dict[str, str]:
    """Returns what `_store_run` has written, {} for a new run."""
    try:
        return json.loads((workdir / "loggers" / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _store_run(workdir: Path, name: str, run: dict[str, str]) -> None:
    write_json_atomically(workdir / "loggers" / f"{name}.json", run)
