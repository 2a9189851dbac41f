"""Errors whose message is all that a user needs, and the text of other errors in one line.

Every command catches `Error` and `OSError` and ends with the message and exit status 1. All other
exceptions keep their traceback.
"""

from collections.abc import Iterable
from typing import Any


class Error(Exception):
    """Base class of the errors that this package raises for wrong input or lost resources."""


class ConfigError(Error, ValueError):
    """A wrong value of a config key or flag. The message has key, value and what would be right."""

    def __init__(self, key: str, value: Any, expected: str):
        self.expected = expected
        name = key if key.startswith("--") else f"config.{key}"  # a flag, or a key
        super().__init__(f"{name} = {_shown(value)}: {expected}")


class ConfigFileError(Error, ValueError):
    """A config file that can't be found or loaded. The message is one line with the cause."""


class DataError(Error, ValueError):
    """Unusable data, or a wrong setting of it. The message names the file, the image or the key."""


class EvaluationError(Error, ValueError):
    """Detections that can't be evaluated. The message is one line with the cause."""


class TrainingError(Error, RuntimeError):
    """A training that can't continue. The message is one line with the cause."""


class CheckpointError(TrainingError):
    """A checkpoint that can't be written, read or used. The message has path and cause."""


class DistributedError(Error, RuntimeError):
    """Processes that can't start or continue together. The message is one line with the cause."""


class WeightsError(Error, ValueError):
    """A weights file that can't be read. The message names the file and the cause."""


class ConversionError(Error, ValueError):
    """Weights that do not fit the model. The message names the parameter."""


class UnsupportedCase(Error, ValueError):  # noqa: N818 - a limit of the package, or of the case
    """A reference case that can't be checked. The message names the case and what it lacks."""


class PreflightError(Error, ValueError):
    """A preflight that can't be made. The message names the flag and what would be right."""


class ExportError(Error, RuntimeError):
    """A detector that can't be exported. The message names the file or flag, and the cause."""


class MissingPackageError(Error, ImportError):
    """An optional package is not installed. The message names what needs it and the command."""

    def __init__(self, feature: str, packages: str):
        super().__init__(f"{feature} needs another package: pip install {packages}")


def one_line(error: BaseException | str) -> str:
    """Returns the text of an error without line breaks, or its type if it has none.

    Examples:
      >>> one_line(ValueError("first\\n  second"))
      'first second'
      >>> one_line(KeyError())
      'KeyError'
    """
    return " ".join(str(error).split()) or type(error).__name__


def short_reason(error: Exception) -> str:
    """Returns `one_line(error)`, at most 300 characters of it."""
    return one_line(error)[:300]


def some_of(names: Iterable[str], separator: str = ", ", count: int = 6) -> str:
    """Lists the first `count` names, and says how many more there are.

    Examples:
      >>> some_of(["a", "b", "c", "d"], count=2)
      'a, b, and 2 more'
    """
    names = list(names)
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with more digits than Python prints
        text = f"a {type(value).__name__}"
    text = " ".join(text.splitlines())
    return text if len(text) <= 300 else f"{text[:297]}..."
