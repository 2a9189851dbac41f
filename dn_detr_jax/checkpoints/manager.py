"""Checkpoints of a run: asynchronous, atomic, self-contained, with errors that name the cause.

A work directory holds `config.json` (the config, and id and name of every label) and
`checkpoints/STEP/` with the items

- `params`: the parameters, a nested dictionary of arrays;
- `ema`: the moving average of the parameters, where the run keeps one;
- `state`: everything else of the train state, as nested dictionaries of arrays;
- `host`: what the loop keeps on the host, JSON;
- `config`: the same as `config.json`, so that a checkpoint can travel alone;
- `metrics`: of the evaluation at that step, JSON, if there was one;
- `checksums.json`: size and CRC-32 of every file of the items.

Orbax writes a checkpoint into a temporary directory and renames it when it is complete; checkpoints
that are not kept any more are renamed away before they are deleted. So a process killed at any
moment leaves only complete checkpoints under their step's name.
"""

import base64
import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from dn_detr_jax.config import (
    base_config,
    flat_keys,
    validate,
)
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.distributed.consistency import barrier
from dn_detr_jax.errors import CheckpointError, ConfigError

PyTree = Any

_SCORE = "AP"  # the metric by which a checkpoint is the best
_CHECKSUMS = "checksums.json"
_TRASH = "trash"  # checkpoints on their way out
_SET_ASIDE = "set_aside"  # checkpoints later than the one that a run was restarted from

# Keys that change neither the parameters' shapes nor what is trained or measured.
_HARMLESS = (
    "checkpoint.",
    "compile.",
    "data.dir",
    "data.packed_dir",
    "data.prefetch",
    "data.skip_bad",
    "data.threads",
    "data.workers",
    "eval.batch_size",
    "eval.pictures",
    "max_skipped_steps",
    "mesh.",
    "model.remat",
    "on_nonfinite",
    "train.accumulate_steps",
    "train.checkpoint_every",
    "train.eval_every",
    "train.log_every",
)


