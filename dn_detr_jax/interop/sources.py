"""Where state dicts come from: the names of other code, as renamings to and from official names.

A `Source` is one model of one code base. Its tables map names only, so that they hold for any
depth and do not depend on our parameters: `to_official` is followed by the import of an official
state dict, `from_official` comes after its export. The sources are in `names.elsewhere`.

Templates are beginnings of names; letters in braces stand for numbers, and what follows is kept:
("a.{i}.norm1.", "b.{i}.norms.0.") maps b.3.norms.0.bias to a.3.norm1.bias.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dn_detr_jax.data.coco_classes import COCO_CATEGORIES, Category, assumed_categories
from dn_detr_jax.errors import ConversionError, some_of

Pairs = tuple[tuple[str, str], ...]
State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of a code base other than the official one of DN-DETR.

    Attributes:
      name: of the code base.
      variant: `config.model.name` of the model.
      marks: names that all its state dicts have.
      absent: official names that none has.
      renames: (official, theirs) templates; names without one are the same. The first match holds.
      twins: (second, first) templates of their names: a tensor has both.
      older: (older, present) templates of their names: files of earlier releases have the older.
      packed: (official, theirs in the order of the rows) templates of tensors that are one there.
      decides: config keys that the names decide.
      config: keys that follow from the source.
      contiguous_coco: 80 classes are COCO's, numbered without gaps.
      complete: official state dict -> the tensors that it lacks.
      reduce: official state dict -> what the source has a place for.
    """

    name: str
    variant: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    renames: Pairs = ()
    twins: Pairs = ()
    older: Pairs = ()
    packed: tuple[tuple[str, tuple[str, ...]], ...] = ()
    decides: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    contiguous_coco: bool = False
    complete: Callable[[State], dict[str, np.ndarray]] = lambda state: {}
    reduce: Callable[[State], State] = lambda state: state

    def is_of(self, state: State) -> bool:
        """Whether a state dict is of this source."""
        return all(x in state for x in self.marks) and not any(x in state for x in self.absent)

    def official_name(self, name: str) -> str:
        """The official name of one of the source's names."""
        first = self.first_name(name)
        return _rename(first, tuple((theirs, ours) for ours, theirs in self.renames))

    def first_name(self, name: str) -> str:
        """The present name of a tensor, the first one of twins."""
        return _rename(_rename(name, self.older), self.twins)

    def to_official(self, state: State) -> dict[str, np.ndarray]:
        """A state dict of the source under official names; unknown names stay.

        Raises:
          ConversionError: two names of one tensor with different values, or a part of one missing.
        """
        return self.convert(state)[0]

    def convert(self, state: State) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """The state dict of `to_official`, and the names of the tensors that are new in it.

        Raises:
          ConversionError: see `to_official`.
        """
        theirs = _merged(_renamed(state, self.older), self.twins)
        result = _renamed(self._joined(theirs), tuple((b, a) for a, b in self.renames))
        added = self.complete(result)
        return result | added, tuple(name for name in added if name not in result)

    def from_official(self, state: State) -> dict[str, np.ndarray]:
        """An official state dict under the names of the source, twins under both.

        Raises:
          ConversionError: a tensor that the source has no place for.
        """
        theirs = _renamed(self._split(self.reduce(state)), self.renames)
        twins = tuple((first, second) for second, first in self.twins)
        return theirs | {
            other: value
            for name, value in theirs.items()
            if (other := _rename(name, twins)) != name
        }

    def categories(self, num_classes: int) -> tuple[Category, ...]:
        """The classes of a checkpoint that does not name them."""
        if self.contiguous_coco and num_classes == len(COCO_CATEGORIES):
            return COCO_CATEGORIES
        return assumed_categories(num_classes)

    def settings(self, num_classes: int) -> dict[str, Any]:
        """Config keys that follow from the source of a checkpoint with so many classes."""
        found = dict(self.config)
        if self.contiguous_coco and num_classes == len(COCO_CATEGORIES):
            found |= {"model.num_classes": num_classes, "data.labels": "contiguous"}
        return found

    def _joined(self, state: State) -> dict[str, np.ndarray]:
        """Puts the parts of packed tensors together."""
        result = dict(state)
        for official, parts in self.packed:
            first = _pattern(parts[0])
            for name in state:
                if not (match := first.match(name)):
                    continue
                rest = name[match.end() :]
                names = [part.format(**match.groupdict()) + rest for part in parts]
                if absent := [part for part in names if part not in state]:
                    raise ConversionError(f"{name} is there, but not {some_of(absent)}")
                joined = np.concatenate([result.pop(part) for part in names])
                result[official.format(**match.groupdict()) + rest] = joined
        return result

    def _split(self, state: State) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        for name, value in state.items():
            for official, parts in self.packed:
                if match := _pattern(official).match(name):
                    rest = name[match.end() :]
                    names = [part.format(**match.groupdict()) + rest for part in parts]
                    result |= dict(zip(names, np.split(value, len(parts)), strict=True))
                    break
            else:
                result[name] = value
        return result


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _rename(name: str, pairs: Pairs) -> str:
    for old, new in pairs:
        if match := _pattern(old).match(name):
            return new.format(**match.groupdict()) + name[match.end() :]
    return name


def _renamed(state: State, pairs: Pairs) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for name, value in state.items():
        new = _rename(name, pairs)
        if new in result:
            raise ConversionError(f"{name} is another name of {new}, and both are there")
        result[new] = value
    return result


def _merged(state: State, twins: Pairs) -> dict[str, np.ndarray]:
    """One name, the first, for each tensor that the source has twice."""
    result: dict[str, np.ndarray] = {}
    for name, value in state.items():
        first = _rename(name, twins)
        if not np.array_equal(result.setdefault(first, value), value):
            raise ConversionError(f"{first} and {name} are one tensor in the model, but differ")
    return result
