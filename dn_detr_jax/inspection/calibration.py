"""Whether scores are probabilities: the share of right detections by score, at an IoU of 0.5.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, sections 2 and 3; for detectors
Küppers et al., "Multivariate Confidence Calibration for Object Detection", CVPR Workshops 2020.
"""

import dataclasses

import numpy as np

from dn_detr_jax.evaluation.matches import Matches


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Detections in bins of equal width by their score; the last bin includes a score of 1.

    Attributes:
      counts: int [bins].
      scores: float [bins], mean score; NaN for an empty bin.
      precision: float [bins], share of right detections; NaN for an empty bin.
    """

    counts: np.ndarray
    scores: np.ndarray
    precision: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over detections of |score - precision|."""
        filled = self.counts > 0
        gaps = np.abs(self.scores - self.precision)[filled]
        return float(np.average(gaps, weights=self.counts[filled])) if filled.any() else np.nan


def calibration(matches: Matches, bins: int = 10) -> Calibration:
    """Sorts the detections of a split into bins; detections of crowd regions are left out."""
    scores, correct = matches.scores[~matches.ignored], matches.correct[~matches.ignored]
    at = np.clip((scores * bins).astype(int), 0, bins - 1)
    counts = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(at, scores, bins) / counts
        precision = np.bincount(at, correct, bins) / counts
    return Calibration(counts, means, precision)
