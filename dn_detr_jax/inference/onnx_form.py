"""Rewrites a program into operations that jax2onnx converts correctly.

jax2onnx converts a program operation by operation. Some operations it lacks, and some it converts
wrongly without an error: the padding of a maximum over windows is lost, and constants that are
repeated for a batch of unknown size get another size. `in_onnx_form` evaluates a traced program and
replaces these operations by others with equal results.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.extend import core

# Calls whose body is evaluated in place, and the parameter that holds it.
_BODIES = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_PLATFORM = "default"  # the branch of `lax.platform_dependent`


def in_onnx_form(closed: core.ClosedJaxpr) -> Callable[..., list[Any]]:
    """Returns a function with the results of a traced program, for jax2onnx.

    Args:
      closed: the program; the first dimension of its last argument may be symbolic.

    Returns:
      A function of the same arguments; it returns a flat list.
    """

    def function(*arguments: jax.Array) -> list[Any]:
        zeros = lax.mul(arguments[-1], np.array(0, arguments[-1].dtype))
        zeros = lax.reshape(lax.slice_in_dim(zeros, 0, 1, axis=1), zeros.shape[:1])
        return _evaluate(closed.jaxpr, closed.consts, arguments, zeros)

    return function


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], zeros: Any) -> list:
    """Evaluates a program; `zeros` has one number for each image."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        found = _results(equation, [read(atom) for atom in equation.invars], zeros)
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: Any, operands: list, zeros: Any) -> Sequence[Any]:
    """Evaluates an operation, or what replaces it."""
    name, params = equation.primitive.name, equation.params
    if name in _BODIES:
        body = params[_BODIES[name]]
        return _evaluate(body.jaxpr, body.consts, operands, zeros)
    if name == "platform_index":
        platforms = params["platforms"]
        chosen = next(i for i, names in enumerate(platforms) if names is None)
        return [np.int32(chosen)]
    if name == "cond" and isinstance(operands[0], np.integer | int):
        body = params["branches"][int(operands[0])]
        return _evaluate(body.jaxpr, body.consts, operands[1:], zeros)
    if name == "optimization_barrier":
        return operands
    replacement = _REPLACEMENTS.get(name)
    if replacement is not None:
        found = replacement(zeros, *operands, **params)
        if found is not None:
            return [found]
    found = equation.primitive.bind(*operands, **params)
    return found if equation.primitive.multiple_results else [found]


def _broadcast(
    zeros: Any, operand: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any
) -> Any | None:
    """Repeats an operand for the images of a batch by reading it once for each."""
    kept = (
        {axis: operand.shape[i] for i, axis in enumerate(broadcast_dimensions)}
        if np.ndim(operand)
        else {}
    )
    new = [
        a
        for a, n in enumerate(shape)
        if not isinstance(n, int | np.integer) and kept.get(a, 1) == 1
    ]
    if not new:
        return None
    (axis,) = new
    size = tuple(1 if a == axis else n for a, n in enumerate(shape))
    once = lax.broadcast_in_dim(operand, size, broadcast_dimensions)
    return jnp.take(once, zeros, axis=axis, mode="clip")


def _add(zeros: Any, x: Any, y: Any, **_: Any) -> Any:
    """Adds integers by a subtraction, because jax2onnx makes half of a sum a mean of floats."""
    return lax.sub(x, lax.neg(y)) if jnp.issubdtype(x.dtype, jnp.signedinteger) else None


def _remainder(zeros: Any, x: Any, y: Any) -> Any:
    """Computes the remainder with the sign of the dividend."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return None
    return lax.sub(x, lax.mul(lax.div(x, y), y))


def _pad(zeros: Any, operand: Any, value: Any, padding_config: Any, **_: Any) -> Any:
    """Pads by concatenation."""
    if any(inside or min(before, after) < 0 for before, after, inside in padding_config):
        return None
    for axis, (before, after, _) in enumerate(padding_config):
        parts = [operand]
        for place, width in ((0, before), (2, after)):
            if width:
                shape = tuple(width if a == axis else n for a, n in enumerate(operand.shape))
                part = _broadcast(zeros, value, shape=shape, broadcast_dimensions=())
                if part is None:
                    part = lax.broadcast(value, shape)
                parts.insert(place, part)
        operand = lax.concatenate(parts, axis) if len(parts) > 1 else operand
    return operand


def _window_maximum(
    zeros: Any, operand: Any, *, window_dimensions: Any, window_strides: Any, padding: Any, **_: Any
) -> Any:
    """Pads in front of a pooling over windows of height and width."""
    lowest = np.array(-np.inf, operand.dtype)
    operand = _pad(zeros, operand, lowest, [(before, after, 0) for before, after in padding])
    shape, strides = window_dimensions[1:3], window_strides[1:3]
    return nn.max_pool(operand, window_shape=shape, strides=strides, padding="VALID")


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "broadcast_in_dim": _broadcast,
    "pad": _pad,
    "rem": _remainder,
    "reduce_window_max": _window_maximum,
}
