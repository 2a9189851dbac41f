"""Boxes in another format than COCO's: shares of the image, or corners.

Each box of such a file may be a box in pixels by itself; all of them together are not.
"""

import numpy as np

from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.findings import Findings, Kind

TOLERANCE = 1.0  # pixels that a box may reach beyond its image: annotation tools round

_LEAST_SIDE = 8  # pixels of an image, in which a box within one pixel is no object
_FEW, _SOME = 3, 8  # boxes: fewer may fit as corners by chance
_ORDERED = 0.95  # share of boxes that fit as corners
_FAR = 1.1  # sides of the image that a box leaves by far: not by careless drawing
_MANY = 0.2  # share of such boxes


def check_box_format(annotations: Annotations, findings: Findings) -> None:
    """Counts boxes that are shares of the image, or corners, in place of pixels and sizes.

    It is an error if most boxes lie within 0 to 1, or if nearly all boxes fit into their image as
    corners, and many leave it by far as they are. If only some boxes do, it is a warning.
    """
    rows = np.flatnonzero(np.isfinite(annotations.bboxes).all(1))
    rows = rows[(annotations.bboxes[rows, 2:] > 0).all(1)]
    if not len(rows):
        return
    boxes = annotations.bboxes[rows]
    limits = annotations.sizes[annotations.rows[rows], ::-1].astype(np.float64)
    shares = ((boxes >= 0) & (boxes <= 1)).all(1) & (limits >= _LEAST_SIDE).all(1)
    most = 2 * shares.sum() > len(rows)
    if most:
        _count(annotations, rows[shares], kinds.SHARES, findings)
        return
    tiny = shares | (boxes[:, 2:] < 1).all(1)
    _count(annotations, rows[tiny], kinds.TINY_BOX, findings)
    with np.errstate(over="ignore"):
        beyond = (boxes[:, :2] + boxes[:, 2:] > limits + TOLERANCE).any(1)
    fits = (boxes[:, :2] >= -TOLERANCE) & (boxes[:, :2] < boxes[:, 2:])
    fits &= boxes[:, 2:] <= limits + TOLERANCE
    if not beyond.any() or fits.all(1).mean() < _ORDERED:
        return
    with np.errstate(over="ignore"):
        far = (boxes[:, :2] + boxes[:, 2:] > _FAR * limits + TOLERANCE).any(1)
    if len(rows) >= _FEW and far.mean() > _MANY:
        _count(annotations, rows[beyond], kinds.CORNERS, findings)
    elif len(rows) >= _SOME:
        _count(annotations, rows[beyond], kinds.MAYBE_CORNERS, findings)


def _count(annotations: Annotations, rows: np.ndarray, kind: Kind, findings: Findings) -> None:
    for row in rows.tolist():
        findings.add(kind, describe_box(annotations, row))


def describe_box(annotations: Annotations, row: int) -> str:
    """Returns the box of a row, its annotation, and its image, for a report."""
    box = ", ".join(f"{value:g}" for value in annotations.bboxes[row])
    image = annotations.rows[row]
    height, width = annotations.sizes[image].tolist()
    return (
        f"[{box}], annotation {annotations.ids[row]}, in {annotations.file_names[image]} of "
        f"{width} x {height}"
    )
