"""Detections as text files in the form of YOLO, and objects as images of their own."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.files import write_text_atomically
from dn_detr_jax.inference.detections import Detections
from dn_detr_jax.visualize.save import save_jpeg


class OtherOutputs:
    """Writes what is wanted beside the records and the drawn images."""

    def __init__(self, out: Path, categories: Sequence[Category], txt: bool, crops: bool):
        """Writes nothing yet.

        Args:
          out: folder for the results.
          categories: the classes, by label.
          txt: whether to write `labels/STEM.txt` in YOLO's form, and `data.yaml` with the classes.
          crops: whether to write each object as `crops/CLASS/STEM_NUMBER.jpg`.
        """
        self._out, self._categories, self._txt, self._crops = out, categories, txt, crops
        self._numbers: dict[int, int] | None = None

    def write(self, stem: str, pixels: np.ndarray, found: Detections) -> None:
        """Writes the files of an image or a frame, of pixels uint8 [H, W, 3]."""
        if self._txt:
            if self._numbers is None:
                self._numbers = _write_class_names(self._categories, self._out)
            _write_yolo(found, self._numbers, self._out / "labels" / f"{stem}.txt")
        if self._crops:
            _save_cropped(found, pixels, self._out / "crops", stem)


def _write_class_names(categories: Sequence[Category], out: Path) -> dict[int, int]:
    """Writes `data.yaml` with the names of the classes.

    Returns:
      The class number in the text files by label; labels without a name have none.
    """
    labels = [label for label, category in enumerate(categories) if category.name]
    names = dict(enumerate(categories[label].name for label in labels))
    text = yaml.safe_dump({"names": names}, allow_unicode=True, sort_keys=False)
    write_text_atomically(out / "data.yaml", text)
    return {label: number for number, label in enumerate(labels)}


def _write_yolo(found: Detections, numbers: dict[int, int], path: Path) -> None:
    """Writes the detections of an image in YOLO's form: class, x, y, width, height, score.

    Args:
      found: the detections; boxes are cut at the edges of the image, and those outside left out.
      numbers: of the classes, by label.
      path: of the text file; it is empty without detections.
    """
    height, width = found.size
    lines = []
    for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
        left, top, right, bottom = box.clip(0, [width, height, width, height]).tolist()
        if right <= left or bottom <= top:
            continue
        center = (left + right) / 2 / width, (top + bottom) / 2 / height
        values = (*center, (right - left) / width, (bottom - top) / height, float(score))
        lines.append(f"{numbers[int(label)]} " + " ".join(f"{value:.6f}" for value in values))
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def _save_cropped(found: Detections, pixels: np.ndarray, folder: Path, stem: str) -> None:
    """Writes each object as `folder/CLASS/STEM_NUMBER.jpg`, numbered by descending score.

    Args:
      found: the detections; an object without a whole pixel in the image is left out.
      pixels: uint8 [H, W, 3] of the image.
      folder: for the folders of the classes.
      stem: of the names.
    """
    height, width = found.size
    for number, (box, name) in enumerate(zip(found.boxes, found.class_names, strict=True)):
        left, top = np.floor(box[:2].clip(0, [width, height])).astype(int)
        right, bottom = np.ceil(box[2:].clip(0, [width, height])).astype(int)
        if right > left and bottom > top:
            path = folder / (re.sub(r"[^\w -]", "_", name).strip() or "_")
            save_jpeg(pixels[top:bottom, left:right], path / f"{stem}_{number}.jpg")
