"""Diagrams: curves of runs, the attention mask.

Every `render_...` function returns RGB uint8 [height, width, 3], which TensorBoard takes as it is
and `save_png` writes. matplotlib's figure objects draw; there is no display, no pyplot and no
global state. matplotlib is imported by the first diagram: a training starts without it.
"""

import math
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dn_detr_jax.files import read_json_lines
from dn_detr_jax.visualize.colors import BLACK, BLUE, BY_RUN, VERMILLION
from dn_detr_jax.visualize.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        "changed entries per image",
        (("eval/instability", "IS", "-"),),
    ),
)
_MOST_POINTS = 250  # per curve; more are averaged, or noise hides one run behind the other


def render_attention_mask(mask: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Draws the self-attention mask of the decoder with its blocks: rows attend to columns.

    Args:
      mask: bool [Q, Q] of one image or [B, Q, Q] of several, drawn side by side; True: the row's
        query may attend to the column's. Q = S denoising slots + matching queries.
      group: int [S] or [B, S], denoising group of every slot from 0, -1 for a slot of no group.
      valid: bool [S] or [B, S], False for an empty slot.

    Raises:
      ValueError: shapes that don't fit.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

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
            cmap=ListedColormap([color for _, color in kinds]),
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
    return _rasterize(figure)


def render_curves(runs: Mapping[str, str | os.PathLike]) -> np.ndarray:
    """Draws what `draw_curves` does, as pixels."""
    return _rasterize(draw_curves(runs))


def draw_curves(runs: Mapping[str, str | os.PathLike]) -> "Figure":
    """Draws loss, AP and instability over the steps, several runs on the same axes.

    Args:
      runs: name of the run -> its metrics file, one JSON object per line with "step" and scalars
        ("train/loss", "train/loss_ce", "train/dn_loss_ce", "eval/AP", "eval/AP50",
        "eval/instability"). Panels and curves without values are left out.

    Raises:
      ValueError: none of the runs has any of these.
    """
    from matplotlib.figure import Figure

    curves = {drawable(name, 9)[0]: read_curves(path) for name, path in runs.items()}
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
                        color=BY_RUN[number % len(BY_RUN)],
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
        for text in axes.legend(fontsize=9, frameon=False).get_texts():
            text.set_parse_math(False)  # the name of a run may have dollar signs
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def read_curves(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the scalars of a metrics file.

    A resumed run writes steps again: the last value counts. Incomplete lines, which a killed run
    leaves, and values that are not finite are skipped.

    Returns:
      For every key steps int64 [n], ascending, and values float64 [n].

    Raises:
      OSError: the file is missing or can't be read.
    """
    os.stat(path)  # a missing file is an error
    values: dict[str, dict[int, float]] = {}
    for record in read_json_lines(path):
        try:
            step = int(np.int64(record["step"]))
        except (ValueError, TypeError, KeyError, OverflowError):
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


def _plot(axes: "Axes", steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """One curve; a long one as means of as many neighboring values as needed."""
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


def _label_blocks(axes: "Axes", group: np.ndarray, num_all: int) -> None:
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


def _rasterize(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
