"""The names and layouts of the official PyTorch models, as one table a variant for both directions.

A table pairs every module of the official state dict with ours, `KINDS` says what tensors a module
of a kind has and how their layouts differ. Import and export read the same rows, so that a round
trip is exact by construction. The tables are in `names/`; `registry.torch_names` finds the one of a
variant.

PyTorch keeps linear weights as (out, in) and convolutions as (out, in, height, width); Flax has
(in, out) and (height, width, in, out). Packed attention has query, key and value in one matrix
there. A head that two modules share appears under both names.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dn_detr_jax.errors import some_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of ours becomes a tensor of theirs, and back."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


_SAME = Layout(lambda x: x, lambda x: x)
_LINEAR = Layout(np.transpose, np.transpose)
_CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
# A 1x1 convolution there, a linear map over channels here.
_POINTWISE = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)
# A convolution whose size decides between the two.
_PROJECTION = Layout(
    lambda x: (_POINTWISE if x.ndim == 2 else _CONV).to_torch(x),
    lambda x: (_POINTWISE if x.shape[2:] == (1, 1) else _CONV).from_torch(x),
)
_SCALAR = Layout(lambda x: x.reshape(1), lambda x: x.reshape(()))

# kind -> (their leaf, our leaf, layout)
KINDS: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "linear": ((".weight", "/kernel", _LINEAR), (".bias", "/bias", _SAME)),
    "packed": (("_weight", "/kernel", _LINEAR), ("_bias", "/bias", _SAME)),
    "pointwise": ((".weight", "/kernel", _POINTWISE), (".bias", "/bias", _SAME)),
    "projection": ((".weight", "/kernel", _PROJECTION), (".bias", "/bias", _SAME)),
    "conv": ((".weight", "/kernel", _CONV),),
    "conv_bias": ((".weight", "/kernel", _CONV), (".bias", "/bias", _SAME)),
    "matrix": ((".weight", "/kernel", _LINEAR),),
    "norm": ((".weight", "/scale", _SAME), (".bias", "/bias", _SAME)),
    "batch_norm": (
        (".weight", "/scale", _SAME),
        (".bias", "/bias", _SAME),
        (".running_mean", "/mean", _SAME),
        (".running_var", "/var", _SAME),
    ),
    "slope": ((".weight", "/slope", _SCALAR),),
    "table": ((".weight", "", _SAME),),
    "array": (("", "", _SAME),),
}

# (kind, their module, ours); several of ours are parts of theirs along its first axis. Numbers are
# letters in braces: ("linear", "bbox_embed.{i}", ("box_head_{i}",)).
Row = tuple[str, str, tuple[str, ...]]


def rows(
    within: tuple[str, str], *modules: tuple[str, str, str | tuple[str, ...]]
) -> tuple[Row, ...]:
    """Rows of modules inside a module, whose names on both sides are put in front."""
    theirs, ours = within
    return tuple(
        (kind, theirs + name, tuple(ours + path for path in np.atleast_1d(paths)))
        for kind, name, paths in modules
    )


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One tensor of the official state dict.

    Attributes:
      name: in the official state dict.
      shape: there.
      paths: our parameters made of it, "/" between the parts; several are equal parts along its
        first axis.
      layout: of each part.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layout: Layout

    def split(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Our arrays by path, from their tensor of the right shape."""
        parts = np.split(tensor, len(self.paths)) if len(self.paths) > 1 else [tensor]
        return {
            path: np.ascontiguousarray(self.layout.from_torch(part)).reshape(self._part_shape(part))
            for path, part in zip(self.paths, parts, strict=True)
        }

    def _part_shape(self, part: np.ndarray) -> tuple[int, ...]:
        # `ascontiguousarray` makes scalars one-dimensional.
        return self.layout.from_torch(part).shape

    def join(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Their tensor from our arrays by path."""
        parts = [self.layout.to_torch(np.asarray(params[path])) for path in self.paths]
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A tensor of a row: templates of its name, of our paths, and of all leaves of our module."""

    pattern: re.Pattern
    name: str
    paths: tuple[str, ...]
    leaves: tuple[str, ...]
    layout: Layout


@functools.cache
def _rules(modules: tuple[Row, ...]) -> tuple[_Rule, ...]:
    rules = []
    for kind, theirs, ours in modules:
        leaves = tuple(ours[0] + leaf for _, leaf, _ in KINDS[kind])
        for their_leaf, our_leaf, layout in KINDS[kind]:
            paths = tuple(path + our_leaf for path in ours)
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(paths[0]))
            rules.append(_Rule(re.compile(pattern), theirs + their_leaf, paths, leaves, layout))
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class TorchNames:
    """The official state dict of a variant.

    Attributes:
      rows: its modules and ours.
      config: (state dict, command line stored with it or {}) -> the config keys that they decide,
        {"model.num_queries": 300, ...}; the number of classes is one of them.
      needs: names that every state dict of the variant has, as regular expressions.
      excludes: names that none has. `needs` and `excludes` together tell the variants apart.
      tied: (second, first) beginnings of names: a tensor has both, and `rows` has the first.
    """

    rows: tuple[Row, ...]
    config: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], dict[str, Any]]
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    def misfit(self, names: Iterable[str]) -> str:
        """What speaks against names being those of this variant, "" if they are.

        Examples:
          >>> TorchNames((), dict, needs=("a.weight", "b.weight")).misfit(["a.weight"])
          'it has no b.weight'
        """
        names = list(names)

        def matching(pattern: str) -> list[str]:
            return [name for name in names if re.fullmatch(pattern, name)]

        missing = [pattern for pattern in self.needs if not matching(pattern)]
        foreign = [name for pattern in self.excludes for name in matching(pattern)]
        if missing:
            return f"it has no {some_of(missing)}"
        return f"it has {some_of(foreign, count=1)}" if foreign else ""

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[TorchTensor], list[str]]:
        """The official tensors that hold the given parameters.

        Args:
          shapes: shape of every parameter by path, for example {"class_head/bias": (91,)}.

        Returns:
          The tensors, and the paths that have no place in the official model (group norms).
        """
        tensors: list[TorchTensor] = []
        covered: set[str] = set()
        rules = _rules(self.rows)
        for path in shapes:
            for rule in rules:
                match = rule.pattern.fullmatch(path)
                if not match:
                    continue
                indices = match.groupdict()
                # A group norm has a scale and a bias as a batch norm has, and nothing else.
                if any(leaf.format(**indices) not in shapes for leaf in rule.leaves):
                    continue
                paths = tuple(template.format(**indices) for template in rule.paths)
                # Shapes alone: a broadcast zero takes no memory.
                part = rule.layout.to_torch(np.broadcast_to(np.float32(0), shapes[path])).shape
                shape = (part[0] * len(paths), *part[1:])
                name = rule.name.format(**indices)
                tensors.append(TorchTensor(name, shape, paths, rule.layout))
                covered.update(paths)
                break
        return tensors, [path for path in shapes if path not in covered]

    def first_name(self, name: str) -> str:
        """The name under which a tensor is in the rows: of a tied one, that of its twin."""
        for second, first in self.tied:
            if name.startswith(second):
                return first + name.removeprefix(second)
        return name

    def second_names(self, name: str) -> tuple[str, ...]:
        """The other names under which the official state dict has the tensor `name`."""
        return tuple(
            second + name.removeprefix(first)
            for second, first in self.tied
            if name.startswith(first)
        )
