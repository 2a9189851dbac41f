"""The check of a reference case: all that it holds, or a named reason why it can't be checked."""

from pathlib import Path

import jax

from dn_detr_jax.errors import Error, UnsupportedCase, short_reason
from dn_detr_jax.parity import check_components, check_evaluation, check_imported, check_training
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.prepared import PreparedCase, prepare
from dn_detr_jax.parity.reference import Case


def check(
    case: Case | str | Path, dtype: str = "float32", overrides: dict[str, str] | None = None
) -> Report:
    """Compares everything that a case holds with what this package computes.

    Args:
      case: of components or of a whole detector, or the path of its `.npz` file.
      dtype: of the model's compute. Below float32 only the losses have a tolerance, 2%.
      overrides: config keys and values that replace those of the case.

    Returns:
      The report; its `exit_status` is 0 only if every output of the case was compared and agrees.

    Raises:
      FileNotFoundError: a file of the case is missing.
      UnsupportedCase: the package does not have that model, or the case lacks something.
      ConfigError: a wrong override.
      ConversionError: the weights of the case are not those of the model.
    """
    try:
        if not isinstance(case, Case):
            case = Case(case)
        if "modelname" in case.manifest:
            return check_detector(prepare(case, dtype, overrides))
        if "num_queries" in case.manifest and not overrides:
            return check_imported.check(case, dtype)
        if dtype != "float32" or overrides:
            raise UnsupportedCase(f"{case.name}: components have no model: no --dtype, no --set")
        return check_components.check(case)
    except (Error, OSError):
        raise
    except Exception as error:  # a malformed case can fail at any place
        name = case.name if isinstance(case, Case) else case
        raise UnsupportedCase(
            f"{name}: the check failed with {type(error).__name__}: {short_reason(error)}"
        ) from error


def check_detector(prepared: PreparedCase) -> Report:
    """Compares everything that a case of the whole detector holds."""
    report = Report(prepared.case)
    # TPUs and GPUs would otherwise multiply float32 matrices in fewer digits.
    with jax.default_matmul_precision("highest" if prepared.exact else "default"):
        if prepared.case.has_outputs("eval."):
            check_evaluation.compare(report, prepared, *check_evaluation.run(prepared))
        if prepared.case.has_outputs("train.", "steps.", "init.", "step1.", "step3."):
            check_training.compare(report, prepared, check_training.run_steps(prepared))
    return report
