"""Builds the program of a detector and writes it into one file that runs with jax alone.

`jax.export` builds it for all platforms at once, on any machine, for one canvas and one batch size,
or any.
`dn_detr_jax.inference.exported` reads the file.
"""

import json
import os
import zipfile
from collections.abc import Sequence

import jax
import numpy as np
from flax import traverse_util

import dn_detr_jax
from dn_detr_jax.boxes import cxcywh_to_xyxy
from dn_detr_jax.evaluation.detect import detect
from dn_detr_jax.files import replace_atomically
from dn_detr_jax.inference import exported
from dn_detr_jax.inference.predictor import Run
from dn_detr_jax.inference.weights import restore_weights, store_weights
from dn_detr_jax.models.registry import build_model


def export(
    run: Run,
    path: str | os.PathLike,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    canvas: tuple[int, int] | None = None,
    batch_size: int | None = 1,
    weights: str = "float32",
) -> None:
    """Writes the detector of a run.

    Args:
      run: config, classes and parameters.
      path: of the file, which is written completely or not at all.
      platforms: of "cpu", "cuda", "rocm" and "tpu"; the machine needs none of them.
      canvas: height and width; None: the first of the config.
      batch_size: images per call of the program; None: any number, compiled for each.
      weights: "float32", "bfloat16" or "int8", how kernels are stored; see `inference.weights`.

    Raises:
      OSError: the file can't be written.
    """
    config = run.config
    height, width = canvas or config.data.canvases[0]
    model = build_model(config.model)
    params = traverse_util.flatten_dict(run.params, sep="/")
    params = store_weights(jax.device_get(params), weights)

    def program(params, images, sizes):
        nested = traverse_util.unflatten_dict(restore_weights(params), sep="/")
        found = detect(nested, images, sizes, model=model, config=config)
        return found | {"boxes": cxcywh_to_xyxy(found["boxes"])}

    images = jax.export.symbolic_shape("batch")[0] if batch_size is None else batch_size
    shapes = (
        {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()},
        jax.ShapeDtypeStruct((images, height, width, 3), np.uint8),
        jax.ShapeDtypeStruct((images, 2), np.int32),
    )
    exporter = jax.export.export(jax.jit(program), platforms=tuple(platforms))
    metadata = {
        "format": 1 if batch_size else exported.FORMAT,  # earlier loaders need a batch size
        "canvas": [height, width],
        "batch_size": batch_size,
        "num_select": config.eval.num_select,
        "threshold": run.threshold,
        "short_side": config.data.eval_short_side,
        "max_long_side": config.data.eval_max_long_side,
        "classes": [{"id": category.id, "name": category.name} for category in run.categories],
        "platforms": list(platforms),
        "step": run.step,
        "versions": {"jax": jax.__version__, "dn_detr_jax": dn_detr_jax.__version__},
    }
    _write(path, metadata, exporter(*shapes).serialize(), params)


def _write(
    path: str | os.PathLike,
    metadata: dict,
    program: bytes | bytearray,
    params: dict[str, np.ndarray],
) -> None:
    with (
        replace_atomically(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(exported.METADATA, json.dumps(metadata, indent=1))
        archive.writestr(exported.PROGRAM, bytes(program))
        for name, value in params.items():
            with archive.open(f"{exported.PARAMS}{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)
