"""Augmentation as explicit geometry: drawn for all images at once, applied to each.

The default augmentation is that of DETR (Carion et al., ECCV 2020, section 4 and appendix A.4): a
horizontal flip; then, with equal chance, a resize to a random short side, or a resize, a random
crop and the first resize. Drawing it apart from applying it lets a plan know the final size of
every image before anything is read.

The config may add vertical flips, rotations by 90 degrees, zoom-out and IoU crop (Liu et al., SSD,
ECCV 2016, section 2.2), large-scale jitter (Ghiasi et al., CVPR 2021) and mosaic (Bochkovskiy et
al., YOLOv4, 2020). Their random numbers come from a stream of their own, so that the default draws
stay as they are.

Resize, crop and resize are done as one: the crop's region of the original image is resampled
once, which is faster and sharper than twice. Boxes are the same.
"""

from typing import NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

FILL = (124, 116, 104)  # RGB around an image that was zoomed out: the mean color of ImageNet
MIN_SIDE = 0.1  # pixels: what is left of a cut object, if smaller, is dropped

_IOU_CROP_SIDES = (0.3, 1.0)  # of the image's sides, as in SSD
_IOU_CROP_ASPECT = 2  # longest side of the crop over its shortest, as in SSD
_IOU_CROP_LEAST = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # IoU with an object, as in SSD; 0: any place
_ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}
_OUTSIDE = 1e-6  # pixels: rounding may step so far outside of an image


class Geometry(NamedTuple):
    """The augmentation of images; every field may have leading dimensions.

    Attributes:
      resized: int32 [..., 2], height and width after the rotation and the first resize.
      crop: int32 [..., 4], top, left, height, width of the part of it that is kept. It may reach
        beyond the image, and the outside is filled with `FILL`.
      size: int32 [..., 2], final height and width, to which the crop is resized.
      flip: bool [...], whether left and right are then exchanged.
      turns: int8 [...], counterclockwise rotations by 90 degrees, before everything else.
      min_iou: float32 [...], IoU that the crop has to have with an object; the crop is then moved
        by `augmentation.place_crop`. 0: the crop stays.
      mosaic: bool [...], whether the image becomes a tile of a mosaic of the final size, whose
        tiles have geometries of their own.
    """

    resized: np.ndarray
    crop: np.ndarray
    size: np.ndarray
    flip: np.ndarray
    turns: np.ndarray = np.zeros((), np.int8)
    min_iou: np.ndarray = np.zeros((), np.float32)
    mosaic: np.ndarray = np.zeros((), np.bool_)

    def at(self, index: int | np.ndarray | tuple) -> "Geometry":
        """The geometries at an index of the leading dimensions."""
        return Geometry(*(field[index] for field in self))


def resized_sizes(
    sizes: np.ndarray, short_side: np.ndarray | int, max_long_side: int | None
) -> np.ndarray:
    """Sizes after a resize that keeps the aspect.

    Args:
      sizes: int [..., 2], heights and widths.
      short_side: int [...] or int, wanted short side.
      max_long_side: the short side becomes smaller where the long side would exceed this; None:
        no limit.

    Returns:
      int32 [..., 2].
    """
    sizes = np.asarray(sizes, np.int64)
    short, long = sizes.min(-1), sizes.max(-1)
    target = np.broadcast_to(np.asarray(short_side, np.int64), short.shape)
    if max_long_side is not None:
        limited = np.rint(max_long_side * short / long).astype(np.int64)
        target = np.where(long * target > max_long_side * short, limited, target)
    target = np.maximum(target, 1)
    other = target * long // short
    if max_long_side is not None:
        # Rounding the short side up would carry very long images over the limit.
        other = np.minimum(other, max_long_side)
    landscape = sizes[..., 0] <= sizes[..., 1]
    height, width = np.where(landscape, (target, other), (other, target))
    return np.stack([height, width], axis=-1).astype(np.int32)


