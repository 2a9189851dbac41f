"""Average precision and recall of detections, as the COCO benchmark defines them.

The numbers are those of pycocotools, to the last digit: its `COCOeval` does the matching, the
accumulation and the summary, this module turns a network's batches into what it reads. The optional
faster-coco-eval does the same in C++. Areas
(small below 32 x 32 pixels, large above 96 x 96) are in pixels of the original image.

Source: https://cocodataset.org/#detection-eval
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr_jax.errors import ConfigError, EvaluationError
from dn_detr_jax.evaluation.matches import Matches, match_detections

# In the order of COCOeval.stats: key, IoU thresholds, object sizes, detections per image and class
_SUMMARY = (
    ("AP", "0.50:0.95", "all", 100),
    ("AP50", "0.50", "all", 100),
    ("AP75", "0.75", "all", 100),
    ("APs", "0.50:0.95", "small", 100),
    ("APm", "0.50:0.95", "medium", 100),
    ("APl", "0.50:0.95", "large", 100),
    ("AR1", "0.50:0.95", "all", 1),
    ("AR10", "0.50:0.95", "all", 10),
    ("AR100", "0.50:0.95", "all", 100),
    ("ARs", "0.50:0.95", "small", 100),
    ("ARm", "0.50:0.95", "medium", 100),
    ("ARl", "0.50:0.95", "large", 100),
)


def coco_classes(backend: str) -> tuple[Any, Any]:
    """Returns the classes of a data set and of an evaluation, `COCO` and `COCOeval`.

    Args:
      backend: `config.eval.backend`, "pycocotools" or "faster-coco-eval".

    Raises:
      ConfigError: it is not installed.
    """
    if backend == "pycocotools":
        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError:
        expected = "'pycocotools', or pip install faster-coco-eval"
        raise ConfigError("eval.backend", backend, expected) from None
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


class CocoEvaluator:
    """Collects detections image by image, then computes the COCO metrics over all of them.

    Args:
      ground_truth: COCO json format: `images` with id, height and width, `annotations` with
        image_id, category_id and bbox (x, y, width, height in pixels), `categories` with id
        and name. `iscrowd` counts as 0 where it is missing, `area` as that of the box.
        Annotation ids are not used (pycocotools takes an object with id 0 for unmatched, so
        objects are renumbered). The dict is not changed.
      label_to_category: category id of each label; default: the order of `categories`. An entry
        that is no category of the ground truth means that the label stands for nothing (class
        0 of the 91 outputs of the official checkpoints).

      backend: `config.eval.backend`.

    Raises:
      ValueError: the ground truth lacks a part, or an image has no positive size or comes twice.
      ConfigError: the backend is not installed.
    """

    METRICS = tuple(key for key, *_ in _SUMMARY)

    def __init__(
        self,
        ground_truth: Mapping,
        label_to_category: Sequence[int] | None = None,
        backend: str = "pycocotools",
    ) -> None:
        self._coco, self._coco_eval = coco_classes(backend)
        self._images = _image_sizes(ground_truth)
        categories = [dict(category) for category in ground_truth["categories"]]
        if label_to_category is None:
            label_to_category = [category["id"] for category in categories]
        self._category_of_label = np.asarray(label_to_category, np.int64).reshape(-1)
        self._is_category = np.isin(
            self._category_of_label, [category["id"] for category in categories]
        )
        self._names = _distinct_names(categories)
        self._header = {
            "images": [dict(image) for image in ground_truth["images"]],
            "categories": categories,
        }
        self._ground_truth = [
            _object(number, annotation)
            for number, annotation in enumerate(ground_truth["annotations"], start=1)
        ]
        self._detections: dict[int, list[dict]] = {}
        self._result: COCOeval | None = None

    def add(
        self, image_ids: np.ndarray, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray
    ) -> None:
        """Takes the detections of a batch.

        An image that was added before is left as it was, so that an image that two processes
        evaluate counts once. Detections need no order and no threshold.

        Args:
          image_ids: int [B]; -1 marks the padding of a last partial batch and is dropped.
          scores: float [B, K], larger is surer.
          labels: int [B, K]; a label that is no category (-1 for an empty slot) is dropped.
          boxes: float [B, K, 4], cxcywh as a share of the image's height and width.

        Raises:
          ValueError: shapes that don't fit, an image that is not in the ground truth.
          EvaluationError: a score or box that is not finite.
        """
        image_ids, scores, labels, boxes = map(np.asarray, (image_ids, scores, labels, boxes))
        B, K = scores.shape if scores.ndim == 2 else (-1, -1)
        if image_ids.shape != (B,) or labels.shape != (B, K) or boxes.shape != (B, K, 4):
            raise ValueError(
                "expected image_ids [B], scores [B, K], labels [B, K] and boxes [B, K, 4], got "
                f"{image_ids.shape}, {scores.shape}, {labels.shape} and {boxes.shape}"
            )
        self._result = None
        for image_id, *detections in zip(image_ids.tolist(), scores, labels, boxes, strict=True):
            if image_id == -1 or image_id in self._detections:
                continue
            if image_id not in self._images:
                raise ValueError(
                    f"image {image_id} is not among the {len(self._images)} images of the ground "
                    "truth: the evaluation must read the data set that the annotations describe"
                )
            self._detections[image_id] = self._to_coco(image_id, *detections)

    def missing(self) -> int:
        """Counts the images of the ground truth that nothing was added for."""
        return len(self._images) - len(self._detections)

    def metrics(self) -> dict[str, float]:
        """The twelve COCO metrics, each 0 to 1, in the order of pycocotools' summary.

        AP, AP50, AP75, APs, APm, APl (precision) and AR1, AR10, AR100, ARs, ARm, ARl (recall). A
        metric without any object to find (no large objects in the data) is NaN, where pycocotools
        says -1, so that no mean or curve takes it for a value.
        """
        stats = self._evaluate().stats
        return {key: _or_nan(value) for (key, *_), value in zip(_SUMMARY, stats, strict=True)}

    def per_class(self) -> dict[str, float]:
        """AP (IoU 0.50:0.95, all sizes) by category name, in the order of the categories.

        NaN for a category without objects. A name that several categories share is followed by
        the category's id.
        """
        return self._by_class(self._evaluate().eval["precision"][:, :, :, 0, -1])

    def recall_per_class(self) -> dict[str, float]:
        """AR (IoU 0.50:0.95, all sizes, 100 detections) by category name, as `per_class`."""
        return self._by_class(self._evaluate().eval["recall"][:, None, :, 0, -1])

    def matches(self) -> Matches:
        """Matches detections with objects at an IoU of 0.5; labels follow `per_class`."""
        detections = {image_id: self._detections.get(image_id, []) for image_id in self._images}
        return match_detections(list(self._names), detections, self._ground_truth)

    def _by_class(self, values: np.ndarray) -> dict[str, float]:
        """Means of [IoU, recall, category] over what is measured, by category name."""
        category_ids = [int(category_id) for category_id in self._evaluate().params.catIds]
        means = {}
        for category_id, name in self._names.items():
            of_class = values[:, :, category_ids.index(category_id)]
            of_class = of_class[of_class > -1]
            means[name] = float(np.mean(of_class)) if of_class.size else math.nan
        return means

    def _to_coco(
        self, image_id: int, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray
    ) -> list[dict]:
        """Detections of one image as COCO results (without ids), those of no category left out."""
        known = (labels >= 0) & (labels < len(self._category_of_label))
        known[known] = self._is_category[labels[known]]
        scores = scores[known].astype(np.float64)
        boxes = boxes[known].astype(np.float64)
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise EvaluationError(
                f"a score or box of image {image_id} is not finite: the parameters are probably "
                "not finite either"
            )
        height, width = self._images[image_id]
        sizes = boxes[:, 2:] * (width, height)
        corners = boxes[:, :2] * (width, height) - sizes / 2
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": box[2] * box[3],
                "score": score,
            }
            for category_id, box, score in zip(
                self._category_of_label[labels[known]].tolist(),
                np.concatenate([corners, sizes], axis=1).tolist(),
                scores.tolist(),
                strict=True,
            )
        ]

    def _evaluate(self) -> COCOeval:
        """Runs the backend once over everything added so far."""
        if self._result is None:
            every = (d for of_image in self._detections.values() for d in of_image)
            detections = [{**detection, "id": n} for n, detection in enumerate(every, start=1)]
            with contextlib.redirect_stdout(io.StringIO()):
                result = self._coco_eval(
                    self._indexed(self._ground_truth), self._indexed(detections), "bbox"
                )
                result.evaluate()
                result.accumulate()
                result.summarize()
            self._result = result
        return self._result

    def _indexed(self, annotations: list[dict]) -> COCO:
        coco = self._coco()
        coco.dataset = {**self._header, "annotations": annotations}
        coco.createIndex()
        return coco


def format_table(
    metrics: Mapping[str, float], class_figures: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """The COCO summary as aligned text, with the figures of every class below it.

    Args:
      metrics: from `CocoEvaluator.metrics`; NaN is shown as a dash. With `class_figures` also those
        of `operating_points.operating_point`.
      class_figures: by name of the figure, then by class name; none shown by default.

    Returns:
      Lines without a final line break.
    """
    lines = []
    for key, iou, area, max_detections in _SUMMARY:
        kind = "Average Precision" if key.startswith("AP") else "Average Recall"
        lines.append(
            f"{kind:<17}  {key:<5} @[ IoU={iou:<9} | area={area:>6} | "
            f"maxDets={max_detections:>3} ] = {_three_digits(metrics[key])}"
        )
    if class_figures:
        lines += ["", _operating_point(metrics), "", *_class_table(class_figures)]
    return "\n".join(lines)


def _operating_point(metrics: Mapping[str, float]) -> str:
    """The threshold with the best F1, and what is measured there."""
    if math.isnan(metrics["threshold"]):
        return "Best F1 @[ IoU=0.50 ]: no detection finds an object"
    figures = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("precision", "recall", "F1"))
    return f"Best F1 @[ IoU=0.50 ] for scores from {metrics['threshold']:.3f}: {figures}"


def _class_table(class_figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row for each class, a column for each figure."""
    names = list(next(iter(class_figures.values())))
    width = max(map(len, ("class", *names)))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{figure:>5}" for figure in class_figures)])]
    for name in names:
        cells = [
            f"{_three_digits(by_class[name]):>{len(figure)}}"
            for figure, by_class in class_figures.items()
        ]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return lines


