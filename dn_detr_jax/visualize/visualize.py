"""Pictures to judge a run by: detections, curves, the attention mask, the noise of the groups.

Every `render_...` function returns RGB uint8 [height, width, 3], which TensorBoard takes as it is
and `save_png` writes. Photographs are drawn with Pillow, diagrams with matplotlib's figure objects;
no display, no pyplot, no global state. The colours are those of Okabe and Ito, which colour-blind
people tell apart (https://jfly.uni-koeln.de/color/).

Curves of several runs on the same axes:

    python -m dn_detr_jax visualize curves.png DN-DETR=runs/digits DAB-DETR=runs/plain
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
PREDICTED, TRUE = ORANGE, SKY
_BY_OBJECT = (ORANGE, SKY, GREEN, YELLOW, PURPLE, BLUE)
_BY_RUN = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)

_GAP = 10  # pixels between panels and around a figure
_FONT_SIZE = 12
_LINE = 2
_DASH = 6

# Of the curves: title of the panel, axis label, (key in the metrics file, name, line style) ...
_CURVES = (
    ("Loss, all terms", "loss", (("train/loss", "loss", "-"),)),
    (
        "Classification loss",
        "focal loss",
        (("train/loss_ce", "matching", "-"), ("train/dn_loss_ce", "denoising", "--")),
    ),
    ("Average precision", "AP", (("eval/AP", "AP", "-"), ("eval/AP50", "AP50", "--"))),
    (
        "Instability of matching",
        "changed entries per picture",
        (("eval/instability", "IS", "-"),),
    ),
)
_MOST_POINTS = 250  # per curve; more are averaged, or noise hides one run behind the other


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with what was found in it and what is there; all of it as on the image's pixels.

    Attributes:
      image: uint8 [H, W, 3] RGB, without padding.
      pred_boxes: float [P, 4] xyxy in pixels.
      pred_labels: int [P].
      pred_scores: float [P].
      true_boxes: float [T, 4] xyxy in pixels.
      true_labels: int [T].
      image_id: shown above the picture.
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
    colour: str
    text: str = ""
    dashed: bool = False
    text_colour: str | None = None  # background of the text; default: that of the box


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Writes RGB uint8 [height, width, 3] as a PNG that is complete or not there at all."""
    _save(image, Path(path), format="PNG")


def save_jpeg(image: np.ndarray, path: str | os.PathLike) -> None:
    """As `save_png`, as a JPEG of high quality with colour at full resolution, for thin lines."""
    _save(image, Path(path), format="JPEG", quality=92, subsampling=0)


