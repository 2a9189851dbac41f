"""Runs a detector that `python -m dn_detr_jax export` has written, with jax and NumPy alone.

This file needs nothing of its package and may be copied. (`pip install jax flatbuffers`: the latter
is what `jax.export` reads its files with.)

    detector = load_exported("detector.zip")
    image, size = detector.prepare(picture)  # uint8 [height, width, 3], RGB, upright
    found = detector(image[None], size[None])
    height, width = picture.shape[:2]
    boxes = found["boxes"][0] * [width, height, width, height]  # left, top, right, bottom
    names = [detector.classes[label]["name"] for label in found["labels"][0]]

`prepare` resizes as the evaluation does. A resize of one's own has to give a picture of
`target_size(height, width)` by bilinear interpolation whose filter widens where the picture shrinks
(Pillow's `Image.resize(..., BILINEAR)`, `jax.image.resize(..., "linear", antialias=True)`;
OpenCV's INTER_LINEAR does not widen and costs precision), in its upper left corner a canvas of
zeros. Colours are RGB from 0 to 255; the program normalises them itself.

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

FORMAT = 1  # of the file
# What StableHLO has no operation for. Other calls could be of addresses that the file names.
_HARMLESS_CALLS = {"mhlo.topk", "Sharding"}
METADATA, PROGRAM, PARAMS = "metadata.json", "program.stablehlo", "params/"


class ExportedError(ValueError):
    """A file that can't be used, or not here; one line with path and cause."""

    def __init__(self, message: str):
        """Takes the message, of which parts come from the file, into one line."""
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
    except Exception as error:  # whatever a damaged file leads its readers to
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
    except Exception as error:  # whatever the reader of another version runs into
        raise ExportedError(
            f"{path}: exported with jax {metadata['versions']['jax']}, which jax "
            f"{jax.__version__} can't read ({_line(error)}); export it again"
        ) from error
    _check_program(path, metadata, exported, text, params)
    return ExportedDetector(metadata, exported, params)


def _metadata(path: str, archive: zipfile.ZipFile) -> dict[str, Any]:
    """The metadata, once format and platform are known to be right."""
    metadata = json.loads(archive.read(METADATA))
    found = metadata["format"]
    if found != FORMAT:
        raise ExportedError(
            f"{path}: has format {found}, this loader reads format {FORMAT}; take the exported.py "
            f"of dn_detr_jax {metadata['versions']['dn_detr_jax']}, or export it again"
        )
    here = jax.default_backend()
    here = {"gpu": "cuda or rocm"}.get(here, here)
    if not set(here.split(" or ")) & set(metadata["platforms"]):
        raise ExportedError(
            f"{path}: is for {', '.join(metadata['platforms'])}, but jax runs on {here} here; "
            "export it with --platforms for that"
        )
    sizes = [metadata[key] for key in ("batch_size", "num_select", "short_side", "max_long_side")]
    height, width = metadata["canvas"]
    if not all(type(size) is int and size > 0 for size in (*sizes, height, width)):
        raise ValueError(f"{METADATA}: sizes {[*sizes, height, width]}, expected numbers above 0")
    if not all(isinstance(label["name"], str) for label in metadata["classes"]):
        raise ValueError(f"{METADATA}: classes without a name")
    str(metadata["versions"]["jax"])
    return metadata


