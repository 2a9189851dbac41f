"""What PyTorch code computes in another way, put into a model while it is compared.

Each function returns an interceptor for `flax.linen.intercept_methods`. None of this is an option
of a model: results would be worse, or depend on a stored selection.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dn_detr_jax.models.decoder import DenseDecoder
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.pyramid import LastLevel

Interceptor = Callable[..., Any]


def selecting(selected: jax.Array | None) -> Interceptor:
    """Puts stored proposals in place of those that a model selects.

    Rounding swaps proposals of nearly equal scores, and the content of a query belongs to its rank:
    two swapped proposals change the outputs. The model's own selection is stored as `own_selected`.

    Args:
      selected: int [B, N] tokens, -1 where none is stored: the model's own that are not stored
        follow there in their order. None: the model's own.
    """

    def intercept(method, args, kwargs, context):
        own = method(*args, **kwargs)
        if selected is None or context.method_name != "select":
            return own
        context.module.sow("intermediates", "own_selected", own)
        known = selected >= 0
        is_stored = jnp.any(own[:, :, None] == selected[:, None], axis=-1)
        rest = jnp.take_along_axis(own, jnp.argsort(is_stored, axis=1), axis=1)
        place = jnp.maximum(jnp.cumsum(~known, axis=1) - 1, 0)
        return jnp.where(known, selected, jnp.take_along_axis(rest, place, axis=1))

    return intercept


def attending_to_padding() -> Interceptor:
    """Lets a dense decoder attend to padded tokens, with PyTorch's position encodings of them."""

    def intercept(method, args, kwargs, context):
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if isinstance(context.module, DenseDecoder):
            queries, memory, *rest = args
            memory = memory.replace(valid=jnp.ones_like(memory.valid))
            return method(queries, memory, *rest, **kwargs)
        result = method(*args, **kwargs)
        return _with_encoded_padding(result) if isinstance(context.module, LastLevel) else result

    return intercept


def _with_encoded_padding(levels: Levels) -> Levels:
    """Encodes padding as PyTorch does: it counts valid pixels along the row and the column.

    A padded column has no valid pixel, and its vertical position is 0; so is the horizontal
    position of a padded row.
    """
    ((height, width),) = levels.shapes
    valid = levels.valid.reshape(-1, height, width)
    half = levels.position.shape[-1] // 2
    zero = jnp.arange(half) % 2  # sines and cosines of 0
    columns = jnp.broadcast_to(valid[:, :1], valid.shape).reshape(levels.valid.shape)
    rows = jnp.broadcast_to(valid[:, :, :1], valid.shape).reshape(levels.valid.shape)
    vertical, horizontal = jnp.split(levels.position, 2, axis=-1)
    vertical = jnp.where(columns[..., None], vertical, zero)
    horizontal = jnp.where(rows[..., None], horizontal, zero)
    return levels.replace(position=jnp.concatenate([vertical, horizontal], axis=-1))
