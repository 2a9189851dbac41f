"""Durations and learning rates; catches a wrong unit and off-by-one steps."""

import math

import jax
import numpy as np
import optax
import pytest

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training.optimizer import describe
from dn_detr_jax.training.schedules import learning_rate_schedule, steps


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("300 steps", 300),
        ("1 step", 1),
        ("2 epochs", 80),
        ("1.5 epochs", 60),
        (".5 epoch", 20),
        ("5%", 50),
        ("100 %", 1000),
        ("0 steps", 0),
        ("0.001%", 1),  # a positive duration is never rounded to 0
    ],
)
def test_durations(duration, expected):
    assert steps(duration, 40, 1000, key="train.log_every") == expected


@pytest.mark.parametrize(
    "duration", ["300", "steps", "-3 steps", "1.5 steps", "2 hours", "101%", "", "1e3 steps", 7]
)
def test_wrong_durations_name_key_and_value(duration):
    with pytest.raises(ConfigError) as error:
        steps(duration, 40, 1000, key="train.log_every")
    assert "config.train.log_every" in str(error.value)
    assert repr(duration) in str(error.value)
    assert "\n" not in str(error.value)


def test_percentage_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"train\.duration = '5%'.*percentages are of"):
        steps("5%", 40, None, key="train.duration")


def _settings(**changes):
    settings = base_config().optimizer
    settings.update({"learning_rate": 0.5, "step_at": "10 epochs"} | changes)
    return settings


def test_step_schedule_drops_at_the_step():
    schedule = learning_rate_schedule(_settings(), 16, steps_per_epoch=7, total_steps=100)
    rates = [float(schedule(step)) for step in (0, 69, 70, 99)]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("warmup", ["0 steps", "10 steps"])
def test_cosine_against_its_formula_under_jit(warmup):
    settings = _settings(schedule="cosine", warmup=warmup)
    schedule = learning_rate_schedule(settings, 16, steps_per_epoch=7, total_steps=110)
    w = int(warmup.split()[0])
    for step in (0, 1, 5, 9, 10, 11, 60, 109, 110, 500):
        ramp = min(1.0, step / w) if w else 1.0
        progress = min(max((step - w) / (110 - w), 0.0), 1.0)
        expected = 0.5 * ramp * 0.5 * (1 + math.cos(math.pi * progress))
        assert float(jax.jit(schedule)(step)) == pytest.approx(expected, abs=1e-7), step


def _rates(settings, batch_size=16):
    """The rates of 110 steps, of 7 to an epoch."""
    schedule = learning_rate_schedule(settings, batch_size, steps_per_epoch=7, total_steps=110)
    return np.array([float(schedule(step)) for step in range(110)])


def test_multi_step_against_optax():
    """Catches milestones that replace each other, in any order, and a drop one step off."""
    settings = _settings(schedule="multi_step", milestones=("80%", "6 epochs"), step_factor=0.3)
    constants = [optax.constant_schedule(0.5 * factor) for factor in (1, 0.3, 0.09)]
    wanted = optax.join_schedules(constants, [42, 88])
    np.testing.assert_allclose(_rates(settings), [wanted(step) for step in range(110)], rtol=1e-6)


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_flat_cosine_against_optax(end):
    settings = _settings(schedule="flat_cosine", flat_until="40 steps", end_factor=end)
    fall = optax.cosine_decay_schedule(0.5, 70, alpha=end)
    wanted = optax.join_schedules([optax.constant_schedule(0.5), fall], [40])
    np.testing.assert_allclose(
        _rates(settings), [wanted(step) for step in range(110)], rtol=1e-5, atol=1e-7
    )


def test_cosine_ends_at_its_share():
    settings = _settings(schedule="cosine", end_factor=0.2)
    wanted = optax.cosine_decay_schedule(0.5, 110, alpha=0.2)
    np.testing.assert_allclose(_rates(settings), [wanted(step) for step in range(110)], rtol=1e-5)


def test_rate_is_scaled_to_the_batch_size():
    """Catches the inverse factor, and a table with another rate than the schedule's."""
    config = base_config()
    config.optimizer.update(learning_rate=0.5, scale_lr=16, lr_multipliers=())
    for batch_size, rate in (16, 0.5), (4, 0.125), (64, 2.0):
        config.train.batch_size = batch_size
        assert _rates(config.optimizer, batch_size)[0] == rate
        assert f"rate {rate:.3g} " in describe({"head": np.zeros(3)}, config)


def test_multi_step_needs_milestones():
    config = base_config()
    config.optimizer.schedule = "multi_step"
    with pytest.raises(ConfigError, match=r"optimizer\.milestones = \(\): at least one"):
        validate(config)


def test_warmup_longer_than_the_training_is_an_error():
    with pytest.raises(ConfigError, match=r"optimizer\.warmup = '100 steps'.*50 steps"):
        learning_rate_schedule(_settings(warmup="100 steps"), 16, steps_per_epoch=7, total_steps=50)
