"""Barriers, gathers and checks between the processes of a run.

With one process every function here returns at once.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dn_detr_jax.config import flat_values
from dn_detr_jax.config.variants import schema_of
from dn_detr_jax.errors import DistributedError

_SHARED_SECONDS = 20.0  # until a file of one machine is visible to the others


def barrier(name: str) -> None:
    """Waits until all processes have called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_gather(values: np.ndarray) -> np.ndarray:
    """Gathers an array [...] of each process into [P, ...], bit by bit."""
    values = np.ascontiguousarray(values)
    if jax.process_count() == 1:
        return values[None]
    # As bytes: JAX would make float32 of float64.
    raw = np.frombuffer(values.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(raw))
    return np.frombuffer(gathered.tobytes(), values.dtype).reshape(-1, *values.shape)


def agreed_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the values of a valid config that must be the same in all processes, by key."""
    keys = schema_of(config.model.name).keys
    values = flat_values(config)
    return {f"config.{k}": value for k, value in values.items() if keys[k].machines == "same"}


def check_agreement(values: Mapping[str, Any]) -> None:
    """Checks that values are the same in all processes.

    Args:
      values: JSON values, by a name for the error.

    Raises:
      DistributedError: naming the first value that differs, and its value in this process.
    """
    if jax.process_count() == 1:
        return
    names = sorted(values)
    # The names come first: arrays of different shapes can't be gathered.
    for key, column in (("the version of this program", [names]), ("", [values[n] for n in names])):
        digests = all_gather(np.stack([_digest(value) for value in column]))  # [P, K, 8]
        differs = (digests != digests[0]).any(axis=-1)
        if differs.any():
            process, position = np.argwhere(differs)[0].tolist()
            name = key or f"{names[position]} = {str(column[position])[:200]!r}"
            raise DistributedError(
                f"{name}: not the same in process 0 and in process {process}; start all processes "
                "with the same command, code and data"
            )


def _digest(value: Any) -> np.ndarray:
    text = json.dumps(value, sort_keys=True, default=str)
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8)


def check_shared(folder: Path) -> None:
    """Checks that all processes see the files that process 0 writes into a folder.

    Raises:
      DistributedError: a process does not see them.
      OSError: process 0 can't write into the folder.
    """
    if jax.process_count() == 1:
        return
    token = all_gather(np.frombuffer(os.urandom(8), np.uint8))[0]
    marker = Path(folder) / f"processes-{token.tobytes().hex()}"
    if jax.process_index() == 0:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    barrier("marker")
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = np.flatnonzero(~all_gather(np.array(seen)))
    if jax.process_index() == 0:
        marker.unlink()
    if len(blind):
        raise DistributedError(
            f"{folder}: process {blind[0]} does not see the files of process 0; with several "
            "machines the folder must be on a file system that they share"
        )
