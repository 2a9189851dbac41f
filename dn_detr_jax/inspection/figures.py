"""The sections of a report that have numbers: summary, curves, classes, confusion, thresholds."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from dn_detr_jax.config import flat_values
from dn_detr_jax.evaluation.matches import Matches
from dn_detr_jax.evaluation.operating_points import CLASS_FIGURES
from dn_detr_jax.inspection import charts
from dn_detr_jax.inspection.calibration import calibration as calibrated
from dn_detr_jax.inspection.markup import Html, element, joined, number, side_by_side, table
from dn_detr_jax.inspection.runs import Run
from dn_detr_jax.training.writers import read_metrics

_SIZES = (("small", "s", "below 32 x 32"), ("medium", "m", ""), ("large", "l", "above 96 x 96"))
_SUMMARY = ("AP", "AP50", "AP75", "AR100", "F1", "precision", "recall", "threshold")


def matches_of(run: Run) -> Matches:
    """The matches of a run's evaluation, which this process has made."""
    assert run.evaluation.matches is not None
    return run.evaluation.matches


def note(*texts: object) -> Html:
    """An explanation."""
    return element("p", *texts, class_="note")


def summary(runs: Sequence[Run]) -> Html:
    """The metrics of the runs, and their settings; of several runs those that differ."""
    rows = [[name, *(number(run.evaluation.metrics[name]) for run in runs)] for name in _SUMMARY]
    last = [_last_instability(run) for run in runs]
    rows.append(["instability, last evaluation", *(number(value, 2) for value in last)])
    rows.insert(0, ["checkpoint, step", *(str(run.step) for run in runs)])
    about = note(
        f"{len(runs[0].image_ids)} validation images, {int(matches_of(runs[0]).counts.sum())} "
        "objects. Precision, recall and F1 are those at an IoU of 0.5 for scores from the "
        "threshold on, at which the F1 of all classes together is best."
    )
    values = [_values(run) for run in runs]
    if len(runs) == 1:
        text = json.dumps(values[0], indent=1, default=str)
        settings = element("details", element("summary", "Settings"), element("pre", text))
    else:
        keys = dict.fromkeys(key for of_run in values for key in of_run)
        different = [
            [key, *(str(of_run.get(key, "-")) for of_run in values)]
            for key in keys
            if len({str(of_run.get(key)) for of_run in values}) > 1
        ]
        heading = element("h3", "Settings that differ")
        settings = joined(
            [
                heading,
                table(["key", *(run.name for run in runs)], different, numbers=False)
                if different
                else note("None."),
            ]
        )
    return joined([about, table(["", *(run.name for run in runs)], rows), settings])


def curves(runs: Sequence[Run]) -> Html:
    """Loss, AP and instability over the steps of the training."""
    files = {run.name: run.workdir / "metrics.jsonl" for run in runs if read_metrics(run.workdir)}
    if not files:
        return note("No metrics.jsonl: nothing was trained in this work directory.")
    try:
        return charts.curves(files)
    except ValueError as error:  # none of the metrics that are drawn
        return note(str(error))


def classes(runs: Sequence[Run]) -> Html:
    """The figures of every class, and AP and AR by the size of objects."""
    figures = ("AP", *CLASS_FIGURES)
    counts = matches_of(runs[0]).counts
    headers: list[object] = ["class", "objects"]
    headers += [
        figure if len(runs) == 1 else f"{figure}, {run.name}" for figure in figures for run in runs
    ]
    rows = []
    for label, name in enumerate(runs[0].class_names):
        cells: list[object] = [name, str(counts[label])]
        for figure in figures:
            for run in runs:
                by_class = run.evaluation.class_figures | {"AP": run.evaluation.per_class}
                value = by_class[figure][name]
                cells.append(_bar(value) if figure == "AP" else number(value))
        rows.append(cells)
    sizes = [
        [
            f"{size} {f'({limits} pixels)' if limits else ''}".strip(),
            *(
                number(run.evaluation.metrics[f"{kind}{suffix}"])
                for kind in ("AP", "AR")
                for run in runs
            ),
        ]
        for size, suffix, limits in _SIZES
    ]
    size_headers = [
        kind if len(runs) == 1 else f"{kind}, {run.name}" for kind in ("AP", "AR") for run in runs
    ]
    about = note(
        "AP and AR are means over IoU 0.50 to 0.95. Precision, recall and F1 are those at the "
        "threshold of all classes; the last column is the threshold with the best F1 of the class."
    )
    return joined(
        [
            about,
            table(headers, rows, class_="sortable"),
            element("h3", "By size of the objects"),
            table(["size", *size_headers], sizes),
        ]
    )


