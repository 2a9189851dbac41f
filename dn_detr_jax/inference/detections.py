"""The objects found in an image, and their forms for other libraries."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dn_detr_jax.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas
    import supervision


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects found in an image, in descending order of their scores.

    Attributes:
      boxes: float32 [n, 4], left, top, right, bottom in pixels of the upright image. They may
        reach beyond its edges.
      scores: float32 [n], 0 to 1, descending.
      labels: int32 [n], class outputs of the model.
      category_ids: int64 [n], the classes' ids in the data that the model was trained on.
      class_names: n of them.
      size: height and width of the upright image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    category_ids: np.ndarray
    class_names: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Returns the detections in COCO's format of results, for pycocotools' `loadRes`.

        Args:
          image_id: as in the annotation file.

        Returns:
          {"image_id", "category_id", "bbox": [left, top, width, height], "score"} per detection.
        """
        bboxes = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        return [
            {
                "image_id": image_id,
                "category_id": int(category_id),
                "bbox": [_shortest(value) for value in bbox],
                "score": _shortest(score),
            }
            for category_id, bbox, score in zip(self.category_ids, bboxes, self.scores, strict=True)
        ]

    def to_supervision(self) -> "supervision.Detections":
        """Returns the detections for supervision's trackers, annotators and metrics.

        `class_id` has the labels, `confidence` the scores; `data` has "class_name" and
        "category_id".

        Raises:
          MissingPackageError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise MissingPackageError("Detections.to_supervision", "supervision") from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={
                "class_name": np.array(self.class_names, dtype=str),
                "category_id": self.category_ids,
            },
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns a table with a row per detection.

        Its columns are xmin, ymin, xmax, ymax, score, label, category_id and class_name.

        Raises:
          MissingPackageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError("Detections.to_pandas", "pandas") from error
        corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), self.boxes.T, strict=True))
        others = {
            "score": self.scores,
            "label": self.labels,
            "category_id": self.category_ids,
            "class_name": pandas.Series(self.class_names, dtype=object),
        }
        return pandas.DataFrame(corners | others)


def _shortest(value: np.float32) -> float:
    """The number whose text is the shortest that stands for this float32."""
    return float(str(value))
