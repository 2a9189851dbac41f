"""The command line of every program of this package: flags in, one line for each expected error.

A command is a module with a docstring (its help), `define_flags()` and `main(argv)`. It has
`ARGUMENTS` if it takes arguments besides flags, and `DEFAULT_CONFIG` if --config may be missing. It
imports what it computes with inside `main`, so that help and wrong flags need no JAX.

A wrong flag, a wrong config key or type, a missing config file, `dn_detr_jax.errors.Error` and
`OSError` end a program with one line on stderr and exit status 1. Ctrl-C ends it with one line and
exit status 130. Every other exception keeps its traceback.
"""

import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dn_detr_jax.config import expand_user, find_config, flat_keys, nearest_key
from dn_detr_jax.errors import ConfigError, Error, one_line
from dn_detr_jax.training.stop import INTERRUPTED

_HELP = re.compile(r"-h|--?(help|helpfull|helpshort|helpxml)")


def run_command(command: ModuleType, program: str) -> NoReturn:
    """Runs a command with the arguments in `sys.argv`.

    Args:
      command: module as described above.
      program: how a user calls it, for the help.

    Raises:
      SystemExit: always.
    """
    others = set(flags.FLAGS)
    command.define_flags()
    arguments = getattr(command, "ARGUMENTS", ())
    if any(_HELP.fullmatch(argument) for argument in sys.argv[1:]):
        show(help_text(command, program, set(flags.FLAGS) - others))
    default = getattr(command, "DEFAULT_CONFIG", None)
    if default is not None and not any(re.match("--?config(=|$)", arg) for arg in sys.argv[1:]):
        sys.argv.insert(1, f"--config={default}")
    run_main(command.main, arguments)


def help_text(command: ModuleType, program: str, names: Iterable[str]) -> str:
    """Returns usage, docstring and flags of a command.

    Args:
      command: module of the command; its flags are defined.
      program: how a user calls it.
      names: of its flags.
    """
    own = flags.FlagValues()
    for name in names:
        own[name] = flags.FLAGS[name]
        own.register_flag_by_module("flags", flags.FLAGS[name])
    usage = " ".join(["usage:", program, "[FLAGS]", *getattr(command, "ARGUMENTS", ())])
    return f"{usage}\n\n{inspect.getdoc(command)}\n{own.module_help('flags')}"


def run_main(main: Callable[[Sequence[str]], None], arguments: Sequence[str] = ()) -> NoReturn:
    """Parses the flags and runs `main`, as `absl.app.run` does.

    The config file is the flag `--config` of `define_config_flag`.

    Args:
      main: called with the program's name and the arguments that are not flags.
      arguments: names of the arguments that are not flags; each is required and others are errors,
        except that a last name ending in `...` takes one or more, and that a name in brackets may
        be missing.

    Raises:
      SystemExit: always; status 0, 1 after an error in the flags or an expected error, or 130
        after Ctrl-C.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except (Error, OSError) as error:
            fail(str(error))

    write_escaped()
    try:
        app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, arguments))
    except KeyboardInterrupt:
        leave_interrupted()


def leave_interrupted() -> NoReturn:
    """Ends the program after Ctrl-C with one line."""
    print("\ninterrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


def write_escaped() -> None:
    """Lets stdout and stderr write an escape for every character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(text: str, status: int = 0) -> NoReturn:
    """Prints a text and ends the program; a closed pipe, as of `| head`, is not an error."""
    write_escaped()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
    sys.exit(status)


def log_to_terminal(prefix: str = "", level: int = logging.INFO) -> None:
    """Shows the log of this package, with the time; of its libraries only warnings.

    Args:
      prefix: of every line, after the time.
      level: lowest level that is shown.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dn_detr_jax")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)


def fail(message: str) -> NoReturn:
    """Ends the program with an error of one line and exit status 1."""
    message = one_line(message)
    if len(message) > 2000:  # a value that was pasted by mistake
        message = f"{message[:1500]} ... {message[-400:]}"
    sys.exit(f"error: {message}")


# Flags that several commands have


def define_config_flag() -> None:
    """Defines --config, the experiment's file, and its overrides --config.section.key=value.

    A command whose module has a `DEFAULT_CONFIG` can do without the flag, see `run_command`.
    """
    text = (
        "The experiment: a file, or the name of one in configs/. --config.section.key=value "
        "overrides a value."
    )
    config_flags.DEFINE_config_file("config", None, text)
    flags.DEFINE_bool("help_config", False, "Print every config key, its value and meaning.")
    flags.mark_flag_as_required("config")


def define_path_flag(name: str, help_text: str, *, required: bool = False) -> None:
    """Defines a flag for a local file or folder; its value is a str with `~` expanded."""
    flags.DEFINE(_PathParser(), name, None, help_text)
    if required:
        flags.mark_flag_as_required(name)


def define_step_flag(
    default: str, help_text: str = "best, best_raw, latest or a number of steps."
) -> None:
    """Defines the flag --step, the checkpoint to read: "best", "best_raw", "latest" or an int."""
    flags.DEFINE(_StepParser(), "step", default, help_text)


def define_canvas_flag(default_text: str) -> None:
    """Defines the flag --canvas, a tuple of height and width, None by default."""
    flags.DEFINE(CanvasParser(), "canvas", None, f"HEIGHTxWIDTH; by default {default_text}.")


def local_path(argument: str) -> Path:
    """Returns the path of an argument that is not a flag, `~` expanded as in a path flag.

    Raises:
      SystemExit: a bucket, or an unknown user after `~`.
    """
    try:
        return expand_user(argument, "")
    except ConfigError as error:
        fail(f"{argument}: {error.expected}")


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("expected a path")
        try:
            return os.fspath(expand_user(argument, ""))
        except ConfigError as error:
            raise ValueError(error.expected) from None


class _StepParser(flags.ArgumentParser):
    def parse(self, argument: str | int) -> str | int:
        if argument in ("best", "best_raw", "latest"):
            return argument
        if isinstance(argument, str) and argument.isdecimal():
            return int(argument)
        raise ValueError("expected best, best_raw, latest or a number of steps")


class CanvasParser(flags.ArgumentParser):
    """Parses a canvas, the size of a padding bucket: HEIGHTxWIDTH."""

    def parse(self, argument: str) -> tuple[int, int]:
        """Returns height and width."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", argument)
        if not match:
            raise ValueError("expected HEIGHTxWIDTH, such as 800x1344")
        return int(match[1]), int(match[2])