def _check_program(
    path: str,
    metadata: dict[str, Any],
    exported: jax.export.Exported,
    text: str,
    params: dict[str, np.ndarray],
) -> None:
    """Raises unless the program takes these parameters and pictures, and calls nothing outside."""
    batch, canvas = metadata["batch_size"], metadata["canvas"]
    pictures = np.empty((0, *canvas, 3), np.uint8), np.empty((0, 2), np.int32)
    described = [(value.shape, value.dtype) for value in jax.tree.leaves(params)]
    described += [((batch, *value.shape[1:]), value.dtype) for value in pictures]
    wanted = [(aval.shape, aval.dtype) for aval in exported.in_avals]
    structure = jax.tree.structure(((params, *pictures), {}))
    found = [aval.shape for aval in exported.out_avals]  # boxes, labels, scores
    rows = (batch, metadata["num_select"])
    fits = described == wanted and found == [(*rows, 4), rows, rows]
    if not fits or structure != exported.in_tree:
        raise ExportedError(
            f"{path}: damaged: its program is not for the {len(params)} parameters, and the "
            f"pictures and detections of {METADATA}; export it again"
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
    """A compiled detector for pictures on a canvas; see `load_exported`.

    Attributes:
      canvas: height and width.
      batch_size: pictures per call of the program; a call with another number is split and filled.
      num_select: K, detections per picture.
      classes: {"id", "name"} of every label; the name is "" where a label stands for nothing.
      metadata: all that is known of it: the above, platforms, versions, checkpoint.
    """

    def __init__(
        self, metadata: dict[str, Any], exported: jax.export.Exported, params: dict[str, np.ndarray]
    ):
        """See `load_exported`."""
        self.metadata = metadata
        self.canvas: tuple[int, int] = tuple(metadata["canvas"])
        self.batch_size: int = metadata["batch_size"]
        self.num_select: int = metadata["num_select"]
        self.classes: list[dict[str, Any]] = metadata["classes"]
        self._params = jax.device_put(params)
        self._program = jax.jit(exported.call)

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Detects objects. The first call compiles.

        Args:
          images: uint8 [B, H, W, 3], RGB, (H, W) the canvas; each picture in the upper left
            corner, what is around it does not count.
          sizes: int [B, 2], height and width of each picture on its canvas, from 1.

        Returns:
          `scores` float32 [B, K], 0 to 1, descending; `labels` int32 [B, K], positions in
          `classes`; `boxes` float32 [B, K, 4], left, top, right, bottom as shares of the picture's
          width and height, 0 to 1 and a little beyond.

        Raises:
          ValueError: shapes, types or sizes that don't fit.
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
        for start in range(0, count, self.batch_size):
            rows = slice(start, start + self.batch_size)
            filled = self.batch_size - len(images[rows])
            batch = np.pad(images[rows], [(0, filled), (0, 0), (0, 0), (0, 0)])
            extents = np.pad(sizes[rows], [(0, filled), (0, 0)], constant_values=1)
            found = self._program(self._params, batch, extents.astype(np.int32))
            parts.append((found, self.batch_size - filled))
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
        """Height and width of a picture on the canvas: those of the evaluation, or what fits."""
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

    def prepare(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Resizes a picture and lays it on the canvas.

        Args:
          picture: uint8 [height, width, 3], RGB, upright.

        Returns:
          uint8 [H, W, 3] and int32 [2], a row of what the detector is called with.

        Raises:
          ValueError: not such an array.
        """
        picture = np.asarray(picture)
        good = picture.ndim == 3 and picture.shape[2] == 3 and picture.size
        if not good or picture.dtype != np.uint8:
            raise ValueError(
                f"a picture {picture.dtype}{list(picture.shape)}, expected uint8 [height, width, 3]"
            )
        height, width = self.target_size(*picture.shape[:2])
        columns_first = _resized(picture.swapaxes(0, 1), width).swapaxes(0, 1)
        image = np.zeros((*self.canvas, 3), np.uint8)
        image[:height, :width] = _resized(columns_first, height)
        return image, np.array([height, width], np.int32)


def _resized(image: np.ndarray, length: int) -> np.ndarray:
    """A picture [n, m, 3] resized to [length, m, 3] by a triangle filter, uint8."""
    if length == len(image):
        return image
    scale = len(image) / length
    support = max(scale, 1.0)  # pixels to either side that count
    centres = (np.arange(length) + 0.5) * scale
    taps = np.floor(centres - support)[:, None].astype(int) + np.arange(2 * math.ceil(support) + 1)
    weights = np.maximum(0.0, 1.0 - np.abs(taps + 0.5 - centres[:, None]) / support)
    weights[(taps < 0) | (taps >= len(image))] = 0.0
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    taps = taps.clip(0, len(image) - 1)
    total = np.zeros((length, *image.shape[1:]), np.float32)
    for k in range(taps.shape[1]):
        total += weights[:, k, None, None] * image[taps[:, k]]
    return (total + 0.5).clip(0, 255).astype(np.uint8)
