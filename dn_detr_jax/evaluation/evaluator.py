"""One evaluation of a detector: all images of a split, COCO metrics, instability of matching.

Precision, recall and F1 are measured at an IoU of 0.5, see `operating_points`.
"""

import dataclasses
import logging
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.data.datasets import Dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.distributed.consistency import all_gather
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator, format_table
from dn_detr_jax.evaluation.instability import MatchingInstability, match_vectors
from dn_detr_jax.evaluation.matches import Matches
from dn_detr_jax.evaluation.operating_points import (
    CLASS_FIGURES,
    class_figures,
    operating_point,
)
from dn_detr_jax.models.registry import num_matching_queries
from dn_detr_jax.sharding import put_batch

logger = logging.getLogger(__name__)

Detect = Callable[[dict, dict], dict[str, jax.Array]]
_POINT = ("threshold", "precision", "recall", "F1")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
      metrics: COCO metrics by name (`AP`, `AP50`, ..., `ARl`), 0 to 1, NaN where nothing counts;
        `threshold`, the score with the best F1 of all classes, and `precision`, `recall` and `F1`
        there; and `instability` of the last decoder layer and `instability_layer_1` ... of the
        others, entries per image, once two evaluations can be compared.
      per_class: AP by class name.
      class_figures: by name of the figure (`operating_points.CLASS_FIGURES`), then by class name.
        Precision, recall and F1 are those at the threshold of all classes; `threshold` is the
        class's own with the best F1.
      confusion: int [C + 1, C + 1] at the threshold of all classes, see `Matches.confusion`.
      matches: of the detections, on the first process; None on others.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]
    class_figures: dict[str, dict[str, float]]
    confusion: np.ndarray
    matches: Matches | None = None

    def table(self) -> str:
        """Returns the COCO summary, with the figures of every class below."""
        return format_table(self.metrics, {"AP": self.per_class} | self.class_figures)


class Evaluator:
    """Evaluates parameters on a split, and compares their matching with the evaluation before.

    Attributes:
      instability: of the matching; None with `eval.instability_images` of 0.
    """

    def __init__(self, dataset: Dataset, config: ConfigDict, detect: Detect, mesh: Mesh):
        """Prepares evaluations.

        Args:
          dataset: the split.
          config: whole configuration.
          detect: (params, batch) -> detections, see `training.programs.Programs.detect`.
          mesh: devices.
        """
        self._dataset, self._config, self._detect, self._mesh = dataset, config, detect, mesh
        self._ground_truth = dataset.coco_ground_truth()
        self._num_queries = num_matching_queries(config.model)
        self.instability = None
        if config.eval.instability_images:
            subset = dataset.image_ids[: config.eval.instability_images].tolist()
            self.instability = MatchingInstability(subset, self._num_queries)

    def __call__(self, params: dict, *, compare: bool = True) -> Evaluation:
        """Evaluates; every process takes part and gets the result.

        Args:
          params: of the model.
          compare: whether the matching is compared with that of the evaluation before, and the next
            one with this.
        """
        instability = self.instability if compare else None
        category_ids = [category.id for category in self._dataset.categories]
        coco = CocoEvaluator(self._ground_truth, category_ids, self._config.eval.backend)
        # The devices compute a batch while the host processes the previous one.
        pending = None
        batches = eval_batches(
            self._dataset, self._config, jax.process_index(), jax.process_count()
        )
        for batch in batches:
            del batch["dropped_objects"], batch["bad_images"]
            found = self._detect(params, put_batch(batch, self._mesh))
            if pending is not None:
                self._take(coco, pending, instability)
            pending = found
        if pending is not None:
            self._take(coco, pending, instability)
        if coco.missing() and not self._config.data.skip_bad:
            raise RuntimeError(f"{coco.missing()} images of the split were not evaluated")
        if coco.missing():
            logger.warning(
                "%d images can't be read: they count as images without any detection",
                coco.missing(),
            )
        return self._result(coco, instability)

    def _take(
        self,
        coco: CocoEvaluator,
        found: dict[str, jax.Array],
        instability: MatchingInstability | None,
    ) -> None:
        on_host: dict[str, np.ndarray] = jax.device_get(found)
        coco.add(on_host["image_id"], on_host["scores"], on_host["labels"], on_host["boxes"])
        if instability is not None:
            vectors = match_vectors(on_host["assignment"], self._num_queries)
            instability.update(on_host["image_id"], vectors)

    def _result(self, coco: CocoEvaluator, instability: MatchingInstability | None) -> Evaluation:
        # The first process computes the figures for all.
        names = [*CocoEvaluator.METRICS, *_POINT]
        classes = [category["name"] for category in self._ground_truth["categories"]]
        C = len(classes)
        values = np.zeros(len(names) + C * (1 + len(CLASS_FIGURES)) + (C + 1) ** 2)
        matches = None
        if jax.process_index() == 0:
            matches = coco.matches()
            point = operating_point(matches)
            of_classes = class_figures(
                matches, point["threshold"], list(coco.recall_per_class().values())
            )
            values[:] = [
                *coco.metrics().values(),
                *(point[name] for name in _POINT),
                *coco.per_class().values(),
                *of_classes.T.ravel(),
                *matches.confusion(point["threshold"]).ravel(),
            ]
            classes = list(coco.per_class())
        values = all_gather(values)[0]
        scalars, values = np.split(values, [len(names)])
        by_class, confusion = np.split(values, [C * (1 + len(CLASS_FIGURES))])
        ap, *others = (
            dict(zip(classes, map(float, row), strict=True)) for row in by_class.reshape(-1, C)
        )
        metrics = dict(zip(names, map(float, scalars), strict=True))
        if instability is not None:
            changed = instability.finish(self._config.data.skip_bad).tolist()
            names = [f"instability_layer_{n}" for n in range(1, len(changed))] + ["instability"]
            found = dict(zip(names, changed, strict=False))  # nothing if no image was readable
            metrics |= {name: value for name, value in found.items() if not math.isnan(value)}
        return Evaluation(
            metrics,
            ap,
            dict(zip(CLASS_FIGURES, others, strict=True)),
            confusion.reshape(C + 1, C + 1).astype(np.int64),
            matches,
        )
