"""Compares this package with stored results of the official code.

    python -m dn_detr_jax check-reference CASE.npz [--dtype bfloat16] [--set KEY=VALUE]

The command builds the model that the manifest beside the case describes, fills it through the
importer, runs what the case holds, and prints one JSON object: for every array, loss, gradient and
update the largest absolute and relative error (relative to the largest expected magnitude for
arrays, to the number itself for losses and norms), the tolerance, and the ratio to the float32
noise of the PyTorch code where that is known. Exit status: 0 if every output of the case was
compared and is within tolerance, 1 if one is not, 2 if outputs were left out, which are listed, or
if the case can't be checked at all, for example that of a model that this package does not have.
"""

import json
import os
import sys
from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import local_path
from dn_detr_jax.errors import Error, UnsupportedCase, one_line

FLAGS = flags.FLAGS
ARGUMENTS = ("CASE.npz",)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model's compute.")
    flags.DEFINE_multi_string(
        "set", [], "KEY=VALUE: a config key to change, such as model.backbone.mask_padding=True."
    )


def run(path: str | os.PathLike, dtype: str = "float32", settings: Sequence[str] = ()) -> int:
    """Checks a case, prints the report, and returns the exit status.

    Args:
      path: of the `.npz` file.
      dtype: of the model's compute.
      settings: KEY=VALUE, config keys to change.
    """
    from dn_detr_jax.parity.check import check

    pairs = [setting.split("=", 1) for setting in settings]
    try:
        if wrong := [pair[0] for pair in pairs if len(pair) != 2]:
            raise UnsupportedCase(f"--set={wrong[0]}: expected KEY=VALUE")
        report = check(local_path(os.fspath(path)), dtype, dict(pairs))
    except (Error, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=1))
    if report.exit_status == 2:
        names = ", ".join(list(report.left_out)[:6]) or "it has no outputs"
        print(
            f"error: {report.case.name}: {len(report.entries)} comparisons, "
            f"{len(report.left_out)} outputs left out: {names}",
            file=sys.stderr,
        )
    return report.exit_status


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say; ends with the exit status."""
    sys.exit(run(argv[1], FLAGS.dtype, FLAGS.set))