def draw_geometry(rng: np.random.Generator, sizes: np.ndarray, augment: ConfigDict) -> Geometry:
    """Draws the augmentation of every image.

    Args:
      rng: how much is drawn from it depends on the number of images only.
      sizes: int [N, 2], heights and widths.
      augment: `config.data.augment`.

    Returns:
      A `Geometry` with one leading dimension, N.
    """
    count = len(sizes)
    flip = rng.random(count) < augment.flip
    crops = rng.random(count) < augment.crop
    short_side = rng.choice(np.asarray(augment.short_sides, np.int64), count)
    crop_short_side = rng.choice(np.asarray(augment.crop_resize, np.int64), count)
    extent, place = rng.random((count, 2)), rng.random((count, 2))
    # What the published augmentation lacks is drawn from another stream.
    rng = rng.spawn(1)[0]
    flip, turns = draw_orientation(rng, flip, augment)
    mosaic = rng.random(count) < augment.mosaic
    by_iou = ~mosaic & (rng.random(count) < augment.iou_crop)
    crops &= ~(mosaic | by_iou)

    sizes = np.asarray(sizes, np.int32)
    sizes = np.where(turns[:, None] % 2 == 1, sizes[:, ::-1], sizes)
    resized = np.where(crops[:, None], resized_sizes(sizes, crop_short_side, None), sizes)
    low, high = _crop_range(resized, augment)
    kept = np.where(crops[:, None], low + np.floor(extent * (high - low + 1)), resized)
    kept = np.where(by_iou[:, None], _iou_crop_sizes(sizes, rng.random((count, 2))), kept)
    corner = np.floor(place * (resized - kept + 1))
    size = resized_sizes(kept, short_side, augment.max_long_side)
    least = np.where(by_iou, rng.choice(np.asarray(_IOU_CROP_LEAST, np.float32), count), 0)

    zoomed = (rng.random(count) < augment.zoom_out) & ~(mosaic | by_iou | crops)
    corner, kept = _zoom_out(rng, corner, kept, zoomed, augment.zoom_out_limit)
    scale = rng.uniform(augment.scale[0], augment.scale[1], count)
    scale = np.where(mosaic, 1, np.where(zoomed | by_iou, np.minimum(scale, 1), scale))
    corner, kept, size = _jitter(rng, corner, kept, size, scale[:, None])
    return Geometry(
        resized=resized.astype(np.int32),
        crop=np.concatenate([corner, kept], axis=1).astype(np.int32),
        size=size,
        flip=flip,
        turns=turns,
        min_iou=least.astype(np.float32),
        mosaic=mosaic,
    )


