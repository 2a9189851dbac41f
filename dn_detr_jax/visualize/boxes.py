"""Boxes on images: detections, true boxes, noised boxes.

Every `render_...` function returns RGB uint8 [height, width, 3], which TensorBoard takes as it is
and `save_png` writes. Pillow draws; there is no display and no global state.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dn_detr_jax.visualize.colors import (
    BLACK,
    BLUE,
    BY_OBJECT,
    GREEN,
    PREDICTED,
    TRUE,
    VERMILLION,
)
from dn_detr_jax.visualize.fonts import drawable, font

_GAP = 10  # pixels between panels and around a figure
_FONT_SIZE = 12
_LINE = 2
_DASH = 6


@dataclasses.dataclass(frozen=True)
class LabeledImage:
    """An image with its detections and its objects, in pixels of the image.

    Attributes:
      image: uint8 [H, W, 3] RGB, without padding.
      pred_boxes: float [P, 4] xyxy in pixels.
      pred_labels: int [P].
      pred_scores: float [P].
      true_boxes: float [T, 4] xyxy in pixels.
      true_labels: int [T].
      image_id: shown above the image.
    """

    image: np.ndarray
    pred_boxes: np.ndarray
    pred_labels: np.ndarray
    pred_scores: np.ndarray
    true_boxes: np.ndarray
    true_labels: np.ndarray
    image_id: int


@dataclasses.dataclass(frozen=True)
class _Box:
    xyxy: Sequence[float]
    color: str
    text: str = ""
    dashed: bool = False
    text_color: str | None = None  # background of the text; default: that of the box


def render_detections(
    images: Sequence[LabeledImage],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    cell: int = 448,
) -> np.ndarray:
    """Draws a grid of images with predicted boxes (solid, class and score) and true ones (dashed).

    The class of a true box is written only if no drawn prediction has that class and an IoU of at
    least 0.5 with the box, so that missed objects stand out. A text that would hide others is left
    out.

    Args:
      images: at least one.
      class_names: by label; a label beyond them is shown as its number.
      score_threshold: predictions below it are not drawn.
      cell: longest side of an image in the grid, pixels. Small images are enlarged by the largest
        whole number that fits; large images are reduced.

    Raises:
      ValueError: no images.
    """
    if not images:
        raise ValueError("no images to draw detections on")
    panels = []
    for image in images:
        scores = np.asarray(image.pred_scores)
        kept = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores >= score_threshold)]
        found = _found(image, kept)
        boxes = [
            _Box(
                image.pred_boxes[i],
                PREDICTED,
                f"{_name(class_names, image.pred_labels[i])} {image.pred_scores[i]:.2f}",
            )
            for i in kept
        ]
        # True boxes last: their dashes leave a solid box below them visible, not the reverse.
        boxes += [
            _Box(box, TRUE, "" if hit else _name(class_names, label), dashed=True)
            for box, label, hit in zip(image.true_boxes, image.true_labels, found, strict=True)
        ]
        caption = f"image {image.image_id}: {len(kept)} predicted, {len(image.true_boxes)} true"
        panels.append(_panel(image.image, boxes, caption, cell))
    legend = (
        (f"predicted, score at least {score_threshold:.2f}", PREDICTED, False),
        ("true, named where missed", TRUE, True),
    )
    return _grid(panels, legend)


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
) -> np.ndarray:
    """Draws detections on an image as `draw_boxes` does, with class and score.

    Args:
      image: uint8 [H, W, 3] RGB.
      boxes: float [n, 4] xyxy in pixels; parts outside the image are cut off.
      labels: int [n].
      scores: float [n], descending: the first are drawn on top and named first.
      class_names: of every box, n of them.
    """
    texts = [f"{name} {score:.2f}" for name, score in zip(class_names, scores, strict=True)]
    return draw_boxes(image, boxes, labels, texts)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """Draws boxes on an image at its own resolution, with texts and a color per label.

    Lines and texts are larger on larger images. A text that would hide others is left out.

    Args:
      image: uint8 [H, W, 3] RGB.
      boxes: float [n, 4] xyxy in pixels; parts outside the image are cut off. The first are drawn
        on top.
      labels: int [n].
      texts: of every box, n of them.
    """
    height, width = image.shape[:2]
    line = max(_LINE, round(max(height, width) / 400))
    font_size = max(_FONT_SIZE, round(max(height, width) / 60))
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    limit = np.array([width, height, width, height]) - 1
    corners = np.clip(np.round(np.asarray(boxes)) - (0, 0, 1, 1), 0, limit).astype(int).tolist()
    objects = [
        _Box(box, BY_OBJECT[int(label) % len(BY_OBJECT)], text)
        for box, label, text in zip(boxes, labels, texts, strict=True)
    ]
    for box, corner in reversed(list(zip(objects, corners, strict=True))):
        _rectangle(draw, corner, box, line)
    taken: list[tuple[int, int, int, int]] = []
    for box, corner in zip(objects, corners, strict=True):
        _text(draw, font_size, corner, box, (width, height), taken)
    return np.asarray(drawn)


def render_noised_boxes(
    image: np.ndarray,
    clean_boxes: np.ndarray,
    noised_boxes: np.ndarray,
    labels: np.ndarray,
    noised_labels: np.ndarray,
    class_names: Sequence[str],
    cell: int = 448,
) -> np.ndarray:
    """Draws an image with its true boxes, then once per denoising group with the noised boxes.

    An object has the same color in every panel; its true box is dashed. A flipped label is shown
    as "true → flipped" on a vermillion ground; a negative label is no object.

    Args:
      image: uint8 [H, W, 3] RGB, without padding.
      clean_boxes: float [n, 4] xyxy in pixels, n objects.
      noised_boxes: float [G, n, 4] xyxy in pixels, G groups.
      labels: int [n].
      noised_labels: int [G, n].
      class_names: by label; a label beyond them is shown as its number.
      cell: longest side of an image in the grid, pixels.
    """
    colors = [BY_OBJECT[i % len(BY_OBJECT)] for i in range(len(labels))]
    names = [_name(class_names, label) for label in labels]
    clean = [_Box(box, color, dashed=True) for box, color in zip(clean_boxes, colors, strict=True)]
    titled = [dataclasses.replace(box, text=name) for box, name in zip(clean, names, strict=True)]
    panels = [_panel(image, titled, f"true, {len(labels)} objects", cell)]
    for number, (group_boxes, group_labels) in enumerate(
        zip(noised_boxes, noised_labels, strict=True), start=1
    ):
        flipped = np.asarray(group_labels) != np.asarray(labels)
        noised = [
            _Box(
                group_boxes[i],
                colors[i],
                f"{names[i]} → {_name(class_names, group_labels[i])}" if flipped[i] else names[i],
                text_color=VERMILLION if flipped[i] else None,
            )
            for i in range(len(labels))
        ]
        caption = f"group {number}: {int(flipped.sum())} of {len(labels)} labels flipped"
        panels.append(_panel(image, clean + noised, caption, cell))
    legend = (
        ("noised box", BLACK, False),
        ("true box", BLACK, True),
        ("label flipped", VERMILLION, None),
    )
    return _grid(panels, legend)


def _name(class_names: Sequence[str], label: int) -> str:
    label = int(label)
    if label < 0:
        return "no object"
    return str(class_names[label]) if label < len(class_names) else str(label)


def _found(image: LabeledImage, kept: np.ndarray) -> np.ndarray:
    """bool [T]: a kept prediction has the class of the true box and an IoU of 0.5 with it."""
    pred = np.asarray(image.pred_boxes, np.float64).reshape(-1, 4)[kept]
    true = np.asarray(image.true_boxes, np.float64).reshape(-1, 1, 4)
    low = np.maximum(pred[:, :2], true[..., :2])
    high = np.minimum(pred[:, 2:], true[..., 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)  # [T, kept]
    areas = [np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1) for boxes in (pred, true)]
    same = np.asarray(image.true_labels)[:, None] == np.asarray(image.pred_labels)[kept]
    return np.any(same & (overlap >= 0.5 * (areas[0] + areas[1] - overlap)), axis=1)


def _panel(image: np.ndarray, boxes: Sequence[_Box], caption: str, cell: int) -> Image.Image:
    """Draws an image at the size of its cell, its boxes and their texts, a caption above."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    if scale >= 1:
        scale = math.floor(scale)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resampling = Image.Resampling.BICUBIC if scale >= 1 else Image.Resampling.LANCZOS
    drawn = Image.fromarray(image).resize(size, resampling)
    draw = ImageDraw.Draw(drawn)
    limit = np.array([*size, *size]) - 1
    # Both corners are pixels of the box: the right edge of a box that ends at x lies on x - 1.
    corners = [
        np.clip(np.round(np.asarray(box.xyxy) * scale) - (0, 0, 1, 1), 0, limit).astype(int)
        for box in boxes
    ]
    for box, corner in zip(boxes, corners, strict=True):
        _rectangle(draw, corner.tolist(), box)
    taken: list[tuple[int, int, int, int]] = []
    for box, corner in zip(boxes, corners, strict=True):
        if box.text:
            _text(draw, _FONT_SIZE, corner.tolist(), box, size, taken)
    strip = _FONT_SIZE + 8
    caption_width = math.ceil(font(_FONT_SIZE).getlength(caption))
    panel = Image.new("RGB", (max(size[0], caption_width), size[1] + strip))
    panel.paste("white", (0, 0, *panel.size))
    panel.paste(drawn, (0, strip))
    ImageDraw.Draw(panel).text((0, 2), caption, fill=BLACK, font=font(_FONT_SIZE))
    return panel


