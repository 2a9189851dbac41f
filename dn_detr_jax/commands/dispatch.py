"""The table of commands: `python -m dn_detr_jax COMMAND` in a clone, `dn-detr COMMAND` installed.

Every command has `--help`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dn_detr_jax.commands.command_line import fail, leave_interrupted, run_command, show

# Command -> module of this package. The first line of its docstring is what the list shows.
COMMANDS = {
    "train": "train",
    "eval": "evaluate",
    "inspect": "inspect",
    "predict": "predict",
    "export": "export",
    "serve": "serve",
    "check": "check",
    "cut": "cut",
    "canvases": "canvases",
    "preview": "preview",
    "import": "import_checkpoint",
    "export-torch": "export_checkpoint",
    "check-reference": "check_reference",
    "preflight": "preflight",
    "visualize": "visualize",
    "visualize-noise": "visualize_noise",
}


def main() -> NoReturn:
    """Runs the command that `sys.argv` names.

    Raises:
      SystemExit: always.
    """
    program = "dn-detr" if Path(sys.argv[0]).stem == "dn-detr" else "python -m dn_detr_jax"
    try:
        _run(program, sys.argv[1:])
    except KeyboardInterrupt:
        leave_interrupted()


def _run(program: str, arguments: Sequence[str]) -> NoReturn:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show(overview(program), 0 if arguments else 1)
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        fail(f"{name!r} is not a command; {hint}")
    sys.argv = [f"{program} {name}", *rest]
    run_command(load(name), sys.argv[0])


def load(name: str) -> ModuleType:
    """Imports the module of a command."""
    return importlib.import_module(f"dn_detr_jax.commands.{COMMANDS[name]}")


def overview(program: str) -> str:
    """Returns usage and a line for every command."""
    width = max(map(len, COMMANDS))
    lines = [f"usage: {program} COMMAND [FLAGS]", "", "commands:"]
    lines += [
        f"  {name:{width}}  {(load(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS
    ]
    return "\n".join([*lines, "", f"{program} COMMAND --help shows the flags of a command."])