def draw_orientation(
    rng: np.random.Generator, flip: np.ndarray, augment: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Adds vertical flips and rotations to horizontal flips [N]; returns flips and turns.

    A vertical flip is a rotation by 180 degrees and a horizontal flip.
    """
    count = len(flip)
    vertical = rng.random(count) < augment.vertical_flip
    rotated = rng.random(count) < augment.rotate
    turns = np.where(rotated, rng.integers(1, 4, count), 0) + 2 * vertical
    return flip ^ vertical, (turns % 4).astype(np.int8)


def _iou_crop_sizes(sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Sizes of IoU crops of images [N, 2], by numbers from 0 to 1 [N, 2].

    Each side has 0.3 to 1 of the image's side, and at most twice the length of the other.
    """
    low, high = _IOU_CROP_SIDES
    sides = np.maximum(np.rint(sizes * (low + (high - low) * shares)), 1)
    return np.minimum(sides, _IOU_CROP_ASPECT * sides[:, ::-1])


def _zoom_out(
    rng: np.random.Generator,
    corner: np.ndarray,
    kept: np.ndarray,
    zoomed: np.ndarray,
    limit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Enlarges the crops of zoomed images [N, 2] up to `limit` times, the image anywhere in it."""
    ratio = np.where(zoomed, rng.uniform(1, limit, len(zoomed)), 1)[:, None]
    wide = np.rint(kept * ratio)
    return corner - np.floor(rng.random(kept.shape) * (wide - kept + 1)), wide


def _jitter(
    rng: np.random.Generator,
    corner: np.ndarray,
    kept: np.ndarray,
    size: np.ndarray,
    scale: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales images [N, 2] by factors [N, 1] and cuts what exceeds the size without the factor."""
    part = np.maximum(np.rint(kept / np.maximum(scale, 1)), 1)
    corner = corner + np.floor(rng.random(kept.shape) * (kept - part + 1))
    size = np.maximum(np.rint(size * np.minimum(scale, 1)), 1).astype(np.int32)
    return corner, part, size


def _crop_range(resized: np.ndarray, augment: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest height and width of a crop, int [N, 2] each."""
    low, high = augment.crop_size
    return np.minimum(low, resized), np.minimum(high, resized)


def eval_geometry(sizes: np.ndarray, short_side: int, max_long_side: int) -> Geometry:
    """The geometry of a plain resize, one for each row of `sizes` int [N, 2]."""
    sizes = np.asarray(sizes, np.int32)
    return Geometry(
        resized=sizes,
        crop=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
        size=resized_sizes(sizes, short_side, max_long_side),
        flip=np.zeros(len(sizes), np.bool_),
        turns=np.zeros(len(sizes), np.int8),
        min_iou=np.zeros(len(sizes), np.float32),
        mosaic=np.zeros(len(sizes), np.bool_),
    )


def largest_sizes(sizes: np.ndarray, augment: ConfigDict) -> np.ndarray:
    """Returns bounds for the sizes that `draw_geometry` gives: each final size fits into one.

    Args:
      sizes: int [N, 2], heights and widths.
      augment: `config.data.augment`.

    Returns:
      int32 [N, C, 2], the C candidates of each image.
    """
    sizes = np.asarray(sizes, np.int32)
    upright = _largest_upright_sizes(sizes, augment)
    if augment.rotate > 0:
        turned = _largest_upright_sizes(sizes[:, ::-1], augment)
        return np.concatenate([upright, turned], axis=1)
    return upright


def _largest_upright_sizes(sizes: np.ndarray, augment: ConfigDict) -> np.ndarray:
    """The candidates of `largest_sizes` without rotation."""
    candidates = []
    if augment.crop < 1 or augment.mosaic > 0:
        for short_side in augment.short_sides:
            candidates.append(resized_sizes(sizes, short_side, augment.max_long_side))
    if augment.iou_crop > 0:
        short = min(max(augment.short_sides), augment.max_long_side)
        long = min(short * _IOU_CROP_ASPECT, augment.max_long_side)
        candidates += [np.full_like(sizes, (short, long)), np.full_like(sizes, (long, short))]
    if augment.crop > 0:
        short_side = max(augment.short_sides)
        for crop_short_side in augment.crop_resize:
            low, high = _crop_range(resized_sizes(sizes, crop_short_side, None), augment)
            for i, j in ((0, 1), (1, 0)):  # the widest crops, then the highest
                long = np.minimum(short_side * high[:, j] // low[:, i], augment.max_long_side)
                short = np.minimum(short_side, augment.max_long_side)
                sides = {i: np.full_like(long, short), j: np.maximum(long, short)}
                candidates.append(np.stack([sides[0], sides[1]], axis=-1).astype(np.int32))
    return np.stack(candidates, axis=1)


def apply(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    geometry: Geometry,
    canvas: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Applies a geometry to an image and its objects; `min_iou` and `mosaic` are not looked at.

    Args:
      image: uint8 [H, W, 3].
      boxes: float [n, 4], left, top, right, bottom in pixels.
      labels: int [n].
      geometry: without leading dimensions.
      canvas: uint8 [>= h, >= w, 3], into whose upper left corner the image is written; None: a
        new array.

    Returns:
      The image, uint8 [h, w, 3] with h and w from `geometry.size`, a view of the canvas if there
      is one; the boxes that are at least partly in it, float32 [m, 4], cut to it; their labels [m].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if geometry.turns:
        boxes = rotated_boxes(boxes, (image.shape[0], image.shape[1]), int(geometry.turns))
        image = cv2.rotate(image, _ROTATIONS[int(geometry.turns)])
    height, width = image.shape[:2]
    scale_y, scale_x = geometry.resized / np.array([height, width], np.float64)
    top, left, crop_height, crop_width = (float(v) for v in geometry.crop)
    region = (
        left / scale_x,
        top / scale_y,
        (left + crop_width) / scale_x,
        (top + crop_height) / scale_y,
    )
    out_height, out_width = (int(v) for v in geometry.size)
    if canvas is None:
        canvas = np.empty((out_height, out_width, 3), np.uint8)
    result = canvas[:out_height, :out_width]
    _resample_filled(image, region, result)

    corners = boxes.reshape(-1, 2, 2)
    corners = (corners * (scale_x, scale_y) - (left, top)) * (
        out_width / crop_width,
        out_height / crop_height,
    )
    corners = np.clip(corners, 0.0, (out_width, out_height))
    if geometry.flip:
        cv2.flip(result, 1, dst=result)  # in an eighth of NumPy's time
        corners = np.stack(
            [
                np.stack([out_width - corners[:, 1, 0], corners[:, 0, 1]], -1),
                np.stack([out_width - corners[:, 0, 0], corners[:, 1, 1]], -1),
            ],
            axis=1,
        )
    kept = (corners[:, 1] - corners[:, 0] > MIN_SIDE).all(-1)
    return result, corners[kept].reshape(-1, 4).astype(np.float32), np.asarray(labels)[kept]


def rotated_boxes(boxes: np.ndarray, size: tuple[int, int], turns: int) -> np.ndarray:
    """Rotates boxes with their image, counterclockwise by 90 degrees.

    Args:
      boxes: [n, 4], left, top, right, bottom in pixels.
      size: height and width of the image before.
      turns: how many times.
    """
    height, width = size
    for _ in range(turns):
        left, top, right, bottom = boxes.T
        boxes = np.stack([top, width - right, bottom, width - left], axis=-1)
        height, width = width, height
    return boxes


def _resample_filled(
    image: np.ndarray, region: tuple[float, float, float, float], out: np.ndarray
) -> None:
    """Fills `out` as `_resample` does, and with `FILL` where the region is not in the image.

    The image's edges lie between pixels of `out` then: they are moved by half a pixel at most.
    """
    low, high = np.array(region[:2]), np.array(region[2:])
    limit = np.array([image.shape[1], image.shape[0]], np.float64)
    if (low >= -_OUTSIDE).all() and (high <= limit + _OUTSIDE).all():
        _resample(image, region, out)
        return
    size = np.array([out.shape[1], out.shape[0]])
    inside_low, inside_high = np.maximum(low, 0.0), np.minimum(high, limit)
    scale = size / (high - low)
    first = np.clip(np.rint((inside_low - low) * scale), 0, size - 1).astype(int)
    last = np.clip(np.rint((inside_high - low) * scale), first + 1, size).astype(int)
    out[:] = FILL
    inside = out[first[1] : last[1], first[0] : last[0]]
    _resample(image, (*inside_low.tolist(), *inside_high.tolist()), inside)


def _resample(
    image: np.ndarray, region: tuple[float, float, float, float], out: np.ndarray
) -> None:
    """Fills `out` with a region (left, top, right, bottom) of an image, interpolated bilinearly.

    Pillow's filter widens when it shrinks an image, which keeps aliases away. Where nothing
    shrinks, OpenCV gives the same to one gray level, in less time and in place.
    """
    height, width = out.shape[:2]
    source_height, source_width = image.shape[:2]
    left, top, right, bottom = region
    step_x, step_y = (right - left) / width, (bottom - top) / height
    whole = (0.0, 0.0, source_width, source_height)
    if np.allclose(region, whole, rtol=0.0, atol=1e-6):
        if (height, width) == (source_height, source_width):
            np.copyto(out, image)
            return
        if height >= source_height and width >= source_width:
            cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
            return
    elif step_x <= 1.0 and step_y <= 1.0:
        # Centers of pixels lie at halves in `region`, at whole numbers in OpenCV's matrix.
        matrix = np.array(
            [[step_x, 0.0, left + (step_x - 1) / 2], [0.0, step_y, top + (step_y - 1) / 2]]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(image, matrix, (width, height), out, flags, borderMode=cv2.BORDER_REPLICATE)
        return
    box = tuple(np.clip(region, 0.0, whole[2:] * 2).tolist())  # rounding may step outside
    out[:] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box)
