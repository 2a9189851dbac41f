"""Drawn images as files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dn_detr_jax.files import replace_atomically


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Writes RGB uint8 [height, width, 3] as a PNG, completely or not at all."""
    _save(image, Path(path), format="PNG")


def save_jpeg(image: np.ndarray, path: str | os.PathLike) -> None:
    """Writes a JPEG as `save_png` does, of high quality with color at full resolution."""
    _save(image, Path(path), format="JPEG", quality=92, subsampling=0)


def _save(image: np.ndarray, path: Path, **options: Any) -> None:
    with replace_atomically(path) as unfinished:
        Image.fromarray(image).save(unfinished, **options)
