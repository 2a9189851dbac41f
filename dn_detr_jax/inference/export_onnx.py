"""Writes a detector as ONNX, by jax2onnx, and compares it with the detector before it is kept.

The file takes `images` uint8 [B, H, W, 3] and `sizes` int32 [B, 2] and returns `boxes`, `labels`
and `scores`, as the detectors of `inference.exported` do. Its metadata (`metadata_props`) has the
classes, the step and the threshold, texts in JSON.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dn_detr_jax.boxes import cxcywh_to_xyxy
from dn_detr_jax.errors import ExportError, MissingPackageError, short_reason
from dn_detr_jax.evaluation.detect import detect
from dn_detr_jax.files import replace_atomically
from dn_detr_jax.inference.onnx_form import in_onnx_form
from dn_detr_jax.inference.predictor import Run
from dn_detr_jax.models.registry import build_model

TOLERANCE = 1e-3  # of scores and of boxes as shares of the image
_INPUTS, _OUTPUTS = ("images", "sizes"), ("boxes", "labels", "scores")
_PACKAGES = '"dn_detr_jax[onnx]" && pip install --no-deps jax2onnx'


def require_packages() -> None:
    """Raises `MissingPackageError` if jax2onnx or onnxruntime is not installed."""
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("--format=onnx", _PACKAGES) from error


def export_onnx(
    run: Run,
    path: str | os.PathLike,
    *,
    canvas: tuple[int, int],
    batch_size: int | None = 1,
) -> float:
    """Writes the detector of a run as ONNX.

    Args:
      run: config, classes and parameters.
      path: of the file, which is written completely or not at all.
      canvas: height and width.
      batch_size: images per call; None: any number.

    Returns:
      The largest difference of a score or box from those of the detector, see `difference`.

    Raises:
      MissingPackageError: a package is missing.
      ExportError: the detector can't be converted, or onnxruntime computes something else.
      OSError: the file can't be written.
    """
    require_packages()
    import onnx

    model = build_model(run.config.model)

    def program(images, sizes):
        found = detect(run.params, images, sizes, model=model, config=run.config)
        return [cxcywh_to_xyxy(found["boxes"]), found["labels"], found["scores"]]

    converted = _convert(program, canvas, batch_size)
    classes = [{"id": category.id, "name": category.name} for category in run.categories]
    entries = {"classes": json.dumps(classes), "step": str(run.step)}
    entries["threshold"] = repr(run.threshold)
    onnx.helper.set_model_props(converted, entries)
    with replace_atomically(path) as unfinished:
        onnx.save(converted, unfinished)
        found = _difference_of_file(program, unfinished, canvas, batch_size)
        if not found <= TOLERANCE:
            raise ExportError(
                f"{os.fspath(path)}: not written: in onnxruntime the detections differ by "
                f"{found:.1e}, more than {TOLERANCE:.0e}"
            )
    return found


def _convert(program: Callable[..., Any], canvas: tuple[int, int], batch_size: int | None) -> Any:
    import jax2onnx

    batch = jax.export.symbolic_shape("batch")[0] if batch_size is None else batch_size
    shapes = [
        jax.ShapeDtypeStruct((batch, *canvas, 3), np.uint8),
        jax.ShapeDtypeStruct((batch, 2), np.int32),
    ]
    traced = in_onnx_form(jax.make_jaxpr(program)(*shapes))
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return jax2onnx.to_onnx(
                traced, shapes, input_names=list(_INPUTS), output_names=list(_OUTPUTS)
            )
    except Exception as error:  # of any kind, by what the converter lacks
        raise ExportError(
            f"--format=onnx: jax2onnx can't convert it: {short_reason(error)}"
        ) from error


def _difference_of_file(
    program: Callable[..., Any], path: Path, canvas: tuple[int, int], batch_size: int | None
) -> float:
    """Runs the file by onnxruntime on random images, of which all but the first are smaller."""
    import onnxruntime

    worst = 0.0
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), session_options)
        for count in (1, 3) if batch_size is None else (batch_size,):
            images, sizes = _random_images(count, canvas)
            expected = dict(zip(_OUTPUTS, jax.jit(program)(images, sizes), strict=True))
            found = session.run(list(_OUTPUTS), dict(zip(_INPUTS, (images, sizes), strict=True)))
            named = dict(zip(_OUTPUTS, found, strict=True))
            worst = max(worst, difference(jax.device_get(expected), named))
    except Exception as error:  # onnxruntime raises many kinds of errors
        raise ExportError(f"--format=onnx: onnxruntime: {short_reason(error)}") from error
    return worst


def _random_images(count: int, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes images of large random patches."""
    rng, (height, width) = np.random.default_rng(0), canvas
    side = max(min(canvas) // 8, 1)
    patches = rng.integers(0, 256, (count, -(-height // side), -(-width // side), 3), np.uint8)
    images = patches.repeat(side, 1).repeat(side, 2)[:, :height, :width]
    shares = np.linspace(1.0, 0.6, count)[:, None]
    return images, np.maximum(shares * canvas, 1).astype(np.int32)


def difference(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Returns the largest difference between detections, whatever the order of equal scores.

    Args:
      expected: `scores`, `labels` and `boxes` of a batch.
      found: the same. Each expected detection is compared with the nearest one of its label, except
        for those whose scores are within `TOLERANCE` of the lowest: another may be in their place.

    Returns:
      The largest difference of a score or of a side of a box; infinity if a label is missing.
    """
    worst = float(np.abs(expected["scores"] - found["scores"]).max())
    for row, scores in enumerate(expected["scores"]):
        for i in np.flatnonzero(scores > scores.min() + TOLERANCE):
            same = found["labels"][row] == expected["labels"][row, i]
            distances = np.abs(found["boxes"][row, same] - expected["boxes"][row, i]).max(axis=1)
            others = np.abs(found["scores"][row, same] - scores[i])
            worst = max(worst, float(np.maximum(distances, others).min(initial=np.inf)))
    return worst
