"""Durations in steps, and the learning rate as a function of the step.

A config states every duration with its unit (`"300 steps"`, `"2 epochs"`, `"5%"`); the loop counts
steps. The step schedule is the paper's (Li et al., CVPR 2022, section 6.1: the rate drops once by
0.1), the cosine schedule that of Loshchilov & Hutter, 2017, without restarts. The flat cosine
schedule is that of RTMDet (Lyu et al., 2022).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dn_detr_jax.config import (
    parse_duration,
)
from dn_detr_jax.errors import ConfigError

Decay = Callable[[jax.Array], jax.Array]


def steps(duration: str, steps_per_epoch: int, total_steps: int | None, *, key: str) -> int:
    """Returns a duration in optimizer steps.

    Args:
      duration: for example "300 steps", "1.5 epochs" or "5%".
      steps_per_epoch: steps of one pass over the training data, at least 1.
      total_steps: steps of the whole training, what a percentage is of; None where a
        percentage makes no sense, as for the training's own duration.
      key: config key the duration comes from, for errors.

    Returns:
      Rounded to the nearest step; at least 1 unless the duration is zero.

    Raises:
      ConfigError: not a duration, more steps than are counted, or a percentage without
        `total_steps`.

    Examples:
      >>> steps("1.5 epochs", 100, None, key="train.duration")
      150
      >>> steps("5%", 100, 2000, key="optimizer.warmup")
      100
    """
    number, unit = parse_duration(duration, key)
    if unit == "%":
        if total_steps is None:
            raise ConfigError(key, duration, "in steps or epochs: it is what percentages are of")
        number *= total_steps / 100
    elif unit == "epochs":
        number *= steps_per_epoch
    if number >= 2**31:
        raise ConfigError(key, duration, f"{number:.2g} steps; they are counted up to 2**31 - 1")
    return max(round(number), 1 if number > 0 else 0)


def learning_rate_schedule(
    optimizer_config: ConfigDict, batch_size: int, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """The learning rate of every step, before the multipliers of parameters.

    With W warm-up steps and T steps in all, the rate of step t (from 0) is
    `base_rate * min(1, t / W) * decay(t)`, where `decay` is

    - "step": 1 before `step_at`, `step_factor` from there on;
    - "multi_step": `step_factor ** n` with n milestones that t has reached;
    - "cosine": e + (1 - e) * (1 + cos(pi * (t - W) / (T - W))) / 2 after the warm-up, with e of
      `end_factor`, so e at T;
    - "flat_cosine": 1 before F, the step of `flat_until`, then the same with F in place of W.

    Args:
      optimizer_config: `config.optimizer`.
      batch_size: `config.train.batch_size`.
      steps_per_epoch: steps of one pass over the training data.
      total_steps: T.

    Returns:
      A function of the step, usable inside `jax.jit`.

    Raises:
      ConfigError: an unknown schedule, or a warm-up that leaves no step to train.
    """
    peak = base_rate(optimizer_config, batch_size)

    def count(duration: str, key: str) -> int:
        return steps(duration, steps_per_epoch, total_steps, key=f"optimizer.{key}")

    warmup = count(optimizer_config.warmup, "warmup")
    if warmup and warmup >= total_steps:
        expected = f"shorter than the training of {total_steps} steps"
        raise ConfigError("optimizer.warmup", optimizer_config.warmup, expected)
    match optimizer_config.schedule:
        case "step":
            drops = [count(optimizer_config.step_at, "step_at")]
            decay = _drops(drops, optimizer_config.step_factor)
        case "multi_step":
            drops = [count(milestone, "milestones") for milestone in optimizer_config.milestones]
            decay = _drops(drops, optimizer_config.step_factor)
        case "cosine":
            decay = _cosine(warmup, total_steps, optimizer_config.end_factor)
        case "flat_cosine":
            start = count(optimizer_config.flat_until, "flat_until")
            decay = _cosine(start, total_steps, optimizer_config.end_factor)
        case other:
            raise ConfigError("optimizer.schedule", other, "unknown")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(1.0, step / warmup if warmup else 1.0) * decay(step)

    return schedule


def base_rate(optimizer_config: ConfigDict, batch_size: int) -> float:
    """Returns the learning rate after the warm-up, for a parameter without a factor.

    With `scale_lr` of B it is `learning_rate * batch_size / B` (Goyal et al., "Accurate, Large
    Minibatch SGD", 2017, section 2.1).

    Args:
      optimizer_config: `config.optimizer`.
      batch_size: `config.train.batch_size`.
    """
    if not optimizer_config.scale_lr:
        return optimizer_config.learning_rate
    return optimizer_config.learning_rate * batch_size / optimizer_config.scale_lr


def _drops(drops: Sequence[int], factor: float) -> Decay:
    """1, multiplied by `factor` at every one of the steps."""

    def decay(step):
        return math.prod(jnp.where(step < drop, 1.0, factor) for drop in drops)

    return decay


def _cosine(start: int, end: int, end_factor: float) -> Decay:
    """1 until `start`, half a period of a cosine from there, `end_factor` from `end` on."""

    def decay(step):
        progress = (step - start) / max(1, end - start)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return end_factor + (1.0 - end_factor) * fall

    return decay
