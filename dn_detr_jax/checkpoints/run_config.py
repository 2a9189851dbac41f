"""The config and the classes of a run, stored in `config.json` and in every checkpoint.

A document is `{"config": nested dictionaries, "categories": [{"id": ..., "name": ...}, ...]}` with
one category per label. The first format had `class_names` in place of `categories`; there the ids
were the positions.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.checkpoints.failures import first_line
from dn_detr_jax.config.stored import changed_values, restored_config
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"


def make_document(config: ConfigDict, categories: Sequence[Category]) -> dict[str, Any]:
    """Returns the document of a run as JSON gives it back: tuples are lists there."""
    listed = [{"id": int(category.id), "name": category.name} for category in categories]
    document = {"config": config.to_dict(), "categories": listed}
    return json.loads(json.dumps(document))


def load_document(path: Path) -> dict[str, Any]:
    """Reads a document of any format.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    try:
        if not path.is_file():  # reading a pipe or a device would never end
            raise FileNotFoundError("there is no such file")
        document = json.loads(path.read_text())
        config = document["config"]
        if not isinstance(config, dict):
            raise TypeError(f"its config is a {type(config).__name__}")
        if "categories" in document:
            listed = [(entry["id"], entry["name"]) for entry in document["categories"]]
        else:
            listed = list(enumerate(document["class_names"]))
        ids = np.array([int(number) for number, _ in listed], np.int64).tolist()
        names = [str(name) for _, name in listed]
        categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        return {"config": config, "categories": categories}
    except Exception as error:  # any content
        raise CheckpointError(f"{path}: can't be read ({first_line(error)})") from error


def compare_documents(
    workdir: Path, stored: dict[str, Any], present: dict[str, Any], read_only: bool
) -> None:
    """Checks that a run can be continued or read with another document.

    Args:
      workdir: of the run, for the message.
      stored: document of the run. A key that the run did not have counts at its default.
      present: document of this process.
      read_only: compare only the keys of the model that determine parameters, and no classes.

    Raises:
      CheckpointError: they differ; the message names keys with both values, and the first class.
    """
    differences = [] if read_only else _category_differences(stored, present)
    differences += changed_values(stored["config"], present["config"], evaluation=read_only)
    if differences:
        raise CheckpointError(
            f"{workdir}: holds a run of another config: {'; '.join(differences)}: "
            "choose another work directory or the values of that run"
        )


def read_config(workdir: str | os.PathLike) -> tuple[dict[str, Any], tuple[Category, ...]]:
    """Reads the config and the classes of a work directory.

    Returns:
      The config as nested dictionaries (tuples have become lists), and one category per label.

    Raises:
      CheckpointError: `config.json` is missing or damaged.
    """
    document = load_document(Path(workdir) / CONFIG_FILE)
    categories = tuple(Category(entry["id"], entry["name"]) for entry in document["categories"])
    return document["config"], categories


def read_categories(workdir: str | os.PathLike) -> tuple[Category, ...] | None:
    """Returns the classes of a run by label; None if the work directory has no `config.json`.

    Raises:
      CheckpointError: `config.json` is damaged.
    """
    if not (Path(workdir) / CONFIG_FILE).exists():
        return None
    return read_config(workdir)[1]


def read_run_config(workdir: str | os.PathLike) -> tuple[ConfigDict, tuple[Category, ...]]:
    """Reads config and classes as `read_config`, the config with the keys of this version.

    Keys that are newer than the run have their defaults. Removed model keys raise an error; other
    removed keys are ignored.

    Raises:
      CheckpointError: `config.json` is missing or damaged, or its config is not valid here.
    """
    path = Path(workdir) / CONFIG_FILE
    stored, categories = read_config(workdir)
    try:
        config = restored_config(stored)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # any content in place of a value or a section
        raise CheckpointError(f"{path}: unknown to this version ({first_line(error)})") from error
    return config, categories


def _category_differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Describes the first difference between the classes of two documents; [] if there is none."""
    was, now = stored["categories"], present["categories"]
    if len(was) != len(now):
        return [f"the data had {len(was)} classes, now {len(now)}"]
    for label, (before, after) in enumerate(zip(was, now, strict=True)):
        if before != after:
            one, other = (f"{entry['name']!r} (id {entry['id']})" for entry in (before, after))
            return [f"class {label} was {one}, now {other}"]
    return []
