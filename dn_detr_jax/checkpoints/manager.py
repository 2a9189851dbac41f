"""Checkpoints of a run: asynchronous, atomic, self-contained, with errors that name the cause.

A work directory holds `config.json` (the config, and id and name of every label), `lock` (see
`checkpoints.lock`) and `checkpoints/STEP/` with the items

- `params`: the parameters, a nested dictionary of arrays;
- `ema`: the moving average of the parameters, if the run keeps one;
- `state`: everything else of the train state, as nested dictionaries of arrays;
- `host`: the host's state of the loop, JSON;
- `config`: the same as `config.json`, so that a checkpoint can travel alone;
- `metrics`: of the evaluation at that step, JSON, if there was one;
- `checksums.json`: size and CRC-32 of every file of the items.

Orbax writes a checkpoint into a temporary directory and renames it when it is complete; checkpoints
that are no longer kept are renamed before they are deleted. A process that is killed at any moment
therefore leaves only complete checkpoints under their step's name.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from dn_detr_jax.checkpoints import trees
from dn_detr_jax.checkpoints.checksums import (
    CHECKSUMS,
    compute_checksums,
    verify_checksums,
    was_written,
)
from dn_detr_jax.checkpoints.failures import describe_failure, first_line
from dn_detr_jax.checkpoints.lock import WorkdirLock
from dn_detr_jax.checkpoints.run_config import (
    CONFIG_FILE,
    compare_documents,
    load_document,
    make_document,
)
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.distributed.consistency import barrier
from dn_detr_jax.errors import CheckpointError
from dn_detr_jax.files import write_json_atomically

PyTree = Any

RAW_AP = "AP_raw"  # AP of the parameters themselves, beside that of their moving average
# The metrics that rank checkpoints, by the name that asks for the best.
_SCORES = {"best": "AP", "best_raw": RAW_AP}
_TRASH = "trash"  # folder of checkpoints that are being deleted
_SET_ASIDE = "set_aside"  # folder of checkpoints later than the one that a run was restarted from


class Checkpoints:
    """The checkpoints of one work directory.

    Every process of a run makes one and calls its methods in the same order. A state is a mapping
    or a dataclass of pytrees with the parameters under `params`, and their moving average, if any,
    under `ema`.

    Unless it is `read_only`, the first process holds the lock of the work directory until `close`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: ConfigDict | None,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        categories: Sequence[Category] = (),
        read_only: bool = False,
    ):
        """Opens a work directory; unless `read_only`, makes and locks it, removes unfinished saves.

        Args:
          workdir: the run's directory.
          config: the run's config, compared with that of the directory; None compares nothing.
          keep_latest: checkpoints kept for being the latest, at least 1.
          keep_best: checkpoints kept for having the best `AP`, and as many for `AP_raw`.
          categories: one per label, in their order; stored beside the config and compared.
          read_only: for evaluation; only the keys of the model that shape parameters must agree.

        Raises:
          CheckpointError: another process writes into the directory, it has checkpoints of
            another config, or it can't be written.
        """
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self._read_only = read_only
        self._saving: int | None = None
        self._scores: dict[str, dict[int, float]] = {name: {} for name in _SCORES}
        self._lock: WorkdirLock | None = None
        logging.get_absl_logger().addFilter(_is_not_from_orbax)
        getLogger("asyncio").addFilter(_is_not_of_orbax)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._reported("opening the directory"))
            if not read_only and jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = WorkdirLock(self.workdir)
                stack.callback(self._lock.release)  # if what follows fails
            self._document = make_document(config, categories) if config is not None else None
            self._compare_config()
            if self._lock is not None:
                self._empty_trash()
                if self._document is not None:
                    write_json_atomically(self.workdir / CONFIG_FILE, self._document)
            if not read_only:
                barrier("directory of checkpoints")
            self._check_files()
            self._manager = self._open_manager(keep_latest, keep_best)
            self._read_scores()
            stack.pop_all()

    def _check_files(self) -> None:
        """Raises for a pipe or a device, which Orbax would read for ever."""
        for path in self.directory.glob("[0-9]*/**/*"):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path}: neither a file nor a folder")

    def _open_manager(self, keep_latest: int, keep_best: int) -> ocp.CheckpointManager:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "ema", "state"):
            handler = ocp.StandardCheckpointHandler()
            registry.add(item, ocp.args.StandardSave, handler)
            registry.add(item, ocp.args.StandardRestore, handler)
        for item in ("host", "config"):
            handler = ocp.JsonCheckpointHandler()
            registry.add(item, ocp.args.JsonSave, handler)
            registry.add(item, ocp.args.JsonRestore, handler)
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,
            preservation_policy=_LatestAndBest(keep_latest, keep_best, self._scores),
            # Deleting takes time, renaming does not: a kill must not leave half a checkpoint.
            todelete_subdir=None if self._read_only else _TRASH,
            # Damaged metrics of one checkpoint must not keep the others from being read.
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        return ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    # Saving

    def save(
        self,
        step: int,
        state: PyTree,
        host_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving; returns once the arrays of `state` may be donated or changed.

        Args:
          step: steps done so far.
          state: mapping or dataclass of pytrees of arrays, with `params`.
          host_state: nested dictionaries and lists of numbers, strings and NumPy arrays.
          metrics: of the evaluation at this step; `AP` and `AP_raw` decide which checkpoints are
            best.

        Raises:
          CheckpointError: this save could not start or the one before it failed (a full disk,
            no permission), or the step has a checkpoint already: none is ever overwritten.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory}: opened for reading only")
        self.wait()
        if step in self.all_steps():
            raise CheckpointError(
                f"{self.directory / str(step)}: exists already and is not overwritten"
            )
        items = {"host": ocp.args.JsonSave(trees.to_json(host_state or {}))}
        for item, tree in trees.items(state).items():
            items[item] = ocp.args.StandardSave(trees.nested(tree))
        if self._document is not None:
            items["config"] = ocp.args.JsonSave(self._document)
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            items["metrics"] = ocp.args.JsonSave(metrics)
            self._add_scores(step, metrics)
        with self._reported(f"saving step {step}"):
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
          CheckpointError: it failed; the checkpoints before it are as they were.
        """
        with self._reported(f"saving step {self._saving}"):
            try:
                self._manager.wait_until_finished()
            except Exception:
                if self._saving is not None:
                    self._forget_scores(self._saving)
                # Orbax has already forgotten the checkpoints that this save would have replaced.
                self._manager.reload()
                raise
        self._empty_trash()

    def close(self) -> None:
        """Waits for the save under way and releases everything; no method works afterwards.

        Raises:
          CheckpointError: as `wait`.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # `wait` has raised it
                self._manager.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def set_aside_after(self, step: int) -> list[int]:
        """Moves the checkpoints later than `step` out of the way, into `checkpoints/set_aside`.

        A run that is restarted from an earlier step calls this before it trains.

        Returns:
          The steps that were moved.
        """
        self.wait()
        later = [other for other in self.all_steps() if other > step]
        if jax.process_index() == 0:
            for other in later:
                target = self.directory / _SET_ASIDE / str(other)
                while target.exists():
                    target = target.with_name(target.name + "_")
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(other)).rename(target)
        barrier("checkpoints set aside")
        for other in later:
            self._forget_scores(other)
        self._manager.reload()
        return later

    def _write_checksums(self) -> None:
        # Orbax calls this when all items are written and the directory is not yet renamed.
        if jax.process_index() != 0:
            return
        folder = next(self.directory.glob(f"{self._saving}.*"))
        write_json_atomically(folder / CHECKSUMS, compute_checksums(folder))

    def _empty_trash(self) -> None:
        if not self._read_only and jax.process_index() == 0:
            shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    # Reading

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, and of the one being saved, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The last step with a checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self, name: str = "best") -> int | None:
        """The step with the best AP, the later one of two equals; None without any AP.

        Args:
          name: "best", or "best_raw" for the AP of the parameters themselves where a run evaluates
            them beside their moving average.
        """
        ranked = _ranked(self.all_steps(), self._scores[name])
        return ranked[-1] if ranked else None

    def restore(
        self, abstract_state: PyTree, step: str | int = "latest"
    ) -> tuple[PyTree, dict[str, Any]]:
        """Restores a whole state.

        Args:
          abstract_state: like the saved state, with `jax.ShapeDtypeStruct` leaves; their
            shardings are those of the result (none: the first device).
          step: "latest", "best", "best_raw" or a step.

        Returns:
          The state, bit by bit as saved, in the structure of `abstract_state`, and the host
          state.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or its arrays are not
            those of `abstract_state`.
        """
        targets = trees.items(abstract_state)
        number = self.find(step)
        restored = self._restore_items(number, targets, ["host"])
        values = restored.get("state", {})
        values |= {
            k: restored.get(k) for k in ("params", "ema") if k in trees.fields(abstract_state)
        }
        if dataclasses.is_dataclass(abstract_state) and not isinstance(abstract_state, type):
            state: PyTree = dataclasses.replace(abstract_state, **values)
        else:
            state = type(abstract_state)(values)
        with self._reported(f"reading {number}/host"):
            return state, trees.from_json(restored["host"])

    def restore_params(
        self, abstract_params: PyTree, step: str | int = "latest", *, raw: bool = False
    ) -> PyTree:
        """Restores the parameters to evaluate with: their moving average where the run keeps one.

        Arguments, result and errors are as for `restore`. With `raw`, or a step of "best_raw", they
        are the parameters themselves.
        """
        number = self.find(step)
        average = self.has_average(number) and not raw and step != "best_raw"
        item = "ema" if average else "params"
        return self._restore_items(number, {item: abstract_params}, [])[item]

    def has_average(self, step: int) -> bool:
        """Whether the checkpoint of a step holds a moving average of the parameters."""
        try:
            return was_written(self.directory / str(step), "ema")
        except (OSError, ValueError):
            return False  # damaged: reading it raises

    def find(self, step: str | int) -> int:
        """The number of the checkpoint "latest", "best", "best_raw" or of a step, which exists."""
        self.wait()
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: there is no complete checkpoint")
        if not isinstance(step, str):
            found: int | None = step
        elif step == "latest":
            found = self.latest_step()
        else:
            self._check_scores(steps, step)
            found = self.best_step(step)
        if found is None:
            missing = "AP" if step == "best" else "AP of parameters beside their average (eval.raw)"
            raise CheckpointError(
                f"{self.directory}: no checkpoint has an {missing}, so none is the best; steps: "
                f"{_listed(steps)}"
            )
        if found not in steps:
            raise CheckpointError(
                f"{self.directory}: there is no checkpoint of step {found}; steps: {_listed(steps)}"
            )
        return found

    def _check_scores(self, steps: Sequence[int], name: str) -> None:
        """Raises if the AP of a checkpoint can't be read: it may or may not be the best."""
        for step in steps:
            if self._scores[name].get(step) == math.inf:
                raise CheckpointError(
                    f"{self.directory / str(step) / 'metrics'}: damaged, so that the best "
                    f"checkpoint is unknown; name one with --step: {_listed(steps)}"
                )

    def _restore_items(
        self, step: int, targets: dict[str, PyTree], texts: list[str]
    ) -> dict[str, Any]:
        path = self.directory / str(step)
        others = [other for other in self.all_steps() if other != step]
        advice = f"choose another one with --step: {_listed(others)}" if others else "no other one"
        try:
            verify_checksums(path, [*targets, *texts])
            saved = self._manager.item_metadata(step)
            for item, target in targets.items():
                trees.compare_arrays(path / item, saved[item], target)
            arguments = {
                item: ocp.args.StandardRestore(jax.tree.map(trees.abstract, trees.nested(target)))
                for item, target in targets.items()
            } | {item: ocp.args.JsonRestore() for item in texts}
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
            return {
                item: trees.like(targets[item], restored[item])
                if item in targets
                else restored[item]
                for item in arguments
            }
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}: the checkpoint is damaged ({first_line(error)}); {advice}"
            ) from error

    def _read_scores(self) -> None:
        for step in self.all_steps():
            folder = self.directory / str(step)
            try:
                if was_written(folder, "metrics"):
                    verify_checksums(folder, ["metrics"])
                    metrics = json.loads((folder / "metrics" / "metrics").read_text())
                    self._add_scores(step, metrics)
            except Exception:
                # Its AP is unknown: it is kept, and asking for the best is an error.
                self._add_scores(step, dict.fromkeys(_SCORES.values(), math.inf))

    def _add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, metric in _SCORES.items():
            if metric in metrics:
                self._scores[name][step] = float(metrics[metric])

    def _forget_scores(self, step: int) -> None:
        for scores in self._scores.values():
            scores.pop(step, None)

    def _compare_config(self) -> None:
        """Raises if the directory holds checkpoints of another config."""
        steps = steps_in(self.directory)
        if not steps or self._document is None:
            return
        path = self.workdir / CONFIG_FILE
        if not path.exists():  # a checkpoint that was copied alone
            path = self.directory / str(steps[-1]) / "config" / "metadata"
            if not path.exists():
                return
        compare_documents(self.workdir, load_document(path), self._document, self._read_only)

    @contextlib.contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        """Turns every error inside into a `CheckpointError` with path and cause."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            reason = describe_failure(error)
            raise CheckpointError(f"{self.directory}: {doing} failed: {reason}") from error


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


@dataclasses.dataclass
class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest n and the best n by each score; `Checkpoints` fills `scores`."""

    keep_latest: int
    keep_best: int
    scores: dict[str, dict[int, float]]

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.keep_latest :])
        for scores in self.scores.values():
            if self.keep_best:
                kept.update(_ranked(steps, scores)[-self.keep_best :])
            kept.update(step for step in steps if scores.get(step) == math.inf)
        return [step in kept for step in steps]


def _ranked(steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """The steps that have a score, the best last."""
    scored = [step for step in steps if step in scores and not math.isnan(scores[step])]
    return sorted(scored, key=lambda step: (scores[step], step))


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _is_not_from_orbax(record: Any) -> bool:
    # Orbax logs the traceback of every failure that it also raises, from several threads.
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_not_of_orbax(record: Any) -> bool:
    # A full disk fails the task of every array; when the program ends, asyncio logs each of them.
    return f"{os.sep}orbax{os.sep}" not in record.getMessage()
