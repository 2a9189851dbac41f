"""The section of a report with the images that have the most errors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dn_detr_jax.inspection.figures import matches_of, note
from dn_detr_jax.inspection.markup import Html, element, number
from dn_detr_jax.inspection.runs import Run, View
from dn_detr_jax.inspection.scenes import box, scene

if TYPE_CHECKING:
    from dn_detr_jax.inspection.report import Inspected

_LOWEST = 0.05  # score of detections that the slider can show
_LEGEND = (
    ("right", "line", "finds an object of its class"),
    ("wrong", "line", "wrong"),
    ("true", "dashed", "object, found"),
    ("missed", "dashed", "object, missed"),
)


def hardest(inspected: Sequence["Inspected"], images: Sequence[int]) -> Html:
    """Images with their objects and detections; a slider moves the lowest score."""
    about = note(
        "Missed objects and wrong detections are counted at the threshold of the run (IoU 0.5); "
        "these images have the most. A box has its score as a tooltip."
    )
    legend = [
        element("span", element("i", class_=line, style=f"border-color:var(--{kind})"), text)
        for kind, line, text in _LEGEND
    ]
    parts = [about, element("p", *legend, class_="legend")]
    for number_of_run, of_run in enumerate(inspected):
        parts.append(_slider(of_run.run, number_of_run, named=len(inspected) > 1))
    sizes = _original_sizes(inspected[0].run)
    pairs = []
    for image_id in images:
        scenes = []
        for number_of_run, of_run in enumerate(inspected):
            view = of_run.views.get(image_id)
            if view is not None:
                lead = f"{of_run.run.name}, " if len(inspected) > 1 else ""
                scenes.append(
                    element(
                        "div",
                        _scene(of_run.run, image_id, view, sizes[image_id], lead),
                        class_=f"scene of-run-{number_of_run}",
                    )
                )
        pairs.append(element("div", *scenes, class_="pair"))
    return element("div", *parts, element("div", *pairs, class_="scenes"), class_="hardest")


def _slider(run: Run, number_of_run: int, *, named: bool) -> Html:
    """A slider that only scripts show."""
    threshold = run.evaluation.metrics["threshold"]
    start = 0.5 if np.isnan(threshold) else threshold
    label = f"Lowest score{f', {run.name}' if named else ''}"
    slider = element(
        "input",
        type="range",
        min=_LOWEST,
        max=1,
        step=0.01,
        value=f"{start:.4f}",
        data_run=number_of_run,
        id=f"lowest-{number_of_run}",
    )
    return element(
        "p",
        element("label", label, for_=f"lowest-{number_of_run}"),
        slider,
        element("output", f"{start:.2f}"),
        class_="slider",
        hidden="",
    )


def _scene(run: Run, image_id: int, view: View, original: tuple[int, int], lead: str) -> Html:
    """An image with the objects below and the detections above."""
    matches, names = matches_of(run), run.class_names
    threshold = run.evaluation.metrics["threshold"]
    size = view.pixels.shape[:2]
    rows = np.flatnonzero(
        (matches.images == image_id) & (matches.scores >= _LOWEST) & ~matches.ignored
    )
    finder = {int(matches.found[row]): float(matches.scores[row]) for row in rows[::-1]}
    shapes, missed = [], 0
    for row in np.flatnonzero((matches.object_images == image_id) & ~matches.object_ignored):
        score = finder.get(int(row), -1.0)
        is_missed = not score >= threshold
        missed += is_missed
        name = names[matches.object_labels[row]]
        shapes.append(
            box(
                _normalized(matches.object_boxes[row], original),
                size,
                "true missed" if is_missed else "true",
                f"object: {name}",
                label=name if is_missed else "",
                data_found=f"{score:.4f}",
            )
        )
    wrong = 0
    for row in rows[::-1]:  # the best on top
        score, correct = float(matches.scores[row]), bool(matches.correct[row])
        is_shown = score >= threshold
        wrong += is_shown and not correct
        name = names[matches.labels[row]]
        shapes.append(
            box(
                _normalized(matches.boxes[row], original),
                size,
                f"{'right' if correct else 'wrong'}{'' if is_shown else ' hidden'}",
                f"{name}, score {score:.3f}, {'right' if correct else 'wrong'}",
                label=f"{name} {number(score, 2)}",
                data_score=f"{score:.4f}",
            )
        )
    caption = f"{lead}image {image_id}: {missed} missed, {wrong} wrong"
    return scene(f"image-{image_id}", size, shapes, caption)


def _normalized(ltwh: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Left, top, width, height in pixels to normalized cxcywh."""
    height, width = size
    left, top, w, h = ltwh
    return np.array([left + w / 2, top + h / 2, w, h]) / (width, height, width, height)


def _original_sizes(run: Run) -> dict[int, tuple[int, int]]:
    """Height and width of the annotated images, in whose pixels boxes are evaluated."""
    assert run.setup.validation is not None
    images = run.setup.validation.coco_ground_truth()["images"]
    return {image["id"]: (image["height"], image["width"]) for image in images}
