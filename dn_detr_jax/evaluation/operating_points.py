"""Precision, recall and F1 by the lowest score of a detection that counts, at an IoU of 0.5.

The threshold with the best F1 of all classes together is where a user of a detector wants to be
who weighs a wrong detection like a missed object. `predict` starts from it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dn_detr_jax.evaluation.matches import Matches

# Figures of a class beside its AP, in the order of tables.
CLASS_FIGURES = ("AR", "precision", "recall", "F1", "threshold")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Counts of detections by threshold, of a class or of all together.

    Attributes:
      thresholds: float [t], every score that a detection has, descending.
      right: int [t], detections from the threshold on that find an object of their class.
      wrong: int [t], those that do not.
      objects: to find.
    """

    thresholds: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: int

    @classmethod
    def of(cls, matches: Matches, label: int | None = None) -> "Curve":
        """Counts the detections of a class; None: of all classes."""
        kept = ~matches.ignored
        if label is not None:
            kept = kept & (matches.labels == label)
        scores, correct = matches.scores[kept], matches.correct[kept]
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of equal scores
        last = last[: len(scores)]
        counts = matches.counts
        objects = int(counts.sum() if label is None else counts[label])
        right, all_ = np.cumsum(correct)[last], last + 1
        return cls(scores[last], right, all_ - right, objects)

    @property
    def precision(self) -> np.ndarray:
        """float [t], share of the detections that are right."""
        return self.right / (self.right + self.wrong)

    @property
    def recall(self) -> np.ndarray:
        """float [t], share of the objects that are found; NaN without objects."""
        return self.right / self.objects if self.objects else np.full(len(self.right), math.nan)

    @property
    def f1(self) -> np.ndarray:
        """float [t], harmonic mean of precision and recall; NaN without objects."""
        if not self.objects:
            return np.full(len(self.right), math.nan)
        return 2 * self.right / (self.right + self.wrong + self.objects)

    def best_threshold(self) -> float:
        """Returns the highest threshold of the best F1; NaN if no detection is right."""
        if not self.objects or not self.right.any():
            return math.nan
        return float(self.thresholds[self.f1.argmax()])

    def at(self, threshold: float) -> dict[str, float]:
        """Precision, recall and F1 for a threshold; NaN where they are not defined."""
        number = int(np.count_nonzero(self.thresholds >= threshold))
        if not number:  # no detection; the threshold may be NaN
            nothing = 0.0 if self.objects else math.nan
            return {"precision": math.nan, "recall": nothing, "F1": nothing}
        of = number - 1
        return {
            "precision": float(self.precision[of]),
            "recall": float(self.recall[of]),
            "F1": float(self.f1[of]),
        }


def operating_point(matches: Matches) -> dict[str, float]:
    """Returns `threshold`, that of the best F1 of all classes, and the figures there.

    Objects of all classes count alike. All are NaN if no detection is right, but for recall and F1,
    which are 0.
    """
    curve = Curve.of(matches)
    threshold = curve.best_threshold()
    return {"threshold": threshold, **curve.at(threshold)}


def class_figures(matches: Matches, threshold: float, recalls: Sequence[float]) -> np.ndarray:
    """Computes the figures of every class.

    Args:
      matches: of the split.
      threshold: at which precision, recall and F1 are taken, the same for all classes.
      recalls: AR by class.

    Returns:
      float [C, 5] in the order of `CLASS_FIGURES`; `threshold` there is the class's own with the
      best F1.
    """
    rows = []
    for label, recall in enumerate(recalls):
        curve = Curve.of(matches, label)
        rows.append([recall, *curve.at(threshold).values(), curve.best_threshold()])
    return np.array(rows, np.float64).reshape(-1, len(CLASS_FIGURES))
