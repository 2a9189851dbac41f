"""Durations in configs: `"300 steps"`, `"2 epochs"` or `"5%"` (of the whole training)."""

import re

from dn_detr_jax.errors import ConfigError

_MOST_STEPS = 2**31 - 1  # steps are int32 on the devices
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%)\s*")


def split_duration(duration: object) -> tuple[float, str]:
    """Splits a duration into its number and its unit.

    Args:
      duration: for example "300 steps", "1.5 epochs" or "5%".

    Returns:
      The number, at least 0, and one of "steps", "epochs", "%".

    Raises:
      ValueError: not such a duration, a fraction of a step, more than 100%, or 2**31 and more. The
        message says what would be right.

    Examples:
      >>> split_duration("1.5 epochs")
      (1.5, 'epochs')
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if not match:
        raise ValueError('a duration is like "300 steps", "2 epochs" or "5%"')
    number, unit = float(match[1]), match[2]
    if number > _MOST_STEPS:
        raise ValueError("steps are counted up to 2**31 - 1")
    if unit.startswith("step") and number != int(number):
        raise ValueError("steps are whole numbers")
    if unit == "%" and number > 100:
        raise ValueError("a percentage is at most 100%")
    return number, unit if unit == "%" else unit.rstrip("s") + "s"


def parse_duration(duration: object, key: str) -> tuple[float, str]:
    """Splits the duration of a config key, as `split_duration` does.

    Raises:
      ConfigError: not a duration.
    """
    try:
        return split_duration(duration)
    except ValueError as error:
        raise ConfigError(key, duration, str(error)) from None
