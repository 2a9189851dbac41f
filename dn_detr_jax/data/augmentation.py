"""The part of the augmentation that is drawn when an image is read.

The plan draws sizes and geometry from the images' sizes alone (`transforms`). Here is what needs
boxes, pixels or other images, which never changes the final size: where an IoU crop lies, mosaics,
colors, and the user's hook. All of it is drawn from one generator of seed, epoch and image.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.data.colors import change_colors
from dn_detr_jax.data.mosaic import Scene, make_mosaic
from dn_detr_jax.data.transforms import MIN_SIDE, Geometry, apply, rotated_boxes
from dn_detr_jax.errors import ConfigError, DataError

Hook = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.random.Generator],
    tuple[np.ndarray, np.ndarray, np.ndarray],
]

_CROP_TRIES = 50  # places of an IoU crop, as in SSD

# What `data.augment.stop_at` ends, and its values from then on.
_STOPPED: dict[str, Any] = {
    "zoom_out": 0.0,
    "iou_crop": 0.0,
    "mosaic": 0.0,
    "scale": (1.0, 1.0),
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "hook": "",
}


def after_stop(augment: ConfigDict) -> ConfigDict:
    """Returns a copy of `config.data.augment` as it is after `stop_at`."""
    augment = augment.copy_and_resolve_references()
    augment.update(_STOPPED)
    return augment


def load_hook(name: str) -> Hook | None:
    """Imports the function of `data.augment.hook`; None for an empty name.

    Raises:
      ConfigError: no such module or function.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        expected = f"a function that can be imported; {error}; PYTHONPATH has to hold its folder"
        raise ConfigError("data.augment.hook", name, expected) from error
    if not callable(hook):
        raise ConfigError("data.augment.hook", name, f"a function; it is {hook!r:.80}")
    return hook


def augmented(
    rng: np.random.Generator,
    scene: Scene,
    geometry: Geometry,
    augment: ConfigDict,
    others: Callable[[np.random.Generator], list[Scene]],
    canvas: np.ndarray,
) -> Scene:
    """Augments an image: its geometry, then its colors, then the hook.

    Args:
      rng: of this image in this epoch.
      scene: as read.
      geometry: of the plan, without leading dimensions.
      augment: `config.data.augment` of this epoch.
      others: reads the three other images of a mosaic.
      canvas: uint8 [>= h, >= w, 3], into whose upper left corner the image is written.

    Raises:
      DataError: the hook returned something wrong.
    """
    height, width = (int(side) for side in geometry.size)
    if geometry.mosaic and min(height, width) > 1:
        scenes = [scene, *others(rng)]
        scene = make_mosaic(rng, scenes, augment, canvas[:height, :width])
    else:
        geometry = place_crop(rng, geometry, scene)
        scene = Scene(*apply(*scene, geometry, canvas))
    change_colors(rng, scene.image, augment)
    if augment.hook:
        scene = _hooked(rng, scene, augment.hook)
    return scene


def place_crop(rng: np.random.Generator, geometry: Geometry, scene: Scene) -> Geometry:
    """Moves a crop to a place where it has the IoU `geometry.min_iou` with an object.

    Of 50 random places it takes the first that has it, or else the one with the largest IoU. The
    size of the crop is the plan's.

    Args:
      rng: of the places; nothing is drawn from it if the crop may stay.
      geometry: without leading dimensions; the crop lies within the image.
      scene: the image as read.
    """
    if not geometry.min_iou or not len(scene.boxes):
        return geometry
    size = scene.image.shape[:2]
    boxes = rotated_boxes(np.asarray(scene.boxes, np.float64), size, int(geometry.turns))
    crop = geometry.crop[2:]
    corners = np.floor(rng.random((_CROP_TRIES, 2)) * (geometry.resized - crop + 1))
    low = np.maximum(corners[:, None, ::-1], boxes[:, :2])  # [T, n, 2], x and y
    high = np.minimum((corners + crop)[:, None, ::-1], boxes[:, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    iou = (common / (crop.prod(dtype=np.int64) + areas - common)).max(-1)
    enough = iou >= geometry.min_iou
    chosen = enough.argmax() if enough.any() else iou.argmax()
    return geometry._replace(crop=np.concatenate([corners[chosen], crop]).astype(np.int32))


def _hooked(rng: np.random.Generator, scene: Scene, name: str) -> Scene:
    """Calls the hook and writes its image over that of the scene."""
    hook = load_hook(name)
    assert hook is not None
    result = hook(scene.image, scene.boxes, scene.labels, rng)
    problem = _problem(result, scene.image)
    if problem:
        raise DataError(f"data.augment.hook {name} returned {problem}")
    image, boxes, labels = result
    scene.image[:] = image
    height, width = image.shape[:2]
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(-1)
    return Scene(scene.image, boxes[kept], np.asarray(labels).reshape(-1)[kept])


def _problem(result: Any, image: np.ndarray) -> str:
    """What is wrong with a hook's result; "" if nothing is."""
    if not isinstance(result, tuple) or len(result) != 3:
        return f"{type(result).__name__}, expected (image, boxes, labels)"
    new, boxes, labels = result
    if not isinstance(new, np.ndarray) or new.dtype != np.uint8 or new.shape != image.shape:
        shown = f"{getattr(new, 'dtype', type(new).__name__)} {getattr(new, 'shape', '')}".strip()
        return f"an image {shown}, expected uint8 {image.shape}: the size is the plan's"
    boxes, labels = np.asarray(boxes), np.asarray(labels)
    if boxes.size != 4 * labels.size or (boxes.size and boxes.shape[-1] != 4):
        return f"boxes {boxes.shape} and labels {labels.shape}, expected [n, 4] and [n]"
    if not np.isfinite(boxes).all():
        return "a box that is not finite"
    if labels.size and labels.dtype.kind not in "iu":
        return f"labels of type {labels.dtype}, expected integers"
    return ""