def _save(image: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(unfinished, **options)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def render_detections(
    pictures: Sequence[Picture],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    cell: int = 448,
) -> np.ndarray:
    """A grid of pictures with predicted boxes (solid, class and score) and true ones (dashed).

    A true box has its class written at it only where no prediction drawn has that class and an IoU
    of at least 0.5 with it, so that the missed objects catch the eye. A text that would hide
    others is left out.

    Args:
      pictures: at least one.
      class_names: by label; a label beyond them is shown as its number.
      score_threshold: predictions below it are not drawn.
      cell: longest side of a picture in the grid, pixels. Small pictures are enlarged by the whole
        number that comes nearest from below, large ones are reduced.

    Raises:
      ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("no pictures to draw detections on")
    panels = []
    for picture in pictures:
        scores = np.asarray(picture.pred_scores)
        kept = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores >= score_threshold)]
        found = _found(picture, kept)
        boxes = [
            _Box(
                picture.pred_boxes[i],
                PREDICTED,
                f"{_name(class_names, picture.pred_labels[i])} {picture.pred_scores[i]:.2f}",
            )
            for i in kept
        ]
        # True boxes last: their dashes leave a solid box below them visible, not the reverse.
        boxes += [
            _Box(box, TRUE, "" if hit else _name(class_names, label), dashed=True)
            for box, label, hit in zip(picture.true_boxes, picture.true_labels, found, strict=True)
        ]
        caption = f"image {picture.image_id}: {len(kept)} predicted, {len(picture.true_boxes)} true"
        panels.append(_panel(picture.image, boxes, caption, cell))
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
    """A picture at its own resolution with boxes, each with class and score, a colour per label.

    Lines and texts are wider on larger pictures. A text that would hide others is left out.

    Args:
      image: uint8 [H, W, 3] RGB.
      boxes: float [n, 4] xyxy in pixels; parts outside the picture are cut off.
      labels: int [n].
      scores: float [n], descending: the first are drawn on top and named first.
      class_names: of every box, n of them.
    """
    height, width = image.shape[:2]
    line = max(_LINE, round(max(height, width) / 400))
    font = _font(max(_FONT_SIZE, round(max(height, width) / 60)))
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    limit = np.array([width, height, width, height]) - 1
    corners = np.clip(np.round(np.asarray(boxes)) - (0, 0, 1, 1), 0, limit).astype(int).tolist()
    objects = [
        _Box(box, _BY_OBJECT[int(label) % len(_BY_OBJECT)], f"{name} {score:.2f}")
        for box, label, score, name in zip(boxes, labels, scores, class_names, strict=True)
    ]
    for box, corner in reversed(list(zip(objects, corners, strict=True))):
        _rectangle(draw, corner, box, line)
    taken: list[tuple[int, int, int, int]] = []
    for box, corner in zip(objects, corners, strict=True):
        _text(draw, font, corner, box, (width, height), taken)
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
    """The picture with its true boxes, then once per denoising group with the noised ones.

    An object has the same colour in every panel; its true box is dashed. A flipped label is shown
    as "true → flipped" on a vermillion ground.

    Args:
      image: uint8 [H, W, 3] RGB, without padding.
      clean_boxes: float [n, 4] xyxy in pixels, n objects.
      noised_boxes: float [G, n, 4] xyxy in pixels, G groups.
      labels: int [n].
      noised_labels: int [G, n].
      class_names: by label; a label beyond them is shown as its number.
      cell: longest side of a picture in the grid, pixels.
    """
    colours = [_BY_OBJECT[i % len(_BY_OBJECT)] for i in range(len(labels))]
    names = [_name(class_names, label) for label in labels]
    clean = [
        _Box(box, colour, dashed=True) for box, colour in zip(clean_boxes, colours, strict=True)
    ]
    titled = [dataclasses.replace(box, text=name) for box, name in zip(clean, names, strict=True)]
    panels = [_panel(image, titled, f"true, {len(labels)} objects", cell)]
    for number, (group_boxes, group_labels) in enumerate(
        zip(noised_boxes, noised_labels, strict=True), start=1
    ):
        flipped = np.asarray(group_labels) != np.asarray(labels)
        noised = [
            _Box(
                group_boxes[i],
                colours[i],
                f"{names[i]} → {_name(class_names, group_labels[i])}" if flipped[i] else names[i],
                text_colour=VERMILLION if flipped[i] else None,
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


def render_attention_mask(mask: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The self-attention mask of the decoder, with its blocks: rows attend to columns.

    Args:
      mask: bool [Q, Q] of one picture or [B, Q, Q] of several, drawn side by side; True: the row's
        query may attend to the column's. Q = S denoising slots + matching queries.
      group: int [S] or [B, S], denoising group of every slot from 0, -1 for a slot of no group.
      valid: bool [S] or [B, S], False for an empty slot.

    Raises:
      ValueError: shapes that don't fit.
    """
    mask, group, valid = np.asarray(mask), np.asarray(group), np.asarray(valid)
    if mask.ndim == 2:
        mask, group, valid = mask[None], group[None], valid[None]
    B, Q = mask.shape[:2]
    S = group.shape[-1]
    if mask.shape != (B, Q, Q) or not group.shape == valid.shape == (B, S) or S > Q:
        raise ValueError(
            "expected mask [B, Q, Q], group [B, S] and valid [B, S] with S <= Q, got "
            f"{mask.shape}, {group.shape} and {valid.shape}"
        )
    figure = Figure(figsize=(6.6 * B + 0.2, 7.2), dpi=100, layout="constrained")
    kinds = (
        ("may attend", BLUE),
        ("may not attend", "#E8E8E8"),
        ("empty slot", "#A0A0A0"),
        ("real query attends to an empty slot", VERMILLION),
    )
    seen: set[int] = set()
    for axes, mask_b, group_b, valid_b in zip(
        figure.subplots(1, B, squeeze=False)[0], mask, group, valid, strict=True
    ):
        real = np.concatenate([valid_b, np.ones(Q - S, bool)])
        kind = np.where(mask_b, 0, 1)
        kind[~real] = 2
        kind[:, ~real] = np.where(mask_b[:, ~real] & real[:, None], 3, 2)
        seen.update(np.unique(kind).tolist())
        axes.imshow(
            kind,
            cmap=ListedColormap([colour for _, colour in kinds]),
            vmin=-0.5,
            vmax=len(kinds) - 0.5,
            interpolation="nearest",
        )
        _label_blocks(axes, group_b, Q)
    figure.legend(
        handles=[
            Patch(facecolor=kinds[k][1], edgecolor=BLACK, label=kinds[k][0]) for k in sorted(seen)
        ],
        loc="outside upper center",
        ncols=2 if B == 1 and len(seen) > 3 else 4,
        frameon=False,
    )
    return _rasterise(figure)


def render_curves(runs: Mapping[str, str | os.PathLike]) -> np.ndarray:
    """Loss, AP and instability over the steps, several runs on the same axes.

    Args:
      runs: name of the run -> its metrics file, one JSON object per line with "step" and scalars
        ("train/loss", "train/loss_ce", "train/dn_loss_ce", "eval/AP", "eval/AP50",
        "eval/instability"). Panels and curves without values are left out.

    Raises:
      ValueError: none of the runs has any of these.
    """
    curves = {name: read_curves(path) for name, path in runs.items()}
    panels = []
    for title, unit, series in _CURVES:
        present = [s for s in series if any(s[0] in run for run in curves.values())]
        if present:
            panels.append((title, unit, present))
    if not panels:
        keys = ", ".join(key for _, _, series in _CURVES for key, _, _ in series)
        raise ValueError(f"no value of {keys} in {', '.join(map(str, runs.values()))}")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.2 * columns, 3.9 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, unit, present) in zip(grid, panels, strict=False):
        for number, (name, run) in enumerate(curves.items()):
            for key, meaning, style in present:
                if key in run:
                    _plot(
                        axes,
                        *run[key],
                        color=_BY_RUN[number % len(_BY_RUN)],
                        linestyle=style,
                        label=f"{name}, {meaning}" if len(present) > 1 else name,
                    )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return _rasterise(figure)


