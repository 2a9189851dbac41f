"""AdamW as in the official DN-DETR training: clipping, rates by parameter path, frozen parameters.

Decoupled weight decay (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019) acts on
every trained parameter, normalization and biases included, as in the official code. Three steps
with clipping and two rates equal PyTorch's `clip_grad_norm_` followed by `AdamW`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dn_detr_jax.config import (
    base_config,
)
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training.schedules import base_rate, learning_rate_schedule

PyTree = Any

# Numbers of an array that is summed together with others, see `global_norm`.
_SMALL = 2**18


def parameter_paths(params: PyTree) -> list[str]:
    """The paths of all parameters in the order of `jax.tree.leaves`, "/" between the keys.

    Examples:
      >>> parameter_paths({"backbone": {"conv1": {"kernel": 0}}, "head": {"bias": 0}})
      ['backbone/conv1/kernel', 'head/bias']
    """
    return [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Rule and learning-rate factor of each parameter, from the patterns of the config."""

    rules: dict[str, int]  # path -> index into lr_multipliers, -1: none matches
    factors: dict[str, float]  # path -> learning-rate factor, 0: frozen


def _assign_rates(
    params_shapes: PyTree, config: ConfigDict, trainable: Mapping[str, bool] | None
) -> _Rates:
    multipliers = config.optimizer.lr_multipliers
    paths = parameter_paths(params_shapes)
    rules = {}
    for path in paths:
        matching = (i for i, (pattern, _) in enumerate(multipliers) if re.search(pattern, path))
        rules[path] = next(matching, -1)
    taken = set(rules.values())
    defaults = [pattern for pattern, _ in base_config().optimizer.lr_multipliers]
    for i, (pattern, _) in enumerate(multipliers):
        # The default patterns may match nothing: not every model has such a part.
        if i in taken or pattern in defaults:
            continue
        if any(re.search(pattern, path) for path in paths):
            reason = f"{pattern!r} gets no parameter: earlier patterns take all that it matches"
        else:
            reason = f"{pattern!r} matches no parameter; paths are like {paths[0]!r}"
        raise ConfigError("optimizer.lr_multipliers", multipliers, reason)
    factors = {path: float(multipliers[i][1]) if i >= 0 else 1.0 for path, i in rules.items()}
    if trainable is not None:
        factors = {path: factor * trainable[path] for path, factor in factors.items()}
    if not any(factors.values()):
        raise ConfigError(
            "optimizer.lr_multipliers", multipliers, "no parameter is left to be trained"
        )
    return _Rates(rules, factors)


def _norm(*arrays: jax.Array) -> jax.Array:
    squares = [jnp.sum(jnp.square(array)) for array in arrays]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def norm_together(*arrays: jax.Array) -> jax.Array:
    """Returns the norm of all numbers; sums the small arrays as one, see `global_norm`."""
    small = [jnp.ravel(array) for array in arrays if array.size <= _SMALL]
    large = [array for array in arrays if array.size > _SMALL]
    return _norm(*large, jnp.concatenate(small)) if small else _norm(*large)


def global_norm(tree: PyTree, *, split: bool = False) -> jax.Array:
    """Returns the root of the sum of the squares of all numbers in a tree of arrays, a scalar.

    Small arrays are concatenated before they are summed. With one sum for each array, as
    `optax.tree.norm` has, these sums are a third of all the kernels of a training step on a GPU. On
    a CPU, and on a TPU, which stores arrays in tiles, concatenation costs more than it saves
    (docs/performance.md).

    Args:
      tree: float arrays.
      split: the arrays are split over devices, which would have to exchange them to concatenate
        them: each is summed alone.
    """

    arrays = jax.tree.leaves(tree)
    if split or not arrays:
        return _norm(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_norm, tpu=_norm, default=norm_together)