# Parsing


def _parse_flags(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Parses all flags; exits with one line if one is wrong."""
    if any(_HELP.fullmatch(argument) for argument in argv[1:]):
        return flags.FLAGS(argv)  # absl prints the help and exits
    argv = _find_config_file(argv)
    try:
        _check_overrides(argv)
        if any(re.fullmatch("--?help_config", argument) for argument in argv[1:]):
            _print_config_reference(argv)
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        if cause := _expected_cause(error):
            fail(str(cause))
        lines = str(error).strip().splitlines()
        named = [i for i, line in enumerate(lines) if line.startswith("flag ")]
        fail(" ".join(lines[named[-1] if named else -1 :]))  # the lines before say the same
    except flags.Error as error:
        fail(str(error))
    any_number = bool(arguments) and arguments[-1].endswith("...")
    if len(rest) - 1 > len(arguments) and not any_number:
        extra = rest[1 + len(arguments)]
        fail(f"unexpected argument {extra!r}: overrides are --config.section.key=value")
    if len(rest) - 1 < len([name for name in arguments if not name.startswith("[")]):
        fail(f"{arguments[len(rest) - 1].removesuffix('...')} is missing; see --help")
    return rest


def _expected_cause(error: BaseException | None) -> Error | None:
    """The error of this package that a config file raised, if it led to `error`."""
    while error is not None and not isinstance(error, Error):
        error = None if error.__suppress_context__ else error.__context__
    return error


def _find_config_file(argv: Sequence[str]) -> list[str]:
    """Replaces the name of an experiment in --config by its path; exits if there is none."""
    found = list(argv)
    for i in range(1, len(argv)):
        if match := re.fullmatch(r"--?config=(.*)", argv[i], re.DOTALL):
            found[i] = f"--config={_config_file(match[1])}"
        elif re.fullmatch(r"--?config", argv[i - 1]):
            found[i] = _config_file(argv[i])
    return found


def _config_file(value: str) -> str:
    """The value of --config with a path; what follows a colon is for the file's get_config."""
    name, colon, argument = value.partition(":")
    try:
        return f"{find_config(name)}{colon}{argument}"
    except Error as error:
        fail(str(error))


def _check_overrides(argv: Sequence[str]) -> None:
    """Exits if an override names no key of the config."""
    overrides = [match[1] for arg in argv if (match := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    config = _config_without_overrides(argv) if overrides else None
    for key in overrides if config is not None else ():
        if not _has(config, key):
            near = nearest_key(key, flat_keys(config))
            fail(f"--config.{key}: there is no such key{near and '; ' + near}")


def _config_without_overrides(argv: Sequence[str]) -> ConfigDict | None:
    """The config of the last --config, None without."""
    path = None
    for i in range(1, len(argv)):
        if argv[i].startswith(("--config=", "-config=")):
            path = argv[i].partition("=")[2]
        elif argv[i - 1] in ("--config", "-config"):
            path = argv[i]
    if path is None:
        return None
    scratch = flags.FlagValues()
    config_flags.DEFINE_config_file("config", path, flag_values=scratch, sys_argv=[""])
    return scratch["config"].value


def _print_config_reference(argv: Sequence[str]) -> NoReturn:
    """Prints every key of the config, and ends the program."""
    from dn_detr_jax.config.reference import describe_config

    scratch = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=scratch, sys_argv=list(argv))
    scratch(argv, known_only=True)
    if scratch.config is None:
        fail("--help_config: of which --config?")
    show(describe_config(scratch.config))


def _has(config: ConfigDict, key: str) -> bool:
    value = config
    for part in key.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return False
        value = value[part]
    # A whole section given as text would drop the keys that it leaves out.
    return not isinstance(value, ConfigDict)
