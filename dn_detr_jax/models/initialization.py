"""The initial parameters of a detector."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax.models.draws import draw_together


def initial_params(model: nn.Module, key: jax.Array) -> dict:
    """Draws the parameters of a detector, which do not depend on the size of the image."""
    return model.init(key, jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64))["params"]


@functools.lru_cache(maxsize=8)
def initializer(model: nn.Module) -> Callable[[jax.Array], dict]:
    """Jits the initialization: a function key -> parameters.

    Every call for an equal model gives the same function, so that one process traces the model
    once, for shapes and values alike.
    """
    return jax.jit(draw_together(functools.partial(initial_params, model)))
