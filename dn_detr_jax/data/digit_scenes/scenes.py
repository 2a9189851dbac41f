"""Images of handwritten digits on varied backgrounds, drawn from a seed.

The digits are the 1797 real ones that ship with scikit-learn (`load_digits`: 8 x 8 pixels, 17 gray
levels; E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998). They are enlarged
smoothly, turned, colored and composed, with exact boxes. A scene is a function of
(seed, split, index): any scene can be drawn alone, in any process, with the same result.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np

MAX_DIGITS = 8
SPLITS = ("train", "validation")

_EMPTY_SHARE = 0.04  # of the scenes have no digit
_DIGIT_HEIGHT = (18.0, 48.0)  # pixels, of the ink before it is turned
_MAX_ANGLE = 20.0  # degrees
_MAX_COVER = 0.2  # share of a digit's ink that others may cover
_MAX_BOX_OVERLAP = 0.3  # intersection over the smaller of two boxes
_BRIGHTEST_BACKGROUND = 100.0  # luminance of its main color, of 255: digits are the brighter part
_MIN_CONTRAST = 90.0  # luminance between a digit and what is under it, of 255
_ENLARGE = 8  # of the 8 x 8 samples, before they are turned and brought to size
_INK = 0.3  # opacity from which a pixel belongs to the box
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Scene(NamedTuple):
    """An image and what is in it."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # int32 [n, 4], left, top, right, bottom of the ink: right, bottom exclusive
    labels: np.ndarray  # int32 [n], the digits 0..9
    digits: np.ndarray  # int32 [n], which sample of `load_digits` each is


@functools.cache
def _load_samples() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported late: three seconds, for drawing only

    digits = load_digits()
    return digits.images.astype(np.float32) / 16.0, digits.target.astype(np.int32)


@functools.cache
def _enlarged_sample(sample: int) -> np.ndarray:
    """A sample in a ring of two empty cells, enlarged by `_ENLARGE`: float32 [96, 96]."""
    images, _ = _load_samples()
    padded = np.pad(images[sample], 2)
    return cv2.resize(padded, None, fx=_ENLARGE, fy=_ENLARGE, interpolation=cv2.INTER_CUBIC)


@functools.cache
def digits_of_split(split: str) -> tuple[np.ndarray, ...]:
    """The samples of `load_digits` that scenes of a split may use.

    Four fifths of the samples of each class are for training, the others for validation.

    Args:
      split: "train" or "validation".

    Returns:
      Ten arrays, int32: for each class the indices of its samples.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    _, labels = _load_samples()
    rng = np.random.default_rng(0)  # one division for every seed of scenes
    samples = []
    for label in range(10):
        of_class = rng.permutation(np.flatnonzero(labels == label)).astype(np.int32)
        cut = len(of_class) * 4 // 5
        samples.append(of_class[:cut] if split == "train" else of_class[cut:])
    return tuple(samples)


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draws one scene.

    Args:
      seed: not negative; different seeds give different scenes.
      split: "train" or "validation".
      index: not negative, number of the scene in its split.

    Returns:
      A `Scene` of 80 to 96 pixels on the short side, up to 128 on the long side, with 0 to
      `MAX_DIGITS` digits.
    """
    samples = digits_of_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = _draw_size(rng)
    image = _draw_background(rng, height, width)
    num_digits = 0 if rng.random() < _EMPTY_SHARE else int(rng.integers(1, MAX_DIGITS + 1))
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    digits: list[int] = []
    inks: list[_Ink] = []
    colors: list[np.ndarray] = []
    for _ in range(num_digits):
        label = int(rng.integers(10))
        sample = int(rng.choice(samples[label]))
        alpha = _draw_digit(rng, sample)
        box = _place(rng, alpha, (height, width), boxes, inks)
        if box is None:  # no room is left for this one
            continue
        left, top, right, bottom = box
        below = [colors[i] for i, other in enumerate(boxes) if _intersection(box, other) > 0]
        color = _draw_color(rng, image[top:bottom, left:right], alpha, below)
        under = image[top:bottom, left:right]
        under += alpha[..., None] * (color - under)
        boxes.append(box)
        labels.append(label)
        digits.append(sample)
        inks.append(_Ink(alpha, np.zeros(alpha.shape, bool)))
        colors.append(color)
    grain = rng.standard_normal(image.shape[:2], np.float32) * np.float32(rng.uniform(0.0, 3.0))
    image += grain[..., None]
    np.clip(np.rint(image, out=image), 0.0, 255.0, out=image)
    return Scene(
        image=image.astype(np.uint8),
        boxes=np.array(boxes, np.int32).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        digits=np.array(digits, np.int32),
    )