def clip_by_global_norm(max_norm: float, *, split: bool = False) -> optax.GradientTransformation:
    """Scales the gradients g to a global norm of at most `max_norm`, as PyTorch does.

    The factor is `min(1, max_norm / (|g| + 1e-6))`. `optax.clip_by_global_norm` has no 1e-6, which
    at the usual `max_norm` of 0.1 is a relative difference of up to 1e-5 in every update.

    Args:
      max_norm: at least 0; 0 leaves the gradients as they are.
      split: see `global_norm`.
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates, split=split) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    if max_norm <= 0:
        return optax.identity()
    return optax.GradientTransformation(optax.init_empty_state, update)


def _scale_by_path(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of every parameter by the factor of its path."""

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(
            lambda keys, u: u * jnp.asarray(factors[_path(keys)], u.dtype), updates
        ), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(
    config: ConfigDict,
    params_shapes: PyTree,
    steps_per_epoch: int,
    total_steps: int,
    trainable: Mapping[str, bool] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimizer of a run.

    For a parameter p with clipped gradient g, learning-rate factor f and rate r of the step,
    `p <- p - f * r * (m / (sqrt(v) + eps) + weight_decay * p)` with the bias-corrected moments
    m of g and v of g ** 2; eps is added outside the root, as in PyTorch.

    Args:
      config: the experiment; its `optimizer` section is used.
      params_shapes: the parameters, or what `jax.eval_shape` says of them.
      steps_per_epoch: steps of one pass over the training data.
      total_steps: steps of the whole training.
      trainable: whether to train a parameter, by its path; None: all of them. A parameter with
        False, or with a factor of 0 in `config.optimizer.lr_multipliers`, is frozen: it gets
        no update, no decay and no moments, and its gradient does not count for clipping.

    Returns:
      The transformation, whose state holds arrays shaped like parameters and scalars only, and
      the learning rate by step for a factor of 1.

    Raises:
      ConfigError: a pattern that matches no parameter (the default patterns may), no parameter
        to train, or a wrong duration.
    """
    rates = _assign_rates(params_shapes, config, trainable)
    schedule = learning_rate_schedule(
        config.optimizer, config.train.batch_size, steps_per_epoch, total_steps
    )
    settings = config.optimizer
    trained = optax.chain(
        clip_by_global_norm(settings.clip_norm, split=config.mesh.shard_optimizer),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
        _scale_by_path(rates.factors),
        optax.scale_by_learning_rate(schedule),
    )
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: "trained" if rates.factors[_path(keys)] else "frozen", params_shapes
    )
    transforms = {"trained": trained, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, labels), schedule


def make_update_norm(
    config: ConfigDict,
    params_shapes: PyTree,
    schedule: optax.Schedule,
    trainable: Mapping[str, bool] | None = None,
) -> Callable[[PyTree, PyTree], jax.Array]:
    """Makes a function that computes the global norm of the last update from the state after it.

    A step that returned the norm would write all updates to memory first; on a CPU that is half of
    the time of the optimizer. The moments m and v and the parameters p after the update give it
    again: with a = m / (sqrt(v) + eps) and s = f * r it is
    `s * (a + weight_decay * p) / (1 - s * weight_decay)`.

    Args:
      config, params_shapes, trainable: as for `make_optimizer`.
      schedule: from `make_optimizer`.

    Returns:
      A function (parameters, optimizer state) -> norm, a scalar; NaN before the first update.
    """
    factors = _assign_rates(params_shapes, config, trainable).factors
    settings = config.optimizer

    def update_norm(params, opt_state):
        moments = optax.tree.get(opt_state, "ScaleByAdamState")
        values, means, squares = map(_by_path, (params, moments.mu, moments.nu))
        rate, count = schedule(moments.count - 1), moments.count.astype(jnp.float32)
        first, second = 1 - settings.b1**count, 1 - settings.b2**count

        def update(path):
            scale = rate * factors[path]
            adam = means[path] / first / (jnp.sqrt(squares[path] / second) + settings.eps)
            decayed = adam + settings.weight_decay * values[path]
            return scale / (1 - scale * settings.weight_decay) * decayed

        return _norm(*map(update, means))

    return update_norm


def _by_path(tree: PyTree) -> dict[str, jax.Array]:
    return dict(zip(parameter_paths(tree), jax.tree.leaves(tree), strict=True))


def describe(
    params_shapes: PyTree, config: ConfigDict, trainable: Mapping[str, bool] | None = None
) -> str:
    """Returns a table for the log: the parameters that each learning-rate pattern matched.

    Args:
      params_shapes, config, trainable: as for `make_optimizer`.

    Returns:
      A line per pattern, in the order of the config, one for the parameters that no pattern
      matches, and one for the frozen ones, each with counts of arrays and of parameters.

    Raises:
      ConfigError: as `make_optimizer`.
    """
    rates = _assign_rates(params_shapes, config, trainable)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params_shapes)]
    sizes = dict(zip(parameter_paths(params_shapes), map(math.prod, shapes), strict=True))
    base = base_rate(config.optimizer, config.train.batch_size)
    rows = [
        (pattern, factor, [path for path in sizes if rates.rules[path] == i])
        for i, (pattern, factor) in enumerate(config.optimizer.lr_multipliers)
    ]
    rows.append(("(all others)", 1.0, [path for path in sizes if rates.rules[path] < 0]))
    lines = []
    for name, factor, paths in rows:
        trained = [path for path in paths if rates.factors[path]]
        lines.append(_describe_row(name, f"rate {base * factor:.3g}", trained, sizes))
    frozen = [path for path in sizes if not rates.factors[path]]
    lines.append(_describe_row("(frozen)", "no update", frozen, sizes))
    return "\n".join(lines)


def _describe_row(name: str, rate: str, paths: list[str], sizes: dict[str, int]) -> str:
    count = sum(sizes[path] for path in paths)
    example = f"  e.g. {paths[0]}" if paths else ""
    return f"{name:<24} {rate:<14} {len(paths):>5} arrays {count:>13,} parameters{example}"
