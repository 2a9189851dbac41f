"""The labels of a split as those of a run that numbers the same classes differently."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from dn_detr_jax.checkpoints.categories import match_labels, matched_categories
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import Dataset
from dn_detr_jax.data.records import Example, RandomAccess

logger = logging.getLogger(__name__)


def with_labels_of_run(dataset: Dataset, run: Sequence[Category], run_name: str) -> Dataset:
    """Returns a split whose labels are those of a run, matched by class name.

    Args:
      dataset: the split.
      run: categories of the run by label.
      run_name: of the run, for messages.

    Returns:
      `dataset` itself if its labels are those of the run; else one with the same images, in which
      labels and `categories` follow the run. Category ids stay those of the data.

    Raises:
      CheckpointError: the classes differ; the message names those that do.
    """
    data_name = str(dataset.annotation_file or f"the data {dataset.name!r}")
    labels = match_labels(run, dataset.categories, run_name, data_name)
    categories = matched_categories(run, dataset.categories, labels)
    if categories == dataset.categories:
        return dataset
    logger.warning(
        "%s numbers its classes differently from %s: labels are matched by class name",
        data_name,
        run_name,
    )
    return relabeled(dataset, labels, categories)


def relabeled(dataset: Dataset, labels: Sequence[int], categories: Sequence[Category]) -> Dataset:
    """Returns a split with other labels.

    Args:
      dataset: the split.
      labels: the new label of each label.
      categories: by new label.
    """
    source = _Relabeled(dataset.source, np.array(labels, np.int32))
    return dataclasses.replace(dataset, source=source, categories=tuple(categories))


@dataclasses.dataclass(frozen=True)
class _Relabeled:
    """Examples with other labels; can be pickled if their source can.

    Attributes:
      source: of the examples.
      labels: int32 [K], the new label of each label.
    """

    source: RandomAccess[Example]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Example:
        example = self.source[position]
        return dataclasses.replace(example, labels=self.labels[example.labels])
