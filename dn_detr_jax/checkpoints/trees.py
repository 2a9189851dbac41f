"""A train state as nested dictionaries of arrays, and the host state as JSON.

Checkpoints hold nested dictionaries, so that they depend on no class of optax and their arrays can
be compared by name.
"""

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dn_detr_jax.errors import CheckpointError

PyTree = Any

_MOST_NAMED = 3  # differing arrays named in an error


def fields(state: PyTree) -> dict[str, PyTree]:
    """Returns the fields of a state, which is a mapping or a dataclass."""
    if dataclasses.is_dataclass(state):
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return dict(state)


def items(state: PyTree) -> dict[str, PyTree]:
    """Returns the items of a checkpoint, `params`, `ema` and `state`; empty ones are left out."""
    rest = fields(state)
    parts = {item: rest.pop(item, None) for item in ("params", "ema")} | {"state": rest}
    return {item: tree for item, tree in parts.items() if jax.tree.leaves(tree)}


def nested(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree as nested dictionaries, keyed by the names on their paths."""
    return traverse_util.unflatten_dict(_flat(tree))


def like(target: PyTree, values: dict[str, Any]) -> PyTree:
    """Returns the leaves of nested dictionaries in the structure of `target`."""
    flat = traverse_util.flatten_dict(values)
    return jax.tree.unflatten(jax.tree.structure(target), [flat[keys] for keys in _flat(target)])


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, type and sharding of a leaf; without a sharding, the first device's."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compare_arrays(path: Path, saved: Any, target: PyTree) -> None:
    """Raises CheckpointError if the arrays of an item are not those of `target`.

    Args:
      path: of the item, for the message.
      saved: Orbax's metadata of the item.
      target: tree of arrays or of what describes them.
    """
    describe = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    stored = {keys: describe(leaf) for keys, leaf in _flat(getattr(saved, "tree", saved)).items()}
    wanted = {keys: describe(leaf) for keys, leaf in _flat(target).items()}
    differing = [keys for keys in stored | wanted if stored.get(keys) != wanted.get(keys)]
    if not differing:
        return
    named = "; ".join(
        f"{'/'.join(keys)} is {stored.get(keys, 'missing')} in the checkpoint, "
        f"{wanted.get(keys, 'missing')} in the model"
        for keys in sorted(differing)[:_MOST_NAMED]
    )
    more = len(differing) - _MOST_NAMED
    raise CheckpointError(
        f"{path}: does not fit the model: {named}{f'; and {more} more' if more > 0 else ''}"
    )


def to_json(value: Any) -> Any:
    """Returns a host state as JSON can hold it; NumPy arrays become text, bit for bit.

    Examples:
      >>> from_json(to_json({"n": np.int64(3), "v": np.arange(2)}))
      {'n': 3, 'v': array([0, 1])}
    """
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects can't be saved")
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """Inverts `to_json`; tuples come back as lists."""
    if isinstance(value, dict) and "__array__" in value:
        data = np.frombuffer(base64.b64decode(value["__array__"]), np.dtype(value["dtype"]))
        return data.reshape(value["shape"]).copy()
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value


def _flat(tree: PyTree) -> dict[tuple[str, ...], Any]:
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
