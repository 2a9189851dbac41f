"""Durations in steps, and the learning rate as a function of the step.

A config states every duration with its unit (`"300 steps"`, `"2 epochs"`, `"5%"`); the loop counts
steps. The step schedule is the paper's (Li et al., CVPR 2022, section 6.1: the rate drops once by
0.1), the cosine schedule that of Loshchilov & Hutter, 2017, without restarts.
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dn_detr_jax.config import (
    parse_duration,
)
from dn_detr_jax.errors import ConfigError


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
    optimizer_config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """The learning rate of every step, before the multipliers of parameters.

    With W warm-up steps and T steps in all, the rate of step t (from 0) is
    `learning_rate * min(1, t / W) * decay(t)`, where `decay` is

    - "step": 1 before `step_at`, `step_factor` from there on;
    - "cosine": `(1 + cos(pi * (t - W) / (T - W))) / 2` after the warm-up, so 0 at T.

    Args:
      optimizer_config: `config.optimizer`.
      steps_per_epoch: steps of one pass over the training data.
      total_steps: T.

    Returns:
      A function of the step, usable inside `jax.jit`.

    Raises:
      ConfigError: an unknown schedule, or a warm-up that leaves no step to train.
    """
    peak = optimizer_config.learning_rate
    warmup = steps(optimizer_config.warmup, steps_per_epoch, total_steps, key="optimizer.warmup")
    if warmup and warmup >= total_steps:
        expected = f"shorter than the training of {total_steps} steps"
        raise ConfigError("optimizer.warmup", optimizer_config.warmup, expected)

    if optimizer_config.schedule == "step":
        step_at = steps(
            optimizer_config.step_at, steps_per_epoch, total_steps, key="optimizer.step_at"
        )

        def decay(step):
            return jnp.where(step < step_at, 1.0, optimizer_config.step_factor)

    elif optimizer_config.schedule == "cosine":

        def decay(step):
            progress = (step - warmup) / max(1, total_steps - warmup)
            return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))

    else:
        raise ConfigError("optimizer.schedule", optimizer_config.schedule, "'step' or 'cosine'")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(1.0, step / warmup if warmup else 1.0) * decay(step)

    return schedule
