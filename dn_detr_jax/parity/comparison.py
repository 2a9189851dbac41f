"""Computed numbers against stored ones: errors, tolerances, and ratios to the float32 noise."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from dn_detr_jax.parity.reference import Case

# Of single components.
ATOL = 1e-5  # encodings, queries, boxes
RTOL = 1e-4  # losses and gradients, relative to the largest value
Tolerance = TypeVar("Tolerance", float, np.ndarray)


class Report:
    """Collects the comparisons of a case.

    Attributes:
      case: what is compared; its manifest gives the float32 noise.
      entries: results by name, in the order of the comparisons.
      reasons: why an array that the case holds was not compared, where that is known.
    """

    def __init__(self, case: Case):
        """Starts an empty report on `case`."""
        self.case = case
        self.entries: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, str] = {}
        self._covered: set[str] = set()

    @property
    def failures(self) -> list[str]:
        """Names of the comparisons out of tolerance."""
        return [name for name, entry in self.entries.items() if not entry["ok"]]

    @property
    def left_out(self) -> dict[str, str]:
        """Outputs of the case that were not compared, each with the reason."""
        default = "this package computes nothing of this name"
        return {
            name: self.reasons.get(name, default)
            if name in self.case
            else "the manifest lists it, the file does not have it"
            for name in self.case.outputs()
            if name not in self._covered
        }

    @property
    def exit_status(self) -> int:
        """0: all outputs compared and within tolerance; 1: a difference; 2: outputs left out."""
        if self.failures:
            return 1
        return 2 if self.left_out or not self.entries else 0

    def array(
        self,
        name: str,
        ours: ArrayLike,
        *,
        atol: float | np.ndarray | None = None,
        rtol: float | None = None,
        where: np.ndarray | None = None,
        each: bool = False,
        bulk: float | None = None,
    ) -> None:
        """Compares an array, or the strided part of it that is stored; nothing if none is.

        Args:
          name: in the case.
          ours: the full array.
          atol: largest absolute error allowed, one or an array that broadcasts to the full array;
            with neither tolerance the error is only reported.
          rtol: largest absolute error allowed, in units of the largest expected magnitude.
          where: bool, broadcasting to the full array, False: not compared.
          each: errors are in units of the expected value itself, where that is not 0.
          bulk: largest absolute error allowed for 99.9% of the values.
        """
        if (pair := self._pair(name, ours, where)) is None:
            return
        values, expected, kept = pair
        values, expected = values.astype(np.float64)[kept], expected.astype(np.float64)[kept]
        error, scale = np.abs(values - expected), np.abs(expected)
        if each:
            unit = np.where(expected == 0, 1.0, scale)
            error, scale = error / unit, scale / unit
        largest = float(error.max(initial=0.0))
        magnitude = float(scale.max(initial=0.0))
        entry: dict[str, Any] = {
            "abs": largest,
            "rel": largest / magnitude if magnitude else largest,
        }
        ok = math.isfinite(largest)
        if atol is not None:
            limits = self.case.part(name, np.broadcast_to(atol, np.shape(ours)))[kept]
            entry["tolerance_abs"] = float(limits.max(initial=0.0))
            ok &= bool(np.all(error <= limits))
        if rtol is not None:
            entry["tolerance_rel"] = rtol
            ok &= largest <= rtol * magnitude
        if bulk is not None and error.size:
            entry["tolerance_bulk"], entry["bulk"] = bulk, float(np.quantile(error, 0.999))
            ok &= entry["bulk"] <= bulk
        if noise := self.case.float32_noise(name):
            entry["noise_ratio"] = largest / noise
        self._add(name, ok=bool(ok), **entry)

    def equal(
        self,
        name: str,
        ours: ArrayLike,
        *,
        where: np.ndarray | None = None,
        required: bool = True,
    ) -> None:
        """Compares integers or masks exactly; the stored part of them, nothing if none is.

        Args:
          name: in the case.
          ours: the full array, or one for each image of a batch for which one is stored.
          where: bool, broadcasting to the full array, False: not compared.
          required: a difference is out of tolerance; otherwise the equal share is only reported.
        """
        if (pair := self._pair(name, ours, where)) is None:
            return
        values, expected, kept = pair
        same = (values == expected)[kept]
        entry: dict[str, Any] = {"equal": bool(same.all())}
        if not required:
            entry["equal_share"] = float(same.mean()) if same.size else 1.0
        self._add(name, ok=entry["equal"] or not required, **entry)

    def _pair(
        self, name: str, ours: ArrayLike, where: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Ours, the expected array and the bool mask of what to compare, all of one shape.

        None if there is nothing to compare, or if the shapes differ, which is then reported.
        """
        if name not in self.case:
            return None
        values, expected = np.asarray(ours), self.case.stored(name)
        full = self.case.full_shape(name)
        leading = values.ndim - len(full)
        if leading < 0 or values.shape[leading:] != full:
            self._add(name, ok=False, shape=list(values.shape), expected_shape=list(full))
            return None
        kept = np.broadcast_to(True if where is None else where, values.shape)
        values, kept = self.case.part(name, values), self.case.part(name, kept)
        if kept.size and not kept.any():
            self.reasons[name] = "no stored value can be compared: all are of padding or ambiguous"
            return None
        return values, np.broadcast_to(expected, values.shape), kept

    def scalars(
        self,
        name: str,
        ours: Mapping[str, float],
        expected: Mapping[str, float],
        *,
        rtol: float | dict[str, float] | None,
        median: float | None = None,
        exact: Mapping[str, float] | None = None,
        covers: Iterable[str] = (),
    ) -> None:
        """Compares named numbers by their relative errors, absolute ones where 0 is expected.

        Nothing if no number is expected.

        Args:
          name: of the comparison.
          ours: by name.
          expected: by name, those of `ours` or some of them.
          rtol: largest relative error allowed, one for all or by name; None: reported only.
          median: largest median of the relative errors allowed.
          exact: from a float64 run of the PyTorch code, for some or all of the numbers: gives their
            float32 noise.
          covers: arrays of the case that the numbers sum up, if not the one of that name.
        """
        if not expected:
            return
        absolute = {key: abs(float(ours[key]) - float(value)) for key, value in expected.items()}
        errors = {k: error / (abs(float(expected[k])) or 1.0) for k, error in absolute.items()}
        worst = max(errors, key=errors.__getitem__)
        entry: dict[str, Any] = {
            "abs": max(absolute.values()),
            "rel": errors[worst],
            "rel_median": float(np.median(list(errors.values()))),
            "worst": worst,
            "count": len(errors),
        }
        ok = all(map(math.isfinite, errors.values()))
        if rtol is not None:
            limits = rtol if isinstance(rtol, dict) else dict.fromkeys(errors, rtol)
            entry["tolerance_rel"] = limits[worst]
            outside = [key for key in errors if not errors[key] <= limits[key]]
            ok &= not outside
            if outside:
                entry["outside"] = {key: errors[key] for key in outside}
        if median is not None:
            entry["tolerance_rel_median"] = median
            ok &= entry["rel_median"] <= median
        if exact:
            noise = max(abs(float(value) - float(expected[key])) for key, value in exact.items())
            error = max(absolute[key] for key in exact)
            entry["noise_ratio"] = error / noise if noise else None
        self._add(name, ok=bool(ok), **entry)
        self._covered.update(covers)

    def _add(self, name: str, *, ok: bool, **entry: Any) -> None:
        if name in self.entries:
            raise ValueError(f"{name} is compared twice")
        self.entries[name] = {"ok": ok} | entry
        self._covered.add(name.split("[")[0])

    def as_json(self) -> dict[str, Any]:
        """Everything, the failures and what was left out first."""
        return {
            "case": self.case.name,
            "ok": self.exit_status == 0,
            "out_of_tolerance": self.failures,
            "left_out": self.left_out,
            "compared": len(self.entries),
            "results": self.entries,
        }


def clear_ranks(ranked: np.ndarray, error: float) -> np.ndarray:
    """Tells which scores are too far from both neighbors to swap with one of them.

    Args:
      ranked: float [B, K + 1] in descending order; the last one is the best that is not kept.
      error: largest error of a score.

    Returns:
      bool [B, K].
    """
    gaps = -np.diff(ranked, axis=1)
    before = np.concatenate([np.full((len(gaps), 1), np.inf), gaps[:, :-1]], axis=1)
    return np.minimum(gaps, before) > 4 * error


def largest_error(case: Case, name: str, ours: np.ndarray) -> float:
    """Returns the largest difference between a full array and what is stored of it."""
    return float(np.abs(case.part(name, ours) - case.stored(name)).max(initial=0.0))
