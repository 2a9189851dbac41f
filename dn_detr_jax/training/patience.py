"""Early stopping: a training ends once its evaluations no longer improve."""

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """Counts the evaluations since the best AP.

    Checkpoints hold its state, so that a resumed training ends where an uninterrupted one does.
    """

    def __init__(self, stop_after: int, state: Mapping[str, Any] | None = None):
        """Starts to count, or continues.

        Args:
          stop_after: evaluations without a higher AP that end the training; 0: none do.
          state: of `state_dict`.
        """
        self._stop_after = stop_after
        self._best: float | None = state["best"] if state else None
        self._since: int = state["since"] if state else 0

    def update(self, ap: float) -> None:
        """Takes the AP of an evaluation. NaN, as of a split without objects, is no improvement."""
        if ap > (-math.inf if self._best is None else self._best):
            self._best, self._since = ap, 0
        else:
            self._since += 1

    @property
    def is_over(self) -> bool:
        """Whether the training is to end."""
        return 0 < self._stop_after <= self._since

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it."""
        return {"best": self._best, "since": self._since}

    def __str__(self) -> str:
        best = "none" if self._best is None else f"{self._best:.3f}"
        return f"{self._since} evaluations without an AP above {best}"
