"""Which detection finds which object at an IoU of 0.5, and the confusion matrix that follows.

The matching is that of COCO: in every image and class the detections, best score first, take the
object of the largest IoU that no better one has taken. A detection that only fits a crowd region
counts neither as right nor as wrong. `COCOeval` keeps no matches that both of its
implementations give, and none between classes, so they are found here.

Source: https://cocodataset.org/#detection-eval
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pycocotools import mask

IOU = 0.5
_MOST = 100  # detections per image and class, as in AP
_LARGEST = 1e10  # square pixels; COCOeval ignores larger objects


@dataclasses.dataclass(frozen=True)
class Matches:
    """The matched detections and objects of a split.

    Attributes:
      num_classes: C.
      labels: int [n], position of each detection's class among the categories.
      scores: float [n], descending.
      found: int [n], position of the object that a detection finds; -1: none.
      ignored: bool [n], the detection fits a crowd region alone.
      images: int [n], image id.
      boxes: float [n, 4], left, top, width, height in pixels.
      object_labels: int [m], of the objects.
      object_images: int [m].
      object_boxes: float [m, 4].
      object_ignored: bool [m], crowd regions: they need not be found.
    """

    num_classes: int
    labels: np.ndarray
    scores: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    object_labels: np.ndarray
    object_images: np.ndarray
    object_boxes: np.ndarray
    object_ignored: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """bool [n]: the detection finds an object of its class."""
        return (self.found >= 0) & ~self.ignored

    @property
    def counts(self) -> np.ndarray:
        """int [C], objects to find of each class."""
        return np.bincount(
            self.object_labels[~self.object_ignored], minlength=self.num_classes
        ).astype(np.int64)

    def confusion(self, threshold: float) -> np.ndarray:
        """Counts objects (rows) by the class that they are detected as (columns).

        An object and a detection of its class that finds it are on the diagonal, which therefore
        holds the true positives of precision and recall. The detections and objects that remain are
        matched across classes, best score first, at an IoU of at least 0.5. The last column has
        the objects that nothing detects, the last row the detections that fit no object.

        Args:
          threshold: lowest score of a detection that counts.

        Returns:
          int [C + 1, C + 1]. A row sums to the objects of its class, a column to the detections of
          its class; ignored ones are left out.
        """
        C = self.num_classes
        shown = (self.scores >= threshold) & ~self.ignored
        hit = shown & self.correct
        taken = np.zeros(len(self.object_labels), bool)
        taken[self.found[hit]] = True
        free = ~taken & ~self.object_ignored
        predicted, true = self.labels.copy(), np.full(len(self.labels), C)
        true[hit] = self.object_labels[self.found[hit]]
        others = np.flatnonzero(shown & ~hit)
        for rows, objects in _by_image(
            (self.images, others), (self.object_images, np.flatnonzero(free))
        ):
            overlaps = _overlaps(
                self.boxes[rows], self.object_boxes[objects], np.zeros(len(objects))
            )
            for row, overlap in zip(rows, overlaps, strict=True):
                best = int(overlap.argmax())
                if overlap[best] >= IOU:
                    true[row] = self.object_labels[objects[best]]
                    overlaps[:, best] = -1
                    free[objects[best]] = False
        counted = np.zeros((C + 1, C + 1), np.int64)
        np.add.at(counted, (true[shown], predicted[shown]), 1)
        np.add.at(counted, (self.object_labels[free], C), 1)
        return counted


def match_detections(
    category_ids: Sequence[int],
    detections: Mapping[int, Sequence[Mapping]],
    annotations: Iterable[Mapping],
) -> Matches:
    """Matches detections with the objects of their image and class.

    Args:
      category_ids: of the classes; positions here are the labels of the result. Others are left
        out.
      detections: COCO results by image id: `category_id`, `bbox` and `score`; every image of the
        split, with or without detections.
      annotations: COCO annotations with `iscrowd` and `area`; those of other images are left out.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    objects = [
        a for a in annotations if a["category_id"] in label_of and a["image_id"] in detections
    ]
    table = {
        "object_labels": _array([label_of[a["category_id"]] for a in objects], np.int64),
        "object_images": _array([a["image_id"] for a in objects], np.int64),
        "object_boxes": _array([a["bbox"] for a in objects], np.float64).reshape(-1, 4),
        "object_ignored": _array(
            [bool(a["iscrowd"]) or not 0 <= a["area"] <= _LARGEST for a in objects], bool
        ),
    }
    crowd = _array([a["iscrowd"] for a in objects], bool)
    of_image: dict[int, list[int]] = {}
    for number, annotation in enumerate(objects):
        of_image.setdefault(annotation["image_id"], []).append(number)
    parts = []
    for image_id in sorted(detections):  # COCOeval's order, which decides between equal scores
        part = _counted(detections[image_id], label_of)
        rows = _array(of_image.get(image_id, []), np.int64)
        found = _match(
            part["labels"],
            part["boxes"],
            table["object_labels"][rows],
            table["object_boxes"][rows],
            table["object_ignored"][rows],
            crowd[rows],
        )
        hit = found >= 0
        found[hit] = rows[found[hit]]
        part |= {"found": found, "images": np.full(len(found), image_id)}
        parts.append(part)
    names = ("labels", "scores", "boxes", "found", "images")
    empty = _counted([], label_of) | {"found": _array([], np.int64), "images": _array([], np.int64)}
    every = {name: np.concatenate([part[name] for part in (empty, *parts)]) for name in names}
    order = np.argsort(-every["scores"], kind="stable")
    every = {name: values[order] for name, values in every.items()}
    ignored = np.append(table["object_ignored"], False)[every["found"]]
    return Matches(num_classes=len(category_ids), ignored=ignored, **every, **table)