class Checkpoints:
    """The checkpoints of one work directory.

    Every process of a run makes one and calls its methods in the same order. A state is a mapping
    or a dataclass of pytrees with the parameters under `params`, and their moving average, if any,
    under `ema`.
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
        """Opens a work directory; unless `read_only`, makes it and removes unfinished saves.

        Args:
          workdir: the run's directory.
          config: the run's config, compared with that of the directory; None compares nothing.
          keep_latest: checkpoints kept for being the latest, at least 1.
          keep_best: checkpoints kept for having the best `AP`.
          categories: one per label, in their order; stored beside the config and compared.
          read_only: for evaluation; only the keys of the model that shape parameters must agree.

        Raises:
          CheckpointError: a directory with checkpoints of another config, or one that can't
            be written.
        """
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self._read_only = read_only
        self._saving: int | None = None
        self._scores: dict[int, float] = {}
        logging.get_absl_logger().addFilter(_is_not_from_orbax)
        getLogger("asyncio").addFilter(_is_not_of_orbax)
        with self._reported("opening the directory"):
            self._document = _document(config, categories) if config is not None else None
            if self._document is not None:
                self._compare_config(self._document)
            if not read_only and jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._empty_trash()
                if self._document is not None:
                    _write_json(self.workdir / "config.json", self._document)
            if not read_only:
                barrier("directory of checkpoints")
            self._check_files()
            self._manager = self._open_manager(keep_latest, keep_best)
            self._scores.update(self._read_scores())

    def _check_files(self) -> None:
        """Raises if there is a pipe or a device, on which Orbax would wait for ever."""
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
          metrics: of the evaluation at this step; `AP` decides which checkpoints are best.

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
        items = {"host": ocp.args.JsonSave(_to_json(host_state or {}))}
        for item, tree in _items(state).items():
            items[item] = ocp.args.StandardSave(_nested(tree))
        if self._document is not None:
            items["config"] = ocp.args.JsonSave(self._document)
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            items["metrics"] = ocp.args.JsonSave(metrics)
            if _SCORE in metrics:
                self._scores[step] = metrics[_SCORE]
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
                    self._scores.pop(self._saving, None)
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
            with contextlib.suppress(Exception):  # said by wait already
                self._manager.close()

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
            self._scores.pop(other, None)
        self._manager.reload()
        return later

    def _write_checksums(self) -> None:
        # Orbax calls this when all items are written and the directory is not yet renamed.
        if jax.process_index() != 0:
            return
        folder = next(self.directory.glob(f"{self._saving}.*"))
        _write_json(folder / _CHECKSUMS, _checksums(folder))

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

    def best_step(self) -> int | None:
        """The step with the best AP, the later one of two equals; None without any AP."""
        ranked = _ranked(self.all_steps(), self._scores)
        return ranked[-1] if ranked else None

    def restore(
        self, abstract_state: PyTree, step: str | int = "latest"
    ) -> tuple[PyTree, dict[str, Any]]:
        """Restores a whole state.

        Args:
          abstract_state: like the saved state, with `jax.ShapeDtypeStruct` leaves; their
            shardings are those of the result (none: the first device).
          step: "latest", "best" or a step.

        Returns:
          The state, bit by bit as saved, in the structure of `abstract_state`, and the host
          state.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or its arrays are not
            those of `abstract_state`.
        """
        targets = _items(abstract_state)
        number = self.find(step)
        restored = self._restore_items(number, targets, ["host"])
        values = restored.get("state", {})
        values |= {k: restored.get(k) for k in ("params", "ema") if k in _fields(abstract_state)}
        if dataclasses.is_dataclass(abstract_state) and not isinstance(abstract_state, type):
            state: PyTree = dataclasses.replace(abstract_state, **values)
        else:
            state = type(abstract_state)(values)
        with self._reported(f"reading {number}/host"):
            return state, _from_json(restored["host"])

    def restore_params(self, abstract_params: PyTree, step: str | int = "latest") -> PyTree:
        """Restores the parameters to evaluate with: their moving average where the run keeps one.

        Arguments, result and errors are as for `restore`.
        """
        number = self.find(step)
        item = "ema" if self.has_average(number) else "params"
        return self._restore_items(number, {item: abstract_params}, [])[item]

    def has_average(self, step: int) -> bool:
        """Whether the checkpoint of a step holds a moving average of the parameters."""
        try:
            return _was_written(self.directory / str(step), "ema")
        except (OSError, ValueError):
            return False  # damaged: whoever reads it is told

    def find(self, step: str | int) -> int:
        """The number of the checkpoint "latest", "best" or of a step, which must exist."""
        self.wait()
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: there is no complete checkpoint")
        if step == "best":
            self._check_scores(steps)
        named = {"latest": self.latest_step(), "best": self.best_step()}
        found = named[step] if isinstance(step, str) else step
        if found is None:
            raise CheckpointError(
                f"{self.directory}: no checkpoint has an AP, so none is the best; steps: "
                f"{_listed(steps)}"
            )
        if found not in steps:
            raise CheckpointError(
                f"{self.directory}: there is no checkpoint of step {found}; steps: {_listed(steps)}"
            )
        return found

    def _check_scores(self, steps: Sequence[int]) -> None:
        """Raises if the AP of a checkpoint can't be read: it may or may not be the best."""
        for step in steps:
            if self._scores.get(step) == math.inf:
                raise CheckpointError(
                    f"{self.directory / str(step) / 'metrics'}: damaged, so that nobody knows "
                    f"which checkpoint is the best; name one with --step: {_listed(steps)}"
                )

    def _restore_items(
        self, step: int, targets: dict[str, PyTree], texts: list[str]
    ) -> dict[str, Any]:
        path = self.directory / str(step)
        others = [other for other in self.all_steps() if other != step]
        advice = f"choose another one with --step: {_listed(others)}" if others else "no other one"
        try:
            _verify_checksums(path, [*targets, *texts])
            saved = self._manager.item_metadata(step)
            for item, target in targets.items():
                _compare_arrays(path / item, saved[item], target)
            arguments = {
                item: ocp.args.StandardRestore(jax.tree.map(_abstract, _nested(target)))
                for item, target in targets.items()
            } | {item: ocp.args.JsonRestore() for item in texts}
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
            return {
                item: _like(targets[item], restored[item]) if item in targets else restored[item]
                for item in arguments
            }
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}: the checkpoint is damaged ({_first_line(error)}); {advice}"
            ) from error

    def _read_scores(self) -> dict[int, float]:
        scores = {}
        for step in self.all_steps():
            folder = self.directory / str(step)
            try:
                if not _was_written(folder, "metrics"):
                    continue
                _verify_checksums(folder, ["metrics"])
                metrics = json.loads((folder / "metrics" / "metrics").read_text())
                if _SCORE in metrics:
                    scores[step] = float(metrics[_SCORE])
            except Exception:
                # Nobody knows how good it is: it is neither deleted nor passed over in silence.
                scores[step] = math.inf
        return scores

    def _compare_config(self, present: dict[str, Any]) -> None:
        """Raises if the directory holds checkpoints of another config."""
        steps = sorted(int(p.name) for p in self.directory.glob("*") if p.name.isdecimal())
        if not steps:
            return
        path = self.workdir / "config.json"
        if not path.exists():  # a checkpoint that was copied alone
            path = self.directory / str(steps[-1]) / "config" / "metadata"
            if not path.exists():
                return
        stored = _load_document(path)
        # A key that is newer than the run had, in effect, its default.
        defaults = _document(base_config(), ())["config"]
        was = traverse_util.flatten_dict(defaults, sep=".")
        was |= traverse_util.flatten_dict(stored["config"], sep=".")
        now = traverse_util.flatten_dict(present["config"], sep=".")
        differences = [] if self._read_only else _category_differences(stored, present)
        differences += [
            f"{key} was {was.get(key, 'not there')!r}, now {now.get(key, 'not there')!r}"
            for key in sorted(was.keys() | now.keys())
            if not _may_change(key, self._read_only) and was.get(key, was) != now.get(key, now)
        ]
        if differences:
            raise CheckpointError(
                f"{self.workdir}: holds a run of another config: {'; '.join(differences)}: "
                "choose another work directory or the values of that run"
            )

    @contextlib.contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        """Turns whatever goes wrong inside into a `CheckpointError` with path and cause."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            reason = "no space left on the device" if _is_disk_full(error) else _first_line(error)
            raise CheckpointError(f"{self.directory}: {doing} failed: {reason}") from error


def holds_only_parameters(workdir: str | os.PathLike) -> bool:
    """Whether the latest checkpoint has no state of a training, as an import leaves it."""
    folder = Path(workdir) / "checkpoints"
    steps = [path for path in folder.glob("*") if path.name.isdecimal()]
    return bool(steps) and not (max(steps, key=lambda path: int(path.name)) / "state").exists()


def read_config(workdir: str | os.PathLike) -> tuple[dict[str, Any], tuple[Category, ...]]:
    """The config and the classes of a work directory.

    Returns:
      The config as nested dictionaries (tuples have become lists), and one category per label.

    Raises:
      CheckpointError: there is no readable `config.json`.
    """
    document = _load_document(Path(workdir) / "config.json")
    categories = tuple(Category(entry["id"], entry["name"]) for entry in document["categories"])
    return document["config"], categories


def read_run_config(workdir: str | os.PathLike) -> tuple[ConfigDict, tuple[Category, ...]]:
    """As `read_config`, with the config as this version has it.

    Keys that the run did not have yet are at their defaults; of keys that are there no more, those
    of the model are an error and others are left out.

    Raises:
      CheckpointError: there is no readable `config.json`, or its config is not valid here.
    """
    path = Path(workdir) / "config.json"
    stored, categories = read_config(workdir)
    config = base_config()
    known = set(flat_keys(config))
    try:
        flat = traverse_util.flatten_dict(stored, sep=".")
        kept = {key: v for key, v in flat.items() if key in known or key.startswith("model.")}
        config.update(traverse_util.unflatten_dict(kept, sep="."))
        validate(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # whatever is in place of a value or a section
        raise CheckpointError(f"{path}: unknown to this version ({_first_line(error)})") from error
    return config, categories


@dataclasses.dataclass
class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest n and the best n; `scores` belongs to `Checkpoints`, which fills it."""

    keep_latest: int
    keep_best: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.keep_latest :])
        if self.keep_best:
            kept.update(_ranked(steps, self.scores)[-self.keep_best :])
        kept.update(step for step in steps if self.scores.get(step) == math.inf)
        return [step in kept for step in steps]