def _image_sizes(ground_truth: Mapping) -> dict[int, tuple[int, int]]:
    """(height, width) of every image of the ground truth, which is checked on the way."""
    absent = [part for part in ("images", "annotations", "categories") if part not in ground_truth]
    if absent:
        raise ValueError(
            f"the ground truth has no {' and no '.join(absent)}; the evaluation needs the COCO "
            f"json format, got the keys {sorted(ground_truth)}"
        )
    sizes: dict[int, tuple[int, int]] = {}
    for image in ground_truth["images"]:
        image_id, height, width = image["id"], image["height"], image["width"]
        if height <= 0 or width <= 0:
            raise ValueError(f"image {image_id} is {height} x {width} pixels in the ground truth")
        if image_id in sizes:
            raise ValueError(f"image {image_id} comes twice in the ground truth")
        sizes[image_id] = (height, width)
    return sizes


def _object(number: int, annotation: Mapping) -> dict:
    """What the evaluation reads of an annotation, under an id of our own."""
    width, height = annotation["bbox"][2:]
    return {
        "id": number,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": list(annotation["bbox"]),
        "area": annotation.get("area", width * height),
        "iscrowd": annotation.get("iscrowd", 0),
    }


def _distinct_names(categories: Sequence[Mapping]) -> dict[int, str]:
    """Category id -> name, with the id added to names that occur more than once."""
    names = [str(category.get("name", category["id"])) for category in categories]
    return {
        category["id"]: name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }


def _or_nan(value: float) -> float:
    return math.nan if value == -1 else float(value)


def _three_digits(value: float) -> str:
    return "  -  " if math.isnan(value) else f"{value:.3f}"
