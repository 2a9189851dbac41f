"""Command-line flags and expected errors as one line each, without a traceback.

`ml_collections` reports a wrong override by whatever exception its lookup raises; here a wrong key,
a wrong type, a missing config file, `dn_detr_jax.errors.Error` and `OSError` end the program with
one line on stderr and exit status 1. Every other exception keeps its traceback.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.config import (
    flat_keys,
    nearest_key,
)
from dn_detr_jax.errors import Error, one_line


def run_main(
    main: Callable[[Sequence[str]], None],
    arguments: Sequence[str] = (),
) -> None:
    """Parses the flags and runs `main`, as `absl.app.run` does.

    The config file is the flag `--config` of `config_flags.DEFINE_config_file`.

    Args:
      main: gets the program's name and the arguments that are no flags.
      arguments: names of the arguments that are no flags; each is required, others are errors,
        except that a last name ending in `...` takes one or more.

    Raises:
      SystemExit: always; status 0, or 1 after an error in the flags or an expected error.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except (Error, OSError) as error:
            _fail(str(error))

    app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, arguments))


def log_to_terminal(prefix: str = "", level: int = logging.INFO) -> None:
    """Shows what this package logs, with the time, and of its libraries warnings alone.

    Args:
      prefix: of every line, after the time.
      level: the least that is shown.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dn_detr_jax")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)


def leave_on_sigterm() -> None:
    """Lets SIGTERM end the program at once, with exit status 0: there is nothing to save.

    Whoever has something to save puts a handler of its own in place meanwhile.
    """

    def leave(*_: object) -> None:
        # Not by an exception: compilers and threads that are at work would be waited for.
        os.write(2, b"SIGTERM: left, nothing was to be saved; the same command continues\n")
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)


def _fail(message: str) -> None:
    message = one_line(message)
    if len(message) > 2000:  # a value that was pasted by mistake
        message = f"{message[:1500]} ... {message[-400:]}"
    sys.exit(f"error: {message}")


def _parse_flags(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Parses all flags; exits with one line if one is wrong."""
    if any(re.fullmatch(r"--?(help|helpfull|helpshort|helpxml)", arg) for arg in argv[1:]):
        return flags.FLAGS(argv)  # absl prints the help and exits
    _check_config_arguments(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        lines = str(error).strip().splitlines()
        named = [i for i, line in enumerate(lines) if line.startswith("flag ")]
        _fail(" ".join(lines[named[-1] if named else -1 :]))  # what comes before says it twice
    except flags.Error as error:
        _fail(str(error))
    any_number = bool(arguments) and arguments[-1].endswith("...")
    if len(rest) - 1 > len(arguments) and not any_number:
        extra = rest[1 + len(arguments)]
        _fail(f"unexpected argument {extra!r}: overrides are --config.section.key=value")
    if len(rest) - 1 < len(arguments):
        _fail(f"{arguments[len(rest) - 1].removesuffix('...')} is missing; see --help")
    return rest


def define_step_flag(default: str, help_text: str = "best, latest or a number of steps.") -> None:
    """Defines the flag --step, the checkpoint to read: "best", "latest" or an int."""
    flags.DEFINE(_StepParser(), "step", default, help_text)


class _StepParser(flags.ArgumentParser):
    def parse(self, argument: str | int) -> str | int:
        if argument in ("best", "latest"):
            return argument
        if isinstance(argument, str) and argument.isdecimal():
            return int(argument)
        raise ValueError("expected best, latest or a number of steps")


def _check_config_arguments(argv: Sequence[str]) -> None:
    """Exits if the file of --config is missing, or an override has no key in it."""
    path = _config_path(argv)
    if path is None:
        return  # absl knows whether the flag is required
    file = path.split(":", 1)[0]
    if not os.path.isfile(file):
        _fail(f"--config={path}: there is no such file")
    overrides = [match[1] for arg in argv if (match := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    if not overrides:
        return
    throw_away = flags.FlagValues()
    config_flags.DEFINE_config_file("config", path, flag_values=throw_away, sys_argv=[""])
    config = throw_away["config"].value
    for key in overrides:
        if not _has(config, key):
            near = nearest_key(key, flat_keys(config))
            _fail(f"--config.{key}: there is no such key in {file}{near and '; ' + near}")


def _config_path(argv: Sequence[str]) -> str | None:
    """The value of --config; the last one counts, as for absl."""
    path = None
    for i, arg in enumerate(argv[1:], start=1):
        if match := re.fullmatch(r"--?config=(.*)", arg, re.DOTALL):
            path = match[1]
        elif re.fullmatch(r"--?config", arg) and i + 1 < len(argv):
            path = argv[i + 1]
    return path


def _has(config: ConfigDict, key: str) -> bool:
    value = config
    for part in key.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return False
        value = value[part]
    # A whole section given as text would drop the keys that it leaves out.
    return not isinstance(value, ConfigDict)
