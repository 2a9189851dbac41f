"""Assigns images to canvases (padding buckets), and scales them to fit.

A canvas is the height and width that the images of a batch are padded to. Each canvas of
`config.data.canvases` is a shape that programs are compiled for.
"""

from collections.abc import Sequence

import numpy as np

from dn_detr_jax.errors import DataError

Canvas = tuple[int, int]

_TIE = 1e-6  # shares of padding that differ by less are equal but for rounding


def assign_canvases(sizes: np.ndarray, canvases: Sequence[Canvas]) -> np.ndarray:
    """Returns the canvas of least area that each size fits.

    Args:
      sizes: int [..., 2], heights and widths.
      canvases: heights and widths.

    Returns:
      int32 [...], positions in `canvases`, -1 where none is large enough.
    """
    shapes = np.asarray(canvases, np.int64)
    fits = (np.asarray(sizes)[..., None, :] <= shapes).all(-1)
    area = np.where(fits, shapes.prod(-1), np.iinfo(np.int64).max)
    return np.where(fits.any(-1), area.argmin(-1), -1).astype(np.int32)


def check_canvases(
    largest: np.ndarray, canvases: Sequence[Canvas], sizes: np.ndarray, image_ids: np.ndarray
) -> None:
    """Raises a DataError naming an image that may fit no canvas, and one that would do.

    Args:
      largest: int [N, C, 2], sizes that bound the final size of each image.
      canvases: heights and widths.
      sizes: int [N, 2], original sizes, for the message.
      image_ids: int [N], for the message.
    """
    # Sizes repeat, photographs have few different ones. One number per size is fast to sort.
    keys, inverse = np.unique(_key(largest), return_inverse=True)
    unique = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=-1)
    missing = (assign_canvases(unique, canvases) < 0)[inverse].reshape(largest.shape[:2])
    if not missing.any():
        return
    i, c = np.unravel_index(int(missing.argmax()), largest.shape[:2])
    (height, width), (final_height, final_width) = sizes[i].tolist(), largest[i, c].tolist()
    needed = largest[missing].max(0)
    needed = tuple((-(-needed // 32) * 32).tolist())
    raise DataError(
        f"data.canvases {tuple(map(tuple, canvases))} are too small: image {image_ids[i]} of "
        f"{height} x {width} pixels (height x width) can become {final_height} x {final_width}; "
        f"a canvas of {needed} would hold it, or lower the sizes in data.augment and data.eval_*; "
        "python -m dn_detr_jax canvases --config FILE proposes canvases for a data set"
    )


def _key(sizes: np.ndarray) -> np.ndarray:
    return sizes[..., 0].astype(np.int64) << 32 | sizes[..., 1].astype(np.int64)


def canvas_factors(
    sizes: np.ndarray, canvases: Sequence[Canvas] | np.ndarray, snap: float, max_long_side: int
) -> np.ndarray:
    """Returns the factors that fit each size to each canvas.

    With `snap`, the factor is from `1 - snap` to `1 + snap`, and such that the image touches the
    canvas with its height or its width, or else that it comes as near to that as `1 + snap` and
    `max_long_side` allow.

    Args:
      sizes: int [..., 2], heights and widths that the augmentation gave.
      canvases: K heights and widths.
      snap: share by which an image's scale may move, `config.data.snap`; 0: not at all.
      max_long_side: in pixels.

    Returns:
      float64 [..., K], 0 where the image does not fit.
    """
    sizes = np.asarray(sizes)
    heights, widths = np.asarray(canvases).T
    touching = np.minimum(heights / sizes[..., :1], widths / sizes[..., 1:])
    longest = np.maximum(max_long_side / sizes.max(-1, keepdims=True), 1.0)
    factors = np.minimum(touching, np.minimum(longest, 1 + snap))
    return np.where(touching >= 1 - snap, factors, 0.0)


def place(
    sizes: np.ndarray, canvases: Sequence[Canvas], snap: float, max_long_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gives each image the canvas on which the least share of the pixels is padding.

    Where several are equal, which happens when an image may touch canvases of the same aspect, it
    is the one for which the image's scale moves least.

    Args:
      sizes: int [N, 2]; each fits one of the canvases.
      canvases: heights and widths.
      snap: see `canvas_factors`.
      max_long_side: see `canvas_factors`.

    Returns:
      int32 [N], positions in `canvases`, and the sizes there, int32 [N, 2].
    """
    sizes = np.asarray(sizes)
    factors = canvas_factors(sizes, canvases, snap, max_long_side)
    filled = factors**2 * (sizes.prod(-1, keepdims=True) / np.prod(canvases, axis=-1))
    chosen = (filled - _TIE * np.abs(factors - 1)).argmax(-1)
    factor = np.take_along_axis(factors, chosen[:, None], axis=1)
    return chosen.astype(np.int32), scaled(sizes, factor)


def scaled(sizes: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Sizes times factors; rounding keeps the side that touches its canvas exact."""
    return np.maximum(np.rint(sizes * factor), 1).astype(np.int32)
