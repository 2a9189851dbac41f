"""Rules for the value of one config key.

A rule names in words what is right; the words stand in errors and in the reference of all keys.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from dn_detr_jax.config.compiler import parse_option
from dn_detr_jax.config.durations import split_duration

_LIMIT = 2**31  # shapes, ids and steps are int32 on the devices
_MOST_PIXELS = 2**28  # of a canvas; larger images can't be decoded
_LEAST_FLOAT, _MOST_FLOAT = 1e-37, 1e38  # the range of float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the value of a key has to be.

    Attributes:
      expected: in words, for example "an integer >= 1".
      problem: takes any value; returns what would be right, or "" for a right value.
    """

    expected: str
    problem: Callable[[Any], str]


def rule(expected: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule with one text for every wrong value; `holds` takes values of any type."""
    return Rule(expected, lambda value: "" if holds(value) else expected)


def is_int(value: Any) -> bool:
    """Whether a value is an integer; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(least: int, below: int = _LIMIT) -> Rule:
    """An integer of at least `least`."""
    expected = f"an integer >= {least}"

    def problem(value: Any) -> str:
        if not is_int(value) or value < least:
            return expected
        return "" if value < below else f"an integer below 2**{below.bit_length() - 1}"

    return Rule(expected, problem)


def number(expected: str, holds: Callable[[float], bool]) -> Rule:
    """A number of float32's range; `expected` continues "a number ..."."""
    return rule(f"a number {expected}", lambda value: _is_number(value) and holds(value))


def between(least: float, most: float) -> Rule:
    """A number from `least` to `most`, both included."""
    return number(f"from {least:g} to {most:g}", lambda value: least <= value <= most)


ABOVE_ZERO = number("above 0", lambda value: value > 0)
AT_LEAST_ZERO = number("of at least 0", lambda value: value >= 0)
BELOW_ONE = number("from 0 to below 1", lambda value: 0 <= value < 1)
SHARE = number("above 0 and below 1", lambda value: 0 < value < 1)
PROBABILITY = between(0, 1)


def one_of(*names: Any) -> Rule:
    """One of several values, of the same type."""
    return rule(
        f"one of {', '.join(map(repr, names))}",
        lambda value: any(type(value) is type(name) and value == name for name in names),
    )


FLAG = one_of(True, False)
TEXT = rule("a text, empty for none", lambda value: isinstance(value, str) and "\0" not in value)

TEXTS = rule(
    '() or texts, for example ("more", "night")',
    lambda value: isinstance(value, tuple | list) and not any(map(_text_problem, value)),
)
NAME = rule("a name", lambda value: isinstance(value, str) and value.isprintable() and value != "")


def some_of(*names: str) -> Rule:
    """A tuple or list of some of several names."""
    return rule(
        f'some of {names}, for example ("{names[1]}",)',
        lambda value: isinstance(value, tuple | list) and all(name in names for name in value),
    )


def numbers(each: Rule) -> Rule:
    """A tuple or list of numbers that follow a rule, or an empty one."""
    return rule(
        f"() or numbers, each {each.expected}",
        lambda value: isinstance(value, tuple | list) and not any(map(each.problem, value)),
    )


def tuple_of(each: Rule, what: str, example: str) -> Rule:
    """A tuple or list of values that follow a rule, or an empty one; `what` names them."""

    def problem(value: Any) -> str:
        if not isinstance(value, tuple | list):
            return expected
        return next(filter(None, map(each.problem, value)), "")

    expected = f"() or {what}, for example {example}"
    return Rule(expected, problem)


SIZES = rule("positive integers, for example (480, 512)", lambda value: _are_sizes(value))
SIZE_RANGE = rule(
    "(least, largest) size, for example (384, 600)",
    lambda value: _are_sizes(value) and len(value) == 2 and value[0] <= value[1],
)
FACTOR_RANGE = rule(
    "(least, largest) factor from 0.01 to 10, for example (0.1, 2.0)",
    lambda value: (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(map(_is_number, value))
        and 0.01 <= value[0] <= value[1] <= 10
    ),
)
PIXEL_RANGE = rule(
    "() or (darkest, brightest) value, for example (0, 4095)",
    lambda value: (
        isinstance(value, tuple | list)
        and all(map(_is_number, value))
        and (len(value) == 0 or (len(value) == 2 and value[0] < value[1]))
    ),
)
FUNCTION = rule('"module:function", or empty', lambda value: value == "" or _is_function(value))
ALL_OR_SIZE = rule(
    "-1 (all) or a positive integer",
    lambda value: is_int(value) and (value == -1 or 0 < value < _LIMIT),
)


def duration(*, positive: bool = False, percent: bool = True, optional: bool = False) -> Rule:
    """A duration.

    Args:
      positive: it is longer than 0.
      percent: it may be in percent of the training.
      optional: it may be empty.
    """

    def problem(value: Any) -> str:
        if optional and value == "":
            return ""
        try:
            amount, unit = split_duration(value)
        except ValueError as error:
            return str(error)
        if positive and amount == 0:
            return "longer than 0"
        if unit == "%" and not percent:
            return "in steps or epochs: it is what percentages are of"
        return ""

    examples = '"300 steps", "2 epochs"' + (' or "5%"' if percent else "")
    limits = (", longer than 0" if positive else "") + (", or empty" if optional else "")
    return Rule(f"a duration such as {examples}{limits}", problem)


def _canvas_problem(value: Any) -> str:
    right = isinstance(value, tuple | list) and bool(value)
    right = right and all(_are_sizes(size) and len(size) == 2 for size in value)
    if not right:
        return CANVASES.expected
    fits = all(height * width <= _MOST_PIXELS for height, width in value)
    return "" if fits else f"canvases of at most {_MOST_PIXELS} pixels"


CANVASES = Rule(
    "(height, width) pairs of positive integers, for example ((800, 1344), (1344, 800))",
    _canvas_problem,
)


def _factors_problem(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return PATTERN_FACTORS.expected
    for pair in value:
        right = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        if not right or not _is_number(pair[1]) or pair[1] < 0:
            return PATTERN_FACTORS.expected
        if problem := PATTERN.problem(pair[0]):
            return problem
    return ""


def _pattern_problem(value: Any) -> str:
    if not isinstance(value, str):
        return PATTERN.expected
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{value!r} is no regular expression: {error}"
    return ""


PATTERN = Rule("a regular expression", _pattern_problem)


PATTERN_FACTORS = Rule(
    '(regular expression, factor >= 0) pairs, for example (("^backbone/", 0.1),)',
    _factors_problem,
)
COMPILER_OPTIONS = rule(
    '"platform:name=value" texts, for example ("gpu:xla_gpu_enable_triton_gemm=false",)',
    lambda value: isinstance(value, tuple | list) and all(map(parse_option, value)),
)


def _are_sizes(value: Any) -> bool:
    right = isinstance(value, tuple | list) and bool(value)
    return right and all(is_int(size) and 0 < size < _LIMIT for size in value)


def _text_problem(value: Any) -> str:
    return TEXT.problem(value) or ("" if value else "a text")


def _is_function(value: Any) -> bool:
    if not isinstance(value, str) or value.count(":") != 1:
        return False
    return all(name.isidentifier() for name in value.replace(":", ".").split("."))


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or _LEAST_FLOAT <= abs(value) <= _MOST_FLOAT