def _counted(detections: Sequence[Mapping], label_of: Mapping[int, int]) -> dict[str, np.ndarray]:
    """The detections of an image that count, best score first: at most 100 of each class."""
    kept = [d for d in detections if d["category_id"] in label_of]
    scores = _array([d["score"] for d in kept], np.float64)
    labels = _array([label_of[d["category_id"]] for d in kept], np.int64)
    boxes = _array([d["bbox"] for d in kept], np.float64).reshape(-1, 4)
    order = np.argsort(-scores, kind="stable")
    if len(order) > _MOST:
        best = [order[labels[order] == label][:_MOST] for label in np.unique(labels)]
        order = order[np.isin(order, np.concatenate(best))]
    return {"scores": scores[order], "labels": labels[order], "boxes": boxes[order]}


def _match(
    labels: np.ndarray,
    boxes: np.ndarray,
    object_labels: np.ndarray,
    object_boxes: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
) -> np.ndarray:
    """Matches the detections of an image, best score first, within classes.

    Returns:
      int [n], position of the object; -1: none. Crowd regions may be matched repeatedly.
    """
    found = np.full(len(labels), -1)
    overlaps = _overlaps(boxes, object_boxes, crowd)
    fits = (overlaps >= IOU) & (labels[:, None] == object_labels)
    taken = np.zeros(len(object_labels), bool)
    for row in np.flatnonzero(fits.any(axis=1)):
        free = fits[row] & ~(taken & ~crowd)
        real = free & ~ignored
        allowed = real if real.any() else free
        if allowed.any():
            # Of equal overlaps COCOeval takes the last.
            best = np.flatnonzero(allowed)[::-1]
            found[row] = best[overlaps[row, best].argmax()]
            taken[found[row]] = True
    return found


def _overlaps(boxes: np.ndarray, object_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [n, m]; with a crowd region, the share of the detection that lies in it."""
    if not len(boxes) or not len(object_boxes):
        return np.zeros((len(boxes), len(object_boxes)))
    return mask.iou(boxes, object_boxes, crowd.astype(np.uint8))


def _by_image(
    detections: tuple[np.ndarray, np.ndarray], objects: tuple[np.ndarray, np.ndarray]
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Pairs rows of detections with rows of objects for every image that has both.

    Each argument has the image ids of all rows, and the rows that are meant.
    """
    (images, rows), (object_images, object_rows) = detections, objects
    for image in np.intersect1d(images[rows], object_images[object_rows]):
        yield rows[images[rows] == image], object_rows[object_images[object_rows] == image]


def _array(values: Sequence, dtype: type) -> np.ndarray:
    return np.array(values, dtype)
