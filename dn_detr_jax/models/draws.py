"""Random numbers of many keys, drawn together: a program that is small and compiles quickly.

Flax folds the path of every parameter into the key, and draws from the result. For a detector that
is hundreds of small programs within one, each of which the compiler treats anew: 40 uniform draws
take XLA 4 s on a CPU. The same draws, stacked, are a few.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import (
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    random_bits_p,
    random_fold_in_p,
    remat_p,
)

# Operations that call a function, and the name of that function among their parameters.
_CALLS = {
    jit_p: "jaxpr",
    remat_p: "jaxpr",
    custom_jvp_call_p: "call_jaxpr",
    custom_vjp_call_p: "call_jaxpr",
}


def draw_together(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Changes how a function of a random key draws; the values stay the same, bit for bit.

    Args:
      function: key -> arrays, such as the initialization of a model. What its result doesn't
        depend on is left out.

    Returns:
      A function for `jax.jit`. With other keys than JAX's default ones, `function` itself runs:
      stacked draws of theirs may differ.
    """

    def drawing_together(key: jax.Array) -> Any:
        if str(jax.random.key_impl(key)) != "threefry2x32":
            return function(key)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(key)
        results = _evaluate(_Flat(closed), key)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return drawing_together


class _Flat:
    """The operations of a function without calls, and only those that its results need.

    Attributes:
      input: the argument.
      constants: value by variable.
      operations: (operation, inputs, outputs), in order; an input is a variable or a literal.
      results: variables and literals.
    """

    def __init__(self, closed: ClosedJaxpr):
        # A call's own variables are replaced by fresh ones, as a function may be called twice.
        self.constants: dict[Any, Any] = {}
        self.operations: list[tuple[JaxprEqn, list[Any], list[Any]]] = []
        self.input = object()
        self.results = self._inline(closed, [self.input])
        self._keep_needed()

    def _inline(self, function: ClosedJaxpr | Jaxpr, inputs: Sequence[Any]) -> list[Any]:
        """Adds the operations of a function; returns what its results are."""
        jaxpr, constants = getattr(function, "jaxpr", function), getattr(function, "consts", ())
        names: dict[Var, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            names[var] = object()
            self.constants[names[var]] = value

        def name(var):
            return var if isinstance(var, Literal) else names[var]

        for eqn in jaxpr.eqns:
            sources = [name(var) for var in eqn.invars]
            if eqn.primitive in _CALLS:
                targets = self._inline(eqn.params[_CALLS[eqn.primitive]], sources)
            else:
                targets = [object() for _ in eqn.outvars]
                self.operations.append((eqn, sources, targets))
            names.update(zip(eqn.outvars, targets, strict=True))
        return [name(var) for var in jaxpr.outvars]

    def _keep_needed(self) -> None:
        needed = {id(result) for result in self.results}
        kept = []
        for operation in reversed(self.operations):
            _, sources, targets = operation
            if any(id(target) in needed for target in targets):
                needed.update(map(id, sources))
                kept.append(operation)
        self.operations = kept[::-1]


@dataclasses.dataclass(frozen=True)
class _Row:
    """Row `index` of an array, not taken yet: rows of one array are taken together."""

    array: jax.Array
    index: int


def _value(known: Any) -> Any:
    return known.array[known.index] if isinstance(known, _Row) else known


def _stacked(keys: Sequence[Any]) -> jax.Array:
    """Returns an array of keys, few of which are computed one by one."""
    if all(key is keys[0] for key in keys):
        return jnp.broadcast_to(_value(keys[0]), len(keys))
    if all(isinstance(key, _Row) and key.array is keys[0].array for key in keys):
        return keys[0].array[np.array([key.index for key in keys])]
    return jnp.stack([_value(key) for key in keys])


def _evaluate(flat: _Flat, key: jax.Array) -> list[Any]:
    """Computes the results; draws that don't wait for each other are made together."""
    known: dict[Any, Any] = {flat.input: key} | flat.constants
    waiting = flat.operations
    while waiting:
        folds, draws, later = [], collections.defaultdict(list), []
        for operation in waiting:
            eqn, sources, targets = operation
            if not all(isinstance(source, Literal) or source in known for source in sources):
                later.append(operation)
                continue
            values = [x.val if isinstance(x, Literal) else known[x] for x in sources]
            single = eqn.primitive in (random_fold_in_p, random_bits_p) and _is_single(values[0])
            if single and eqn.primitive is random_fold_in_p:
                folds.append((targets[0], *values))
            elif single and (size := _size_drawn(**eqn.params)):
                draws[size].append((targets[0], values[0], eqn.params["shape"]))
            else:
                found = eqn.primitive.bind(*map(_value, values), **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
                known.update(zip(targets, found, strict=True))
        if folds:
            names, keys, data = zip(*folds, strict=True)
            folded = jax.vmap(jax.random.fold_in)(_stacked(keys), jnp.stack(data))
            known.update({name: _Row(folded, i) for i, name in enumerate(names)})
        for size, ones in draws.items():
            names, keys, drawn = zip(*ones, strict=True)
            bits = jax.vmap(lambda own, size=size: jax.random.bits(own, (size,)))(_stacked(keys))
            for i, (name, shape) in enumerate(zip(names, drawn, strict=True)):
                known[name] = bits[i, : math.prod(shape)].reshape(shape)
        waiting = later
    return [x.val if isinstance(x, Literal) else _value(known[x]) for x in flat.results]


def _is_single(key: Any) -> bool:
    return isinstance(key, _Row) or not key.shape


def _size_drawn(shape: tuple[int, ...], bit_width: int) -> int:
    """Returns how many numbers to draw for a shape: its own number or more; 0: as it is.

    With partitionable keys, number i depends on the key and i alone, so that draws of similar size
    can be made together: each is the beginning of a longer one.
    """
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if not (partitionable and bit_width == 32 and (size := math.prod(shape))):
        return 0
    return 4 ** max(math.ceil(math.log(size, 4)), 4)
