"""Draws loss, AP and instability of one or several runs.

python -m dn_detr_jax visualize curves.png DN-DETR=runs/digits DAB-DETR=runs/plain
"""

from collections.abc import Sequence

from dn_detr_jax.commands.command_line import local_path
from dn_detr_jax.errors import DataError

ARGUMENTS = ("OUT.png", "NAME=WORKDIR...")


def define_flags() -> None:
    """Defines no flags: there are none."""


def main(argv: Sequence[str]) -> None:
    """Draws the curves."""
    runs = {}
    for argument in argv[2:]:
        name, equals, workdir = argument.partition("=")
        if not equals:
            raise DataError(f"{argument}: expected NAME=WORKDIR, such as DN-DETR=runs/digits")
        runs[name] = local_path(workdir) / "metrics.jsonl"
        if not runs[name].is_file():
            raise DataError(f"{runs[name]}: there is no such file")
    from dn_detr_jax.visualize.plots import render_curves
    from dn_detr_jax.visualize.save import save_png

    save_png(render_curves(runs), local_path(argv[1]))
