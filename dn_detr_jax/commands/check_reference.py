"""Compares this package with stored results of the official PyTorch DN-DETR.

    python -m dn_detr_jax check-reference CASE.npz [--dtype bfloat16] [--set KEY=VALUE]

builds the model that the manifest beside the case describes, fills it through the importer, runs
what the case holds, and prints one JSON object: for every array, loss, gradient and update the
largest absolute and relative error (relative to the largest expected magnitude for arrays, to the
number itself for losses and norms), the tolerance, and the ratio to the float32 noise of the
PyTorch code where that is known. Exit status: 0 if everything is within tolerance, 1 if not, 2 if
the case can't be checked, for example that of a model that this package does not have.
"""

import argparse
import json
import sys

from dn_detr_jax.errors import ConfigError, ConversionError
from dn_detr_jax.parity import check_components, check_detector, reference
from dn_detr_jax.parity.comparison import Report


def check(
    case: reference.Case, dtype: str = "float32", overrides: dict[str, str] | None = None
) -> Report:
    """Runs a case.

    Args:
      case: of components or of a whole model.
      dtype: of the model's compute. Below float32 only the losses have a tolerance, 2%.
      overrides: config keys and values that replace those of the case.

    Raises:
      UnsupportedCase: the package does not have that model, or the case lacks something.
      ConfigError: a wrong override.
      ConversionError: the weights of the case are not those of the model.
    """
    if "modelname" not in case.manifest:
        if dtype != "float32" or overrides:
            raise reference.UnsupportedCase(
                f"{case.name}: components have no model: no --dtype, no --set"
            )
        return check_components.check(case)
    return check_detector.check(check_detector.set_up(case, dtype, overrides))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="check_reference", description=__doc__.split("\n")[0])
    parser.add_argument("case", help="the .npz file; its manifest .json lies beside it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a config key to change, for example model.backbone.mask_padding=True",
    )
    args = parser.parse_args(argv)
    try:
        overrides = dict(text.split("=", 1) for text in args.set)
    except ValueError:
        parser.error(f"--set takes KEY=VALUE, not {args.set}")
    try:
        report = check(reference.Case(args.case), args.dtype, overrides)
    except (reference.UnsupportedCase, ConfigError, ConversionError, FileNotFoundError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
