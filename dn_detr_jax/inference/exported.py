"""Runs a detector that `python -m dn_detr_jax export` has written, with jax and NumPy alone.

This file imports nothing of its package and may be copied. (`pip install jax flatbuffers`:
`jax.export` reads its files with the latter.)

    detector = load_exported("detector.zip")
    image, size = detector.prepare(pixels)  # uint8 [height, width, 3], RGB, upright
    found = detector(image[None], size[None])
    height, width = pixels.shape[:2]
    boxes = found["boxes"][0] * [width, height, width, height]  # left, top, right, bottom
    names = [detector.classes[label]["name"] for label in found["labels"][0]]
    likely = found["scores"][0] >= detector.threshold

`prepare` resizes as the evaluation does. Another resize must give an image of
`target_size(height, width)` by bilinear interpolation with a filter that widens when the image
shrinks (Pillow's `Image.resize(..., BILINEAR)`, `jax.image.resize(..., "linear", antialias=True)`;
OpenCV's INTER_LINEAR does not widen and costs precision), in the upper left corner of a canvas of
zeros. Colors are RGB from 0 to 255; the program normalizes them itself.

`coco_results` gives the detections of an image as pycocotools' `loadRes` reads them.

A file is an uncompressed zip of the program in StableHLO (`jax.export`), the parameters as `.npy`
and `metadata.json`. Reading it runs none of its content.
"""

import json
import math
import os
import re
import zipfile
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT = 2  # of the file; one of format 1 has a batch size
# For these StableHLO has no operation. Other calls could be of addresses that the file names.
# jax itself replaces assertions on a symbolic batch before it compiles.
_HARMLESS_CALLS = {"mhlo.topk", "Sharding", "shape_assertion"}
METADATA, PROGRAM, PARAMS = "metadata.json", "program.stablehlo", "params/"


class ExportedError(ValueError):
    """A file that can't be used, or not on this platform. The message has path and cause."""

    def __init__(self, message: str):
        """Puts the message into one line; parts of it come from the file."""
        super().__init__(" ".join(message.split())[:2000])


def load_exported(path: str | os.PathLike) -> "ExportedDetector":
    """Reads a file of `python -m dn_detr_jax export`.

    Args:
      path: of the file.

    Returns:
      The detector, on jax's default device.

    Raises:
      ExportedError: no such file of this format, a damaged one, or none for this platform.
      OSError: it can't be opened.
    """
    path = os.fspath(path)
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = _metadata(path, archive)
            program = archive.read(PROGRAM)
            params = {
                name[len(PARAMS) : -len(".npy")]: _array(archive, name)
                for name in archive.namelist()
                if name.startswith(PARAMS)
            }
    except ExportedError:
        raise
    except Exception as error:  # a damaged file makes its readers raise many kinds of errors
        if isinstance(error, OSError) and error.filename is not None:  # it can't be opened
            raise
        raise ExportedError(
            f"{path}: not a file of dn_detr_jax export, or a damaged one ({_line(error)})"
        ) from error
    try:
        exported = jax.export.deserialize(bytearray(program))
        text = exported.mlir_module()
    except ImportError as error:
        raise ExportedError(f"{path}: can't be read here: {_line(error)}") from error
    except Exception as error:  # as does a file of another version
        raise ExportedError(
            f"{path}: exported with jax {metadata['versions']['jax']}, which jax "
            f"{jax.__version__} can't read ({_line(error)}); export it again"
        ) from error
    _check_program(path, metadata, exported, text, params)
    return ExportedDetector(metadata, exported, params)


def _metadata(path: str, archive: zipfile.ZipFile) -> dict[str, Any]:
    """Reads the metadata and checks format and platform."""
    metadata = json.loads(archive.read(METADATA))
    found = metadata["format"]
    if found not in (1, FORMAT):
        raise ExportedError(
            f"{path}: has format {found}, this loader reads formats 1 and {FORMAT}; take the "
            f"exported.py of dn_detr_jax {metadata['versions']['dn_detr_jax']}, or export it again"
        )
    here = jax.default_backend()
    here = {"gpu": "cuda or rocm"}.get(here, here)
    if not set(here.split(" or ")) & set(metadata["platforms"]):
        raise ExportedError(
            f"{path}: is for {', '.join(metadata['platforms'])}, but jax runs on {here} here; "
            "export it with --platforms for that"
        )
    sizes = [metadata[key] for key in ("num_select", "short_side", "max_long_side")]
    if metadata["batch_size"] is not None or found == 1:
        sizes.append(metadata["batch_size"])
    height, width = metadata["canvas"]
    if not all(type(size) is int and size > 0 for size in (*sizes, height, width)):
        raise ValueError(f"{METADATA}: sizes {[*sizes, height, width]}, expected numbers above 0")
    if not all(isinstance(label["name"], str) for label in metadata["classes"]):
        raise ValueError(f"{METADATA}: classes without a name")
    if not 0 <= metadata.get("threshold", 0.5) <= 1:
        raise ValueError(f"{METADATA}: threshold {metadata['threshold']}, expected 0 to 1")
    str(metadata["versions"]["jax"])
    return metadata