def confusion(runs: Sequence[Run]) -> Html:
    """The confusion matrix of every run, with a row and a column for the background."""
    about = note(
        "Rows are objects, columns what they are detected as at an IoU of at least 0.5, for scores "
        "from the threshold on. Objects in the last column are missed; detections in the last row "
        "fit no object. Shades are shares of a row."
    )
    parts = []
    for run in runs:
        matrix = run.evaluation.confusion
        total = element(
            "p",
            f"{int(matrix[:-1].sum())} objects, {int(matrix[:, :-1].sum())} detections, "
            f"{int(np.trace(matrix))} on the diagonal.",
        )
        parts.append((run.name, joined([_matrix(matrix, run.class_names), total])))
    return joined([about, side_by_side(parts)])


def thresholds(runs: Sequence[Run]) -> Html:
    """Precision, recall and F1 as curves, and the stored threshold."""
    best = [
        f"{run.name}: {number(run.evaluation.metrics['threshold'])}"
        if len(runs) > 1
        else number(run.evaluation.metrics["threshold"])
        for run in runs
    ]
    about = note(
        "At an IoU of 0.5, all classes together. The point is the best F1; its threshold is ",
        element("strong", "; ".join(best)),
        ". A training stores the one of each evaluation with its checkpoint, and "
        "predict takes it unless --threshold names another. ",
        "Gray: single classes." if len(runs) == 1 else "",
    )
    return joined([about, charts.precision_and_f1({run.name: matches_of(run) for run in runs})])


def calibration(runs: Sequence[Run]) -> Html:
    """Whether scores are probabilities."""
    bins = {run.name: calibrated(matches_of(run)) for run in runs}
    about = note(
        "A detection is right if it finds an object of its class at an IoU of 0.5. Points on the "
        "diagonal are scores that equal the share of right detections. The expected calibration "
        "error is the mean over all detections of the distance between the two in their bin."
    )
    headers = ["", *(f"{at / 10:.1f} to {(at + 1) / 10:.1f}" for at in range(10)), "error"]
    rows = []
    for name, of_run in bins.items():
        lead = f"{name}, " if len(runs) > 1 else ""
        rows.append([f"{lead}detections", *map(str, of_run.counts), ""])
        right = [number(value, 2) for value in of_run.precision]
        rows.append([f"{lead}share of right ones", *right, number(of_run.error)])
    return joined([about, charts.reliability(bins), table(headers, rows)])


def _last_instability(run: Run) -> float:
    values = [line.get("eval/instability") for line in read_metrics(run.workdir)]
    known = [value for value in values if value is not None]
    return float(known[-1]) if known else np.nan


def _values(run: Run) -> Mapping[str, object]:
    """The run's settings by key, without those that this inspection has changed."""
    config, left_out = run.setup.config, ("compile.", "mesh.data", "data.skip_bad", "model.remat")
    values = flat_values(config)
    return {key: value for key, value in values.items() if not key.startswith(left_out)}


def _bar(value: float) -> Html:
    """A cell with a figure of 0 to 1 and a bar."""
    if np.isnan(value):
        return element("td", "-", class_="number")
    bar = element("span", class_="bar", style=f"width:{100 * value:.0f}%")
    return element("td", element("span", bar, class_="track"), number(value), class_="number")


def _matrix(matrix: np.ndarray, class_names: Sequence[str]) -> Html:
    columns = [*class_names, "missed"]
    names = [*class_names, "no object"]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = []
    for true, name in enumerate(names):
        cells: list[object] = [name]
        for predicted, count in enumerate(matrix[true]):
            corner = true == predicted == len(class_names)
            share = shares[true, predicted]
            color = "0,114,178" if true == predicted else "213,94,0"
            cells.append(
                element(
                    "td",
                    "" if corner else str(count),
                    class_=None if count else "zero",
                    style=f"background:rgba({color},{0.75 * share:.2f})" if count else None,
                    title=f"{name}: {count} as {columns[predicted]}",
                )
            )
        rows.append(cells)
    return table(["object", *columns], rows, class_="matrix")