def _ranked(steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """The steps that have a score, the best last."""
    scored = [step for step in steps if step in scores and not math.isnan(scores[step])]
    return sorted(scored, key=lambda step: (scores[step], step))


# The state as nested dictionaries: independent of the classes of optax, and comparable by name.


def _fields(state: PyTree) -> dict[str, PyTree]:
    if dataclasses.is_dataclass(state):
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return dict(state)


def _items(state: PyTree) -> dict[str, PyTree]:
    """What becomes items of a checkpoint; those without any array are left out."""
    fields = _fields(state)
    items = {item: fields.pop(item, None) for item in ("params", "ema")} | {"state": fields}
    return {item: tree for item, tree in items.items() if jax.tree.leaves(tree)}


def _flat(tree: PyTree) -> dict[tuple[str, ...], Any]:
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _nested(tree: PyTree) -> dict[str, Any]:
    return traverse_util.unflatten_dict(_flat(tree))


def _like(target: PyTree, nested: dict[str, Any]) -> PyTree:
    """The leaves of `nested` in the structure of `target`."""
    flat = traverse_util.flatten_dict(nested)
    return jax.tree.unflatten(jax.tree.structure(target), [flat[keys] for keys in _flat(target)])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare_arrays(path: Path, saved: Any, target: PyTree) -> None:
    """Raises if the arrays of an item are not those of `target`, naming the first that differ."""
    describe = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    stored = {keys: describe(leaf) for keys, leaf in _flat(getattr(saved, "tree", saved)).items()}
    wanted = {keys: describe(leaf) for keys, leaf in _flat(target).items()}
    differing = [keys for keys in stored | wanted if stored.get(keys) != wanted.get(keys)]
    if not differing:
        return
    named = "; ".join(
        f"{'/'.join(keys)} is {stored.get(keys, 'missing')} in the checkpoint, "
        f"{wanted.get(keys, 'missing')} in the model"
        for keys in sorted(differing)[:3]
    )
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise CheckpointError(f"{path}: does not fit the model: {named}{more}")


# The host state and the config as JSON


def _to_json(value: Any) -> Any:
    """Makes `value` fit for JSON; NumPy arrays become text, bit by bit."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects can't be saved")
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and "__array__" in value:
        data = np.frombuffer(base64.b64decode(value["__array__"]), np.dtype(value["dtype"]))
        return data.reshape(value["shape"]).copy()
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def _document(config: ConfigDict, categories: Sequence[Category]) -> dict[str, Any]:
    # Through JSON and back, so that it equals what is read from a file: tuples are lists there.
    listed = [{"id": int(category.id), "name": category.name} for category in categories]
    document = {"config": config.to_dict(), "categories": listed}
    return json.loads(json.dumps(document))


def _load_document(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise FileNotFoundError("there is no such file")
        document = json.loads(path.read_text())
        config = document["config"]
        if not isinstance(config, dict):
            raise TypeError(f"its config is a {type(config).__name__}")
        if "categories" in document:
            listed = [(entry["id"], entry["name"]) for entry in document["categories"]]
        else:  # the names alone, as in the first format
            listed = list(enumerate(document["class_names"]))
        ids = np.array([int(number) for number, _ in listed], np.int64).tolist()
        names = [str(name) for _, name in listed]
        categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        return {"config": config, "categories": categories}
    except Exception as error:  # whatever is in it
        raise CheckpointError(f"{path}: can't be read ({_first_line(error)})") from error


def _write_json(path: Path, value: Any) -> None:
    """Writes a file that is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def _may_change(key: str, read_only: bool) -> bool:
    if read_only:
        return not key.startswith("model.") or key in ("model.dtype", "model.remat")
    return key.startswith(_HARMLESS)


def _category_differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The first difference between the classes of two documents, in words; or nothing."""
    was, now = stored["categories"], present["categories"]
    if len(was) != len(now):
        return [f"the data had {len(was)} classes, now {len(now)}"]
    for label, (before, after) in enumerate(zip(was, now, strict=True)):
        if before != after:
            one, other = (f"{entry['name']!r} (id {entry['id']})" for entry in (before, after))
            return [f"class {label} was {one}, now {other}"]
    return []


# Whether files are what they were


def _checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} of the items' files, by their paths in the checkpoint."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files}


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _verify_checksums(folder: Path, items: Sequence[str]) -> None:
    """Raises ValueError if a file of the items is missing or not as it was written."""
    files = _read_checksums(folder)
    for item in items:
        if (folder / item).exists() and not any(name.startswith(f"{item}/") for name in files):
            raise ValueError(f"{_CHECKSUMS} has nothing of {item}")
    for name, expected in files.items():
        if name.split("/")[0] not in items:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        found = _checksum(folder / name)
        if found[0] != expected[0]:
            raise ValueError(f"{name} has {found[0]} of {expected[0]} bytes")
        if found != expected:
            raise ValueError(f"{name} has another content than was written")


def _was_written(folder: Path, item: str) -> bool:
    """Whether a checkpoint has an item, or has lost it; raises if its checksums can't be read."""
    return (folder / item).exists() or any(
        name.startswith(f"{item}/") for name in _read_checksums(folder)
    )


def _read_checksums(folder: Path) -> dict[str, list[int]]:
    """What `_checksums` gave when the checkpoint was written."""
    path = folder / _CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{_CHECKSUMS} is missing")
    try:
        files = json.loads(path.read_text())
    except RecursionError:
        files = None
    if not isinstance(files, dict) or not all(
        isinstance(value, list) and len(value) == 2 for value in files.values()
    ):
        raise ValueError(f"{_CHECKSUMS} is no list of sizes and checksums")
    return files


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # how tensorstore says it
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _is_not_from_orbax(record: Any) -> bool:
    # Orbax logs the traceback of every failure that it also raises, from several threads.
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_not_of_orbax(record: Any) -> bool:
    # A full disk fails the task of every array; when the program ends, asyncio tells of each.
    return f"{os.sep}orbax{os.sep}" not in record.getMessage()
