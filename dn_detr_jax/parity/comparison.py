"""Computed numbers against stored ones: errors, tolerances, and ratios to the float32 noise."""

import math
from typing import Any

import numpy as np

from dn_detr_jax.parity.reference import Case

# Of single components.
ATOL = 1e-5  # encodings, queries, boxes
RTOL = 1e-4  # losses and gradients, relative to the largest value


class Report:
    """Collects the comparisons of a case, and which are out of tolerance."""

    def __init__(self, case: Case):
        """An empty report on `case`, whose manifest gives the float32 noise."""
        self.case = case
        self.entries: dict[str, dict[str, Any]] = {}
        self.not_covered: dict[str, str] = {}

    @property
    def failures(self) -> list[str]:
        """Names of the comparisons out of tolerance."""
        return [name for name, entry in self.entries.items() if not entry["ok"]]

    def array(
        self,
        name: str,
        ours: np.ndarray,
        *,
        atol: float | None = None,
        rtol: float | None = None,
        where: np.ndarray | None = None,
        expected: np.ndarray | None = None,
    ) -> None:
        """Compares an array, or the strided part of it that is stored.

        Args:
          name: in the case.
          ours: the full array.
          atol: largest absolute error allowed; with neither tolerance the error is only reported.
          rtol: largest absolute error allowed, in units of the largest expected magnitude.
          where: bool, broadcasting to the expected array, False: not compared.
          expected: in place of the stored array.
        """
        if expected is None:
            expected = self.case[name]
            if name in self.case.manifest["arrays"]:
                ours = self.case.stored_part(name, ours)
        ours = np.asarray(ours, np.float64)
        if ours.shape != expected.shape:
            self._add(name, ok=False, shape=list(ours.shape), expected_shape=list(expected.shape))
            return
        error = np.abs(ours - np.asarray(expected, np.float64))
        scale = np.abs(np.asarray(expected, np.float64))
        if where is not None:
            where = np.broadcast_to(where, error.shape)
            error, scale = error[where], scale[where]
        largest = float(error.max(initial=0.0))
        scale = float(scale.max(initial=0.0))
        entry: dict[str, Any] = {"abs": largest, "rel": largest / scale if scale else largest}
        ok = math.isfinite(largest)
        if atol is not None:
            entry["tolerance_abs"] = atol
            ok &= largest <= atol
        if rtol is not None:
            entry["tolerance_rel"] = rtol
            ok &= largest <= rtol * scale
        if noise := self.case.float32_noise(name):
            entry["noise_ratio"] = largest / noise
        self._add(name, ok=bool(ok), **entry)

    def equal(self, name: str, ours: np.ndarray, expected: np.ndarray | None = None) -> None:
        """Compares integers or masks exactly."""
        expected = self.case[name] if expected is None else expected
        ours = np.asarray(ours)
        same = ours.shape == expected.shape and bool(np.all(ours == expected))
        self._add(name, ok=same, equal=same)

    def scalars(
        self,
        name: str,
        ours: dict[str, float],
        expected: dict[str, float],
        *,
        rtol: float | dict[str, float] | None,
        median: float | None = None,
        exact: dict[str, float] | None = None,
    ) -> None:
        """Compares named numbers by their relative errors, absolute ones where 0 is expected.

        Args:
          name: of the comparison.
          ours: by name.
          expected: by name, the same names.
          rtol: largest relative error allowed, one for all or by name; None: reported only.
          median: largest median of the relative errors allowed.
          exact: from a float64 run of the PyTorch code; gives the float32 noise.
        """
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
        if exact is not None:
            noise = max(abs(float(exact[key]) - float(value)) for key, value in expected.items())
            entry["noise_ratio"] = entry["abs"] / noise if noise else None
        self._add(name, ok=bool(ok), **entry)

    def skip(self, name: str, reason: str) -> None:
        """Notes what the case holds and this package has no counterpart of."""
        self.not_covered[name] = reason

    def _add(self, name: str, *, ok: bool, **entry: Any) -> None:
        if name in self.entries:
            raise ValueError(f"{name} is compared twice")
        self.entries[name] = {"ok": ok} | entry

    def as_json(self) -> dict[str, Any]:
        """Everything, the failures first."""
        return {
            "case": self.case.name,
            "ok": not self.failures,
            "out_of_tolerance": self.failures,
            "compared": len(self.entries),
            "results": self.entries,
            "not_covered": self.not_covered,
        }
