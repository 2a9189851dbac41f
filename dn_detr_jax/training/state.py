"""The train state: parameters, optimizer state, moving average, and their shardings.

Every device has a copy of the parameters. The optimizer's moments and the moving average may be
split over the devices instead (Rajbhandari et al., "ZeRO", SC 2020, stage 1): every device then
updates its part, and the new parameters are gathered once per step.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.models.initialization import initializer
from dn_detr_jax.sharding import largest_axis_over_data, replicated, with_sharding
from dn_detr_jax.training.compile_options import known_options

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """The state that a training step updates.

    Attributes:
      step: int32 scalar, steps done.
      params: nested dictionary of float32 arrays.
      opt_state: of the optax transformation.
      ema: moving average of `params`, shaped like them; None with `train.ema_decay` of 0.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None


def abstract_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Shapes and shardings of the train state; computes nothing."""
    shapes = jax.eval_shape(_init_function(model, optimizer, config), jax.random.key(0))
    state = with_sharding(shapes, replicated(mesh))
    if not config.mesh.shard_optimizer:
        return state
    split = largest_axis_over_data((shapes.opt_state, shapes.ema), mesh)
    opt_state, ema = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (shapes.opt_state, shapes.ema),
        split,
    )
    return state.replace(opt_state=opt_state, ema=ema)


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Initializes the state on the mesh.

    Args:
      model: detector.
      optimizer: its state goes into the train state.
      config: whole configuration.
      mesh: with an axis `data`.
    """
    # It runs once, so that only its compile time matters.
    device = mesh.local_devices[0]
    fast = {"xla_backend_optimization_level": 0}
    init = jax.jit(
        _init_function(model, optimizer, config),
        out_shardings=shardings(abstract_state(model, optimizer, config, mesh)),
        compiler_options=known_options(fast, device) if device.platform == "cpu" else None,
    )
    return init(jax.random.key(config.seed))


def _init_function(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[jax.Array], TrainState]:
    initial_params = initializer(model)

    def init(key):
        params = initial_params(key)
        ema = params if config.train.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    return init


def shardings(state: TrainState) -> TrainState:
    """Returns the shardings of a state, or of the result of `abstract_state`."""
    return jax.tree.map(lambda x: x.sharding, state)


def start_from(state: TrainState, params: PyTree) -> TrainState:
    """Returns a fresh state with other parameters; the moving average starts at them too."""
    if state.ema is None:
        return state.replace(params=params)
    # A copy: the step donates all buffers of a state, so that none may occur twice.
    copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings(state.ema))
    return state.replace(params=params, ema=copy(params))


def evaluation_params(state: TrainState, mesh: Mesh) -> PyTree:
    """Returns the moving average, or the parameters if there is none, replicated over devices."""
    if state.ema is None:
        return state.params
    return _gather(mesh)(state.ema)


@functools.cache  # a new function each time would be compiled for every evaluation
def _gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda p: p, out_shardings=replicated(mesh))


def moving_average(
    ema: PyTree, params: PyTree, step: jax.Array, decay: float, tau: int = 0
) -> PyTree:
    """Returns the exponential moving average updated by new parameters.

    `ema <- ema + (1 - d) * (params - ema)`. The early averages are short, so that the initial
    values fade quickly: `d = min(decay, (1 + step) / (10 + step))`, or with `tau` the warm-up of
    YOLOv5 and RT-DETR, `d = decay * (1 - exp(-t / tau))` with t = step + 1.

    Args:
      ema: average so far.
      params: new parameters.
      step: updates before this one.
      decay: in [0, 1).
      tau: updates after which d is 0.63 of `decay`; 0 for the first rule.
    """
    if tau:
        decay_now = decay * -jnp.expm1(-(1.0 + step) / tau)
    else:
        decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    share = 1.0 - decay_now.astype(jnp.float32)
    return jax.tree.map(lambda e, p: e + share * (p - e), ema, params)
