"""Compares this package with stored results of the official code.

    python -m dn_detr_jax check-reference CASE.npz [--dtype bfloat16] [--set KEY=VALUE]

The command builds the model that the manifest beside the case describes, fills it through the
importer, runs what the case holds, and prints one JSON object: for every array, loss, gradient and
update the largest absolute and relative error (relative to the largest expected magnitude for
arrays, to the number itself for losses and norms), the tolerance, and the ratio to the float32
noise of the PyTorch code where that is known. Exit status: 0 if everything is within tolerance, 1
if not, 2 if the case can't be checked, for example that of a model that this package does not have.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from dn_detr_jax.commands.command_line import local_path
from dn_detr_jax.errors import Error, one_line

FLAGS = flags.FLAGS
ARGUMENTS = ("CASE.npz",)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model's compute.")
    flags.DEFINE_multi_string(
        "set", [], "KEY=VALUE: a config key to change, such as model.backbone.mask_padding=True."
    )


def check(case: Any, dtype: str = "float32", overrides: dict[str, str] | None = None) -> Any:
    """Runs a case.

    Args:
      case: a `parity.reference.Case` of components or of a whole model.
      dtype: of the model's compute. Below float32 only the losses have a tolerance, 2%.
      overrides: config keys and values that replace those of the case.

    Returns:
      A `parity.comparison.Report`.

    Raises:
      UnsupportedCase: the package does not have that model, or the case lacks something.
      ConfigError: a wrong override.
      ConversionError: the weights of the case are not those of the model.
    """
    from dn_detr_jax.parity import check_components, check_detector, reference

    if "modelname" not in case.manifest:
        if dtype != "float32" or overrides:
            raise reference.UnsupportedCase(
                f"{case.name}: components have no model: no --dtype, no --set"
            )
        return check_components.check(case)
    return check_detector.check(check_detector.set_up(case, dtype, overrides))


def run(path: str | os.PathLike, dtype: str = "float32", settings: Sequence[str] = ()) -> int:
    """Checks a case, prints the report, and returns the exit status.

    Args:
      path: of the `.npz` file.
      dtype: of the model's compute.
      settings: KEY=VALUE, config keys to change.
    """
    from dn_detr_jax.parity import reference

    pairs = [setting.split("=", 1) for setting in settings]
    try:
        if wrong := [pair[0] for pair in pairs if len(pair) != 2]:
            raise reference.UnsupportedCase(f"--set={wrong[0]}: expected KEY=VALUE")
        report = check(reference.Case(local_path(os.fspath(path))), dtype, dict(pairs))
    except (Error, reference.UnsupportedCase, FileNotFoundError) as error:
        print("error:", one_line(error), file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=1))
    return 1 if report.failures else 0


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say; ends with the exit status."""
    sys.exit(run(argv[1], FLAGS.dtype, FLAGS.set))