def read_curves(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scalars of a metrics file: key -> (steps int64 [n] ascending, values float64 [n]).

    A resumed run writes steps again: the last value counts. A killed run leaves a line that breaks
    off (the last one, or one in the middle that the resumed run went on writing to): it is skipped.
    So are values that are not finite.
    """
    values: dict[str, dict[int, float]] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                step = int(np.int64(record["step"]))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
            for key, value in record.items():
                if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                if abs(value) <= sys.float_info.max:
                    values.setdefault(key, {})[step] = value
    return {
        key: (
            np.array(sorted(by_step), np.int64),
            np.array([by_step[step] for step in sorted(by_step)], np.float64),
        )
        for key, by_step in values.items()
    }


def _plot(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: str) -> None:
    """One curve; a long one as means of as many neighbouring values as needed."""
    width = math.ceil(len(steps) / _MOST_POINTS)
    starts = np.arange(0, len(steps), width)
    counts = np.diff(np.append(starts, len(steps)))
    axes.plot(
        np.add.reduceat(steps.astype(np.float64), starts) / counts,
        np.add.reduceat(values, starts) / counts,
        marker="o" if len(starts) <= 30 else None,
        markersize=3,
        linewidth=1.6,
        **style,
    )


def _label_blocks(axes: Axes, group: np.ndarray, num_all: int) -> None:
    """Borders around the denoising groups and the matching queries, their names as ticks."""
    changes = np.flatnonzero(np.diff(group)) + 1
    starts = [0, *changes.tolist()] if group.size else []
    names = [f"group {group[s] + 1}" if group[s] >= 0 else "no group" for s in starts]
    if num_all > len(group):
        starts.append(len(group))
        names.append("matching")
    ends = [*starts[1:], num_all]
    thickness = min(0.8, 10 / max(1, len(starts)))  # many borders must not hide what they enclose
    for border in starts[1:]:
        axes.axhline(border - 0.5, color=BLACK, linewidth=thickness)
        axes.axvline(border - 0.5, color=BLACK, linewidth=thickness)
    # Blocks narrower than a line of text take turns: every one of them named would be unreadable.
    positions, texts, free_from = [], [], -math.inf
    for start, end, name in zip(starts, ends, names, strict=True):
        middle = (start + end - 1) / 2
        if middle >= free_from or name == "matching":
            positions.append(middle)
            texts.append(name)
            free_from = middle + num_all / 32
    axes.set_xticks(positions, texts, rotation=90, fontsize=9)
    axes.set_yticks(positions, texts, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("attended to (keys)")
    axes.set_ylabel("attending (queries)")


def _rasterise(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _name(class_names: Sequence[str], label: int) -> str:
    label = int(label)
    return str(class_names[label]) if 0 <= label < len(class_names) else str(label)


def _found(picture: Picture, kept: np.ndarray) -> np.ndarray:
    """bool [T]: a kept prediction has the class of the true box and an IoU of 0.5 with it."""
    pred = np.asarray(picture.pred_boxes, np.float64).reshape(-1, 4)[kept]
    true = np.asarray(picture.true_boxes, np.float64).reshape(-1, 1, 4)
    low = np.maximum(pred[:, :2], true[..., :2])
    high = np.minimum(pred[:, 2:], true[..., 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)  # [T, kept]
    areas = [np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1) for boxes in (pred, true)]
    same = np.asarray(picture.true_labels)[:, None] == np.asarray(picture.pred_labels)[kept]
    return np.any(same & (overlap >= 0.5 * (areas[0] + areas[1] - overlap)), axis=1)


def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    # matplotlib's own font is installed wherever this module can be imported.
    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _panel(image: np.ndarray, boxes: Sequence[_Box], caption: str, cell: int) -> Image.Image:
    """The picture at the size of its cell, its boxes and their texts, a caption above."""
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
    font = _font()
    taken: list[tuple[int, int, int, int]] = []
    for box, corner in zip(boxes, corners, strict=True):
        if box.text:
            _text(draw, font, corner.tolist(), box, size, taken)
    strip = _FONT_SIZE + 8
    panel = Image.new("RGB", (max(size[0], math.ceil(font.getlength(caption))), size[1] + strip))
    panel.paste("white", (0, 0, *panel.size))
    panel.paste(drawn, (0, strip))
    ImageDraw.Draw(panel).text((0, 2), caption, fill=BLACK, font=font)
    return panel


def _rectangle(draw: ImageDraw.ImageDraw, corner: list[int], box: _Box, line: int = _LINE) -> None:
    """A box, its line inwards; between dashes, what is below stays visible."""
    x1, y1, x2, y2 = corner
    x2, y2 = max(x1, x2), max(y1, y2)
    if not box.dashed:
        draw.rectangle((x1, y1, x2, y2), outline=box.colour, width=line)
        return
    right, bottom = max(x1, x2 - line + 1), max(y1, y2 - line + 1)
    for x in range(x1, x2 + 1, 2 * _DASH):
        for y in (y1, bottom):
            end = (min(x + _DASH - 1, x2), min(y + line - 1, y2))
            draw.rectangle((x, y, *end), fill=box.colour)
    for y in range(y1, y2 + 1, 2 * _DASH):
        for x in (x1, right):
            end = (min(x + line - 1, x2), min(y + _DASH - 1, y2))
            draw.rectangle((x, y, *end), fill=box.colour)


def _text(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    corner: list[int],
    box: _Box,
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Writes a box's text at one of its corners; not at all if it hides other texts everywhere.

    `taken` are the places of the texts so far; the new one is added.
    """
    x1, y1, x2, y2 = corner
    width, height = math.ceil(font.getlength(box.text)) + 4, round(font.size) + 3
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
    ground = box.text_colour or box.colour
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
    fill = "white" if ground in (BLUE, VERMILLION, GREEN) else BLACK
    draw.text((x + 2, y + height // 2), box.text, fill=fill, font=font, anchor="lm")


def _grid(
    panels: Sequence[Image.Image], legend: Sequence[tuple[str, str, bool | None]]
) -> np.ndarray:
    """Panels in rows of at most four under a legend of (text, colour, dashed or None: a ground)."""
    font = _font()
    columns = min(4, math.ceil(math.sqrt(len(panels))))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    sample = 34
    legend_width = sum(sample + 6 + math.ceil(font.getlength(text)) + 20 for text, _, _ in legend)
    width = max(sum(widths) + _GAP * (columns + 1), legend_width + _GAP)
    top = _FONT_SIZE + 2 * _GAP
    grid = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    x = _GAP
    for text, colour, dashed in legend:
        middle = top // 2
        if dashed is None:
            draw.rectangle((x, middle - 6, x + sample - 1, middle + 6), fill=colour)
        else:
            step = 2 * _DASH if dashed else sample
            for start in range(x, x + sample, step):
                end = min(start + (_DASH if dashed else sample), x + sample) - 1
                draw.rectangle((start, middle - 1, end, middle + 1), fill=colour)
        draw.text((x + sample + 6, middle), text, fill=BLACK, font=font, anchor="lm")
        x += sample + 6 + math.ceil(font.getlength(text)) + 20
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for panel, column_width in zip(row, widths, strict=False):
            grid.paste(panel, (x, y))
            x += column_width + _GAP
        y += height + _GAP
    return np.asarray(grid)


def _main(arguments: Sequence[str]) -> None:
    named = [argument.partition("=") for argument in arguments[1:]]
    if not named or not all(equals for _, equals, _ in named):
        sys.exit("usage: python -m dn_detr_jax visualize OUT.png NAME=WORKDIR [NAME=WORKDIR ...]")
    runs = {name: Path(workdir) / "metrics.jsonl" for name, _, workdir in named}
    for path in runs.values():
        if not path.is_file():
            sys.exit(f"error: {path}: there is no such file")
    save_png(render_curves(runs), arguments[0])


if __name__ == "__main__":
    _main(sys.argv[1:])