def _check_program(
    path: str,
    metadata: dict[str, Any],
    exported: jax.export.Exported,
    text: str,
    params: dict[str, np.ndarray],
) -> None:
    """Raises unless the program takes these parameters and images, and calls nothing outside."""
    batch, canvas = metadata["batch_size"], metadata["canvas"]
    images = np.empty((0, *canvas, 3), np.uint8), np.empty((0, 2), np.int32)
    described = [(value.shape, value.dtype) for value in jax.tree.leaves(params)]
    wanted = [(aval.shape, aval.dtype) for aval in exported.in_avals]
    if batch is None and wanted:  # any number has a name
        batch = wanted[-1][0][0]
        if isinstance(batch, int):
            raise ExportedError(f"{path}: damaged: its program is for {batch} images")
    described += [((batch, *value.shape[1:]), value.dtype) for value in images]
    structure: Any = jax.tree.structure(((params, *images), {}))
    found = [aval.shape for aval in exported.out_avals]  # boxes, labels, scores
    rows = (batch, metadata["num_select"])
    fits = described == wanted and found == [(*rows, 4), rows, rows]
    if not fits or structure != exported.in_tree:
        raise ExportedError(
            f"{path}: damaged: its program is not for the {len(params)} parameters, and the "
            f"images and detections of {METADATA}; export it again"
        )
    calls = set(re.findall(r"custom_call @([\w.$]+)", text))
    if calls - _HARMLESS_CALLS:
        named = ", ".join(sorted(calls - _HARMLESS_CALLS))
        raise ExportedError(f"{path}: its program calls {named}, which no detector needs")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class ExportedDetector:
    """A compiled detector for images on a canvas (padding bucket); see `load_exported`.

    Attributes:
      canvas: height and width.
      batch_size: images per call of the program; a call with another number is split and filled.
        None: any number, and the program is compiled for each.
      num_select: K, detections per image.
      classes: {"id", "name"} of every label; the name of an unused label is "".
      threshold: the score with the best F1 in the evaluation of the checkpoint, 0.5 without one: a
        lowest score for those who need one. The detections have all scores.
      metadata: the above, platforms, versions and checkpoint.
    """

    def __init__(
        self, metadata: dict[str, Any], exported: jax.export.Exported, params: dict[str, np.ndarray]
    ):
        """See `load_exported`."""
        self.metadata = metadata
        self.canvas: tuple[int, int] = tuple(metadata["canvas"])
        self.batch_size: int | None = metadata["batch_size"]
        self.num_select: int = metadata["num_select"]
        self.classes: list[dict[str, Any]] = metadata["classes"]
        self.threshold: float = metadata.get(
            "threshold", 0.5
        )  # files of earlier versions have none
        self._params = jax.device_put(params)
        self._program = jax.jit(exported.call)

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Detects objects. The first call compiles.

        Args:
          images: uint8 [B, H, W, 3], RGB, (H, W) the canvas; each image in the upper left
            corner; what surrounds it is ignored.
          sizes: int [B, 2], height and width of each image on its canvas, from 1.

        Returns:
          `scores` float32 [B, K], 0 to 1, descending; `labels` int32 [B, K], positions in
          `classes`; `boxes` float32 [B, K, 4], left, top, right, bottom as shares of the image's
          width and height, 0 to 1 and a little beyond.

        Raises:
          ValueError: wrong shapes, types or sizes.
        """
        images, sizes = np.asarray(images), np.asarray(sizes)
        count = len(images)
        if images.dtype != np.uint8 or images.shape != (count, *self.canvas, 3):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}, expected uint8 "
                f"{[count, *self.canvas, 3]}"
            )
        if sizes.shape != (count, 2) or sizes.dtype.kind not in "iu":
            raise ValueError(
                f"sizes are {sizes.dtype}{list(sizes.shape)}, expected int {[count, 2]}"
            )
        if ((sizes < 1) | (sizes > self.canvas)).any():
            raise ValueError(f"sizes of {sizes.tolist()}, expected 1 to {self.canvas}")
        parts = []
        size = self.batch_size or max(count, 1)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            filled = size - len(images[rows])
            batch = np.pad(images[rows], [(0, filled), (0, 0), (0, 0), (0, 0)])
            extents = np.pad(sizes[rows], [(0, filled), (0, 0)], constant_values=1)
            found = self._program(self._params, batch, extents.astype(np.int32))
            parts.append((found, size - filled))
        empty = {
            "scores": np.zeros((0, self.num_select), np.float32),
            "labels": np.zeros((0, self.num_select), np.int32),
            "boxes": np.zeros((0, self.num_select, 4), np.float32),
        }
        return {
            name: np.concatenate([none, *(np.asarray(found[name])[:n] for found, n in parts)])
            for name, none in empty.items()
        }

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of an image on the canvas, reduced if it does not fit."""
        short, long = min(height, width), max(height, width)
        target = self.metadata["short_side"]
        limit = self.metadata["max_long_side"]
        if long * target > limit * short:
            target = round(limit * short / long)
        target = max(target, 1)
        other = min(target * long // short, limit)
        size = (target, other) if height <= width else (other, target)
        factor = min(1.0, self.canvas[0] / size[0], self.canvas[1] / size[1])
        if factor < 1.0:
            size = tuple(max(1, math.floor(side * factor + 1e-6)) for side in size)
        return min(size[0], self.canvas[0]), min(size[1], self.canvas[1])

    def prepare(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Resizes an image and pads it to the canvas.

        Args:
          pixels: uint8 [height, width, 3], RGB, upright.

        Returns:
          uint8 [H, W, 3] and int32 [2], a row of the detector's arguments.

        Raises:
          ValueError: not such an array.
        """
        pixels = np.asarray(pixels)
        good = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
        if not good or pixels.dtype != np.uint8:
            raise ValueError(
                f"an image {pixels.dtype}{list(pixels.shape)}, expected uint8 [height, width, 3]"
            )
        height, width = self.target_size(*pixels.shape[:2])
        columns_first = _resized(pixels.swapaxes(0, 1), width).swapaxes(0, 1)
        image = np.zeros((*self.canvas, 3), np.uint8)
        image[:height, :width] = _resized(columns_first, height)
        return image, np.array([height, width], np.int32)

    def coco_results(
        self,
        found: dict[str, np.ndarray],
        row: int,
        image_id: int,
        size: tuple[int, int],
        category_ids: dict[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the detections of an image in COCO's format of results.

        Args:
          found: what the detector has returned.
          row: of the image in it.
          image_id: as in the annotation file.
          size: height and width of the image, in whose pixels the boxes are.
          category_ids: id of every class name, for an annotation file that numbers the classes
            differently from `classes`.

        Returns:
          {"image_id", "category_id", "bbox": [left, top, width, height], "score"} per detection,
          without those of unused labels.

        Raises:
          KeyError: a class name that `category_ids` lacks.
        """
        height, width = size
        results = []
        parts = (found[name][row] for name in ("scores", "labels", "boxes"))
        for score, label, box in zip(*parts, strict=True):
            category = self.classes[label]
            if not category["name"]:
                continue
            corners = box.astype(np.float64) * [width, height, width, height]
            left, top, right, bottom = corners.tolist()
            category_id = category["id"]
            if category_ids is not None:
                category_id = category_ids[category["name"]]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [left, top, right - left, bottom - top],
                    "score": float(score),
                }
            )
        return results


def _resized(image: np.ndarray, length: int) -> np.ndarray:
    """Resizes an image [n, m, 3] to [length, m, 3] by a triangle filter, uint8."""
    if length == len(image):
        return image
    scale = len(image) / length
    support = max(scale, 1.0)  # half the width of the filter in pixels
    centers = (np.arange(length) + 0.5) * scale
    taps = np.floor(centers - support)[:, None].astype(int) + np.arange(2 * math.ceil(support) + 1)
    weights = np.maximum(0.0, 1.0 - np.abs(taps + 0.5 - centers[:, None]) / support)
    weights[(taps < 0) | (taps >= len(image))] = 0.0
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    taps = taps.clip(0, len(image) - 1)
    total = np.zeros((length, *image.shape[1:]), np.float32)
    for k in range(taps.shape[1]):
        total += weights[:, k, None, None] * image[taps[:, k]]
    return (total + 0.5).clip(0, 255).astype(np.uint8)