def _rectangle(draw: ImageDraw.ImageDraw, corner: list[int], box: _Box, line: int = _LINE) -> None:
    """A box, its line inwards; between dashes, what is below stays visible."""
    x1, y1, x2, y2 = corner
    x2, y2 = max(x1, x2), max(y1, y2)
    if not box.dashed:
        draw.rectangle((x1, y1, x2, y2), outline=box.color, width=line)
        return
    right, bottom = max(x1, x2 - line + 1), max(y1, y2 - line + 1)
    for x in range(x1, x2 + 1, 2 * _DASH):
        for y in (y1, bottom):
            end = (min(x + _DASH - 1, x2), min(y + line - 1, y2))
            draw.rectangle((x, y, *end), fill=box.color)
    for y in range(y1, y2 + 1, 2 * _DASH):
        for x in (x1, right):
            end = (min(x + line - 1, x2), min(y + _DASH - 1, y2))
            draw.rectangle((x, y, *end), fill=box.color)


def _text(
    draw: ImageDraw.ImageDraw,
    font_size: int,
    corner: list[int],
    box: _Box,
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Writes a box's text at one of its corners; not at all if it hides other texts everywhere.

    `taken` are the places of the texts so far; the new one is added.
    """
    text, text_font = drawable(box.text, font_size)
    x1, y1, x2, y2 = corner
    width, height = math.ceil(text_font.getlength(text)) + 4, font_size + 3
    above, below = (y1 - height, y1), (y2 + 1, y2 + 1 - height)
    # Predictions look for room from the top of their box, true boxes from its bottom.
    rows = (*below, *above) if box.dashed else (*above, *below)
    places = [
        (min(max(0, x), max(0, size[0] - width)), min(max(0, y), max(0, size[1] - height)))
        for y in rows
        for x in (x1, x2 + 1 - width)
    ]

    def hidden(place: tuple[int, int]) -> int:
        x, y = place
        return sum(
            max(0, min(x + width, right) - max(x, left))
            * max(0, min(y + height, bottom) - max(y, top))
            for left, top, right, bottom in taken
        )

    x, y = min(places, key=hidden)
    if hidden((x, y)) > width * height // 10:
        return
    taken.append((x, y, x + width, y + height))
    ground = box.text_color or box.color
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
    fill = "white" if ground in (BLUE, VERMILLION, GREEN) else BLACK
    draw.text((x + 2, y + height // 2), text, fill=fill, font=text_font, anchor="lm")


def _grid(
    panels: Sequence[Image.Image], legend: Sequence[tuple[str, str, bool | None]]
) -> np.ndarray:
    """Panels in rows of at most four under a legend of (text, color, dashed or None: a ground)."""
    legend_font = font(_FONT_SIZE)
    columns = min(4, math.ceil(math.sqrt(len(panels))))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    sample = 34
    legend_width = sum(
        sample + 6 + math.ceil(legend_font.getlength(text)) + 20 for text, _, _ in legend
    )
    width = max(sum(widths) + _GAP * (columns + 1), legend_width + _GAP)
    top = _FONT_SIZE + 2 * _GAP
    grid = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    x = _GAP
    for text, color, dashed in legend:
        middle = top // 2
        if dashed is None:
            draw.rectangle((x, middle - 6, x + sample - 1, middle + 6), fill=color)
        else:
            step = 2 * _DASH if dashed else sample
            for start in range(x, x + sample, step):
                end = min(start + (_DASH if dashed else sample), x + sample) - 1
                draw.rectangle((start, middle - 1, end, middle + 1), fill=color)
        draw.text((x + sample + 6, middle), text, fill=BLACK, font=legend_font, anchor="lm")
        x += sample + 6 + math.ceil(legend_font.getlength(text)) + 20
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for panel, column_width in zip(row, widths, strict=False):
            grid.paste(panel, (x, y))
            x += column_width + _GAP
        y += height + _GAP
    return np.asarray(grid)
