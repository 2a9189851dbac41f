"""The state dict in a checkpoint file: which entry holds it, and its names without wrappers.

Training programs store state dicts under keys such as `model`, `state_dict` or `ema`, one in
another, or put the key in front of every name. `DistributedDataParallel`, `torch.compile` and
others add the name of a wrapping module to the names of the tensors. Both are undone here alike, in
any nesting: a tensor's keys and its name are one list of parts between dots.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dn_detr_jax.errors import WeightsError
from dn_detr_jax.interop.torch_pickle import TensorView

# Keys under which checkpoints store a state dict, the preferred one first.
ENTRIES = (
    *("model", "ema_model", "state_dict", "model_ema", "model_state_dict", "state_dict_ema"),
    *("ema", "ema_state_dict", "model_ema_state_dict", "ema_state", "teacher", "student"),
    *("net", "network"),
)
# Names of modules that wrap another one.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Of a hostile file, in which a mapping contains itself.
_MOST_MAPPINGS, _DEEPEST = 100_000, 100


@dataclasses.dataclass(frozen=True)
class Selection:
    """A state dict of a file.

    Attributes:
      tensors: by name, without wrappers.
      entry: dotted path of the state dict, "" for a bare one.
      stripped: wrappers that were removed from names, each with the dots between them.
      others: dotted paths of the other state dicts.
    """

    tensors: dict[str, Any]
    entry: str
    stripped: tuple[str, ...]
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor: the parts of its path and name, and how many of them are of the path."""

    parts: tuple[str, ...]
    keys: int
    tensor: Any

    @property
    def path(self) -> tuple[str, ...]:
        return self.parts[: self.keys]

    @property
    def name(self) -> str:
        return ".".join(self.parts[self.keys :])

    def below(self, count: int) -> "_Leaf":
        return _Leaf(self.parts[count:], max(0, self.keys - count), self.tensor)


def select(content: Mapping[Any, Any], entry: str | None = None) -> Selection:
    """Chooses a state dict in what a file holds.

    Args:
      content: nested mappings with tensors (`TensorView` or arrays).
      entry: dotted path of keys, or of keys and the first parts of names; None: of the state dicts
        under keys of `ENTRIES`, the most preferred; or the tensors at the top.

    Returns:
      The state dict. Groups of tensors less than half as many as those of the largest are not
      taken for one.

    Raises:
      WeightsError: no state dict (there), or two tensors of one name.
    """
    leaves = _leaves(content)
    start: tuple[str, ...] = ()
    if entry is not None:
        start = tuple(entry.split("."))
        known = _paths(leaves)
        count = len(start)
        leaves = [
            leaf.below(count)
            for leaf in leaves
            if leaf.parts[:count] == start and len(leaf.parts) > count
        ]
        if not leaves:
            raise WeightsError(f"no state dict under {entry!r}; there are {known or 'none'}")
    groups = _groups(leaves)
    if not groups:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        paths = _paths(leaves)[:8]
        hint = f"; there are tensors under {paths}, which --entry can name" if paths else ""
        raise WeightsError(
            f"no tensors; a state dict is expected under one of {ENTRIES} or at the top, the file "
            f"has: {keys}{hint}"
        )
    least = max(map(len, groups.values())) / 2
    ranked = sorted((g for g in groups if len(groups[g]) >= least), key=_preference)
    tensors, stripped = unwrapped((leaf.name, leaf.tensor) for leaf in groups[ranked[0]])
    paths = [".".join((*start, *groups[group][0].path)) for group in ranked]
    return Selection(tensors, paths[0], stripped, tuple(paths[1:]))


def unwrapped(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Removes the names of wrapping modules from tensors' names.

    Returns:
      The tensors by their new names, and the removed parts.

    Raises:
      WeightsError: two names become one.

    Examples:
      >>> unwrapped({"module._orig_mod.fc.bias": 1, "head._orig_mod.bias": 2})
      ({'fc.bias': 1, 'head.bias': 2}, ('module._orig_mod', '_orig_mod'))
    """
    pattern = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})(?:\.(?:{'|'.join(WRAPPERS)}))*\.")
    result: dict[str, Any] = {}
    original: dict[str, str] = {}
    stripped: dict[str, None] = {}
    for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
        stripped |= dict.fromkeys(found[:-1] for found in pattern.findall(name))
        short = pattern.sub("", name)
        if short in result:
            raise WeightsError(f"{original[short]} and {name} are two tensors of one name")
        result[short], original[short] = value, name
    return result, tuple(stripped)


def _leaves(content: Mapping[Any, Any]) -> list[_Leaf]:
    """All tensors under keys that are texts; an optimizer's state has numbers as keys."""
    leaves: list[_Leaf] = []
    pending: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    visited = 0
    while pending:
        keys, mapping = pending.popleft()
        visited += 1
        if visited > _MOST_MAPPINGS or len(keys) > _DEEPEST:
            raise WeightsError("mappings in mappings without end")
        for key, value in mapping.items():
            if not isinstance(key, str):
                continue
            parts = (*keys, *key.split("."))
            if isinstance(value, Mapping):
                pending.append((parts, value))
            elif isinstance(value, TensorView | np.ndarray):
                leaves.append(_Leaf(parts, len(keys), value))
    return leaves


def _paths(leaves: Iterable[_Leaf]) -> list[str]:
    """The dotted paths under which there are tensors."""
    return list(dict.fromkeys(".".join(leaf.path) for leaf in leaves if leaf.path))


def _groups(leaves: Iterable[_Leaf]) -> dict[tuple[str, ...], list[_Leaf]]:
    """The tensors by the entry that they belong to, a tuple of parts from `ENTRIES`.

    Keys of mappings are entries or wrappers; tensors under other keys belong to nothing. In names
    the first parts are an entry only if that holds for all names of their mapping: in a model that
    calls one of several parts `model`, that is no entry.
    """
    siblings: dict[tuple[str, ...], list[_Leaf]] = {}
    for leaf in leaves:
        if all(part in ENTRIES or part in WRAPPERS for part in leaf.parts[: leaf.keys]):
            siblings.setdefault(leaf.parts[: leaf.keys], []).append(leaf)
    groups: dict[tuple[str, ...], list[_Leaf]] = {}
    for keys, members in siblings.items():
        lengths = [_entry_length(leaf.parts[leaf.keys :]) for leaf in members]
        for leaf, length in zip(members, lengths, strict=True):
            path = leaf.parts[: len(keys) + (length if all(lengths) else 0)]
            entry = tuple(part for part in path if part in ENTRIES)
            groups.setdefault(entry, []).append(_Leaf(leaf.parts, len(path), leaf.tensor))
    return groups


def _entry_length(name: tuple[str, ...]) -> int:
    """How many of a name's first parts are entries, and wrappers in front of them."""
    length = 0
    for i, part in enumerate(name[:-1]):
        if part in ENTRIES:
            length = i + 1
        elif part not in WRAPPERS:
            break
    return length


def _preference(entry: tuple[str, ...]) -> tuple[int, ...]:
    """Sorts entries by `ENTRIES`; a bare state dict comes last."""
    return tuple(map(ENTRIES.index, entry)) or (len(ENTRIES),)
