"""Diagrams of a report as inline SVG, drawn by matplotlib; each shows one run or several.

Text stays text, so that it can be searched and read aloud. matplotlib is imported by the first
diagram.
"""

import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dn_detr_jax.evaluation.matches import Matches
from dn_detr_jax.evaluation.operating_points import Curve
from dn_detr_jax.inspection.calibration import Calibration
from dn_detr_jax.inspection.markup import Html
from dn_detr_jax.inspection.stability import Stability
from dn_detr_jax.visualize.colors import BY_RUN
from dn_detr_jax.visualize.plots import draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRAY = "#C4C4C4"
_MOST_POINTS = 400  # of a curve


def curves(files: Mapping[str, str | os.PathLike]) -> Html:
    """Draws loss, AP and instability from metrics files by the name of the run."""
    return _svg(draw_curves(files))


def precision_and_f1(matches: Mapping[str, Matches]) -> Html:
    """Draws precision over recall, and F1 over the threshold, with the best F1 as a point.

    With one run, the curves of its classes are drawn in gray.
    """
    figure, (left, right) = _panels(2)
    for number, (name, of_run) in enumerate(matches.items()):
        if len(matches) == 1:
            for label in range(of_run.num_classes):
                curve = _thin(Curve.of(of_run, label))
                left.plot(curve.recall, curve.precision, color=_GRAY, linewidth=0.8)
                right.plot(curve.thresholds, curve.f1, color=_GRAY, linewidth=0.8)
        every = Curve.of(of_run)
        color, curve = BY_RUN[number % len(BY_RUN)], _thin(every)
        left.plot(curve.recall, curve.precision, color=color, linewidth=2, label=name)
        right.plot(curve.thresholds, curve.f1, color=color, linewidth=2, label=name)
        best = every.best_threshold()
        if np.isfinite(best):
            point = every.at(best)
            left.plot(point["recall"], point["precision"], "o", color=color)
            right.plot(best, point["F1"], "o", color=color)
            place: dict[str, Any] = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 9}
            right.annotate(f"{best:.3f}", (best, point["F1"]), **place)
    _finish(left, "Precision and recall", "recall", "precision", legend=len(matches) > 1)
    _finish(right, "F1", "lowest score", "F1", legend=len(matches) > 1)
    return _svg(figure)


def reliability(bins: Mapping[str, Calibration]) -> Html:
    """Draws the share of right detections over their score, and the number of detections."""
    figure, (left, right) = _panels(2)
    left.plot([0, 1], [0, 1], color=_GRAY, linewidth=1)
    for number, (name, of_run) in enumerate(bins.items()):
        color = BY_RUN[number % len(BY_RUN)]
        filled = of_run.counts > 0
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "label": name}
        left.plot(of_run.scores[filled], of_run.precision[filled], **style)
        edges = np.linspace(0, 1, len(of_run.counts) + 1)
        right.stairs(of_run.counts, edges, color=color, linewidth=1.6, label=name)
    _finish(left, "Reliability", "score", "share of right detections", legend=len(bins) > 1)
    _finish(right, "Detections by score", "score", "detections", legend=len(bins) > 1)
    most = max(int(of_run.counts.max(initial=1)) for of_run in bins.values())
    right.set_yscale("log")
    right.set_ylim(0.8, 2.0 * most)
    right.yaxis.set_major_formatter("{x:,.0f}")
    return _svg(figure)


def instability_by_layer(stability: Mapping[str, Stability]) -> Html:
    """Draws the instability of every decoder layer between neighboring checkpoints."""
    figure, (axes,) = _panels(1)
    styles = ("-", "--", ":", "-.")
    for number, (name, of_run) in enumerate(stability.items()):
        for layer, values in enumerate(of_run.instability.T):
            color = BY_RUN[layer % len(BY_RUN)]
            label = f"layer {layer + 1}" if len(stability) == 1 else f"{name}, layer {layer + 1}"
            style: dict[str, Any] = {
                "marker": "o",
                "markersize": 4,
                "linestyle": styles[number % len(styles)],
            }
            axes.plot(of_run.steps[1:], values, color=color, label=label, **style)
    title = "Instability between neighboring checkpoints"
    _finish(axes, title, "step", "changed entries per image", legend=True, unit=False)
    return _svg(figure)


def _panels(number: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * number, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _finish(axes: "Axes", title: str, x: str, y: str, *, legend: bool, unit: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if unit:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        for text in axes.legend(fontsize=9, frameon=False).get_texts():
            text.set_parse_math(False)  # the name of a run may have dollar signs


def _thin(curve: Curve) -> Curve:
    """Keeps evenly spaced points of a long curve, and its ends."""
    total = len(curve.thresholds)
    if total <= _MOST_POINTS:
        return curve
    kept = np.unique(np.linspace(0, total - 1, _MOST_POINTS).astype(int))
    return Curve(curve.thresholds[kept], curve.right[kept], curve.wrong[kept], curve.objects)


def _svg(figure: "Figure") -> Html:
    """Writes a figure without a date, a link or a font of its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dn_detr_jax"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    return Html(f'<div class="chart">{drawn[drawn.index("<svg") :]}</div>')