class _Ink(NamedTuple):
    alpha: np.ndarray  # float32 [h, w], opacity within the box
    covered: np.ndarray  # bool [h, w], what later digits have hidden


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: landscape, portrait or, one time in five, square."""
    short = int(rng.integers(80, 97))
    shape = rng.choice(5)
    if shape == 4:
        return short, short
    long = int(rng.integers(short, 129))
    return (short, long) if shape < 2 else (long, short)


def _draw_digit(rng: np.random.Generator, sample: int) -> np.ndarray:
    """A sample enlarged and turned: its opacity, float32 [h, w], cropped to its ink."""
    low, high = _DIGIT_HEIGHT
    height = low + (high - low) * rng.beta(1.8, 2.4)
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    angle = np.deg2rad(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    boldness = rng.uniform(-0.06, 0.06)
    # Drawn at twice the size and averaged: antialiased edges.
    scale = 2.0 * height / (8 * _ENLARGE)
    side = 2 * int(np.ceil(1.4 * height + 2.0))  # room for the largest angle and stretch
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    source = _enlarged_sample(sample)
    middle, target = (len(source) - 1) / 2.0, (side - 1) / 2.0
    matrix = np.array(
        [
            [cos * stretch, -sin, target - (cos * stretch - sin) * middle],
            [sin * stretch, cos, target - (sin * stretch + cos) * middle],
        ]
    )
    big = cv2.warpAffine(source, matrix, (side, side))
    ramp = np.clip((big - np.float32(0.3 + boldness)) * np.float32(4.0), 0.0, 1.0)
    alpha = cv2.resize(ramp, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    rows, cols = np.flatnonzero((alpha >= _INK).any(1)), np.flatnonzero((alpha >= _INK).any(0))
    return alpha[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _place(
    rng: np.random.Generator,
    alpha: np.ndarray,
    size: tuple[int, int],
    boxes: list[tuple[int, int, int, int]],
    inks: list[_Ink],
) -> tuple[int, int, int, int] | None:
    """A box in the image for a digit, or None; marks in `inks` what it will hide."""
    height, width = alpha.shape
    for _ in range(30):
        top = int(rng.integers(0, size[0] - height + 1))
        left = int(rng.integers(0, size[1] - width + 1))
        box = (left, top, left + width, top + height)
        hidden = []
        for other, ink in zip(boxes, inks, strict=True):
            overlap = _intersection(box, other)
            if overlap == 0:
                continue
            if overlap > _MAX_BOX_OVERLAP * min(_area(box), _area(other)):
                break
            covered = _cover(box, alpha, other, ink)
            if (ink.alpha * covered).sum() > _MAX_COVER * ink.alpha.sum():
                break
            hidden.append((ink, covered))
        else:
            for ink, covered in hidden:
                ink.covered[:] = covered
            return box
    return None


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _cover(box: tuple, alpha: np.ndarray, other: tuple, ink: _Ink) -> np.ndarray:
    """What of `ink`, in the box `other`, is hidden once a digit is drawn at `box`."""
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[2], other[2]), min(box[3], other[3])
    covered = ink.covered.copy()
    covered[top - other[1] : bottom - other[1], left - other[0] : right - other[0]] |= (
        alpha[top - box[1] : bottom - box[1], left - box[0] : right - box[0]] > 0.1
    )
    return covered


def _draw_color(
    rng: np.random.Generator, under: np.ndarray, alpha: np.ndarray, below: list[np.ndarray]
) -> np.ndarray:
    """A color that a person can tell from what is under the digit, and from its neighbors."""
    luminance = np.sort((under @ _LUMINANCE)[alpha >= _INK])
    bright = luminance[len(luminance) * 9 // 10]
    colors = rng.uniform(0.0, 255.0, (48, 3)).astype(np.float32)
    colors[-1] = 255.0  # always brighter than what is below
    score = (colors @ _LUMINANCE - bright) / _MIN_CONTRAST
    for other in below:
        score = np.minimum(score, np.abs(colors - other).max(1) / 60.0)
    good = score >= 1.0
    return colors[int(np.argmax(good if good.any() else score))]


def _near(rng: np.random.Generator, color: np.ndarray, reach: float) -> np.ndarray:
    """A color at most `reach` from another in each channel."""
    return np.clip(color + rng.uniform(-reach, reach, 3), 0.0, 255.0).astype(np.float32)


def _draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A flat, graded, clouded or patterned image, often with strokes: float32 [H, W, 3]."""
    first = rng.uniform(0.0, 255.0, 3).astype(np.float32)
    first *= min(1.0, _BRIGHTEST_BACKGROUND / float(first @ _LUMINANCE))
    second = _near(rng, first, 60.0)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None]
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    along = x * cos + y * sin
    blend: np.ndarray  # [H, W], the share of the second color
    kind = rng.choice(5)
    if kind == 0:
        blend = np.zeros((height, width), np.float32)
    elif kind == 1:
        blend = (along - along.min()) / (along.max() - along.min())
    elif kind == 2:
        cells = int(rng.integers(3, 9))
        coarse = rng.uniform(0.0, 1.0, (cells, cells)).astype(np.float32)
        blend = np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    elif kind == 3:  # stripes, softer or sharper
        sharpness = float(rng.uniform(1.0, 4.0))
        wave = np.sin(along * (2.0 * np.pi / float(rng.uniform(6.0, 30.0))))
        blend = 0.5 + 0.5 * np.tanh(sharpness * wave)
        second = _near(rng, first, 45.0)
    else:  # a grid of soft cells
        frequency = 2.0 * np.pi / float(rng.uniform(8.0, 30.0))
        across = y * cos - x * sin
        blend = 0.5 + 0.5 * np.sin(along * frequency) * np.sin(across * frequency)
        second = _near(rng, first, 45.0)
    image = first + blend[..., None] * (second - first)
    if rng.random() < 0.5:
        _draw_strokes(rng, image)
    return image


def _draw_strokes(rng: np.random.Generator, image: np.ndarray) -> None:
    """Lines and arcs of little contrast, that are no digits, drawn into a float32 image."""
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(2, 9))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        color = _near(rng, image[int(y), int(x)], 40.0).tolist()
        thickness = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            end = (int(x + rng.uniform(-50, 50)), int(y + rng.uniform(-50, 50)))
            cv2.line(image, (int(x), int(y)), end, color, thickness, cv2.LINE_8)
        else:
            axes = (int(rng.integers(4, 40)), int(rng.integers(4, 40)))
            start = rng.uniform(0.0, 360.0)
            cv2.ellipse(
                image,
                (int(x), int(y)),
                axes,
                rng.uniform(0.0, 180.0),
                start,
                start + rng.uniform(40.0, 200.0),
                color,
                thickness,
                cv2.LINE_8,
            )
