"""The sections of a report about queries: decoding layer by layer, denoising, matching."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from dn_detr_jax import denoising
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.inspection import charts
from dn_detr_jax.inspection.figures import note
from dn_detr_jax.inspection.markup import (
    Html,
    element,
    joined,
    number,
    png_uri,
    side_by_side,
    table,
)
from dn_detr_jax.inspection.runs import Run, View
from dn_detr_jax.inspection.scenes import attention, box, level_legend, object_color, scene
from dn_detr_jax.inspection.tracing import Trace, cross_attention
from dn_detr_jax.models.registry import loss_settings, num_matching_queries
from dn_detr_jax.visualize.plots import render_attention_mask

if TYPE_CHECKING:
    from dn_detr_jax.inspection.report import Inspected

_MOST_OBJECTS = 8  # of an image, whose queries are shown
_MOST_BOXES = 100  # of an image, in the overview of all queries
_MOST_GROUPS = 5


def decoded(inspected: Sequence["Inspected"], images: Sequence[int]) -> Html:
    """For each image the boxes of all queries, then the attention of single ones, by layer."""
    parts = [
        note(
            "Every query starts from its anchor, a box, and each decoder layer refines it. Colored "
            "boxes belong to the queries that the last layer's matching gives to the objects, gray "
            f"ones to others, of which the {_MOST_BOXES} with the highest scores are drawn. Below, "
            "the query of an object is followed. Dotted: the anchor that the layer starts from; "
            "solid: what it predicts; dashed: the object. The veil is the cross-attention, the "
            "mean over the heads. Deformable attention is drawn as points with the weight as area."
        )
    ]
    for image_id in images:
        columns = []
        for of_run in inspected:
            view = of_run.views.get(image_id)
            if view is not None and view.trace is not None:
                columns.append((of_run.run.name, _decoded(of_run.run, image_id, view, view.trace)))
        if columns:
            first = next(o.views[image_id] for o in inspected if image_id in o.views)
            heading = f"Image {image_id}, {len(first.labels)} objects"
            content = joined([element("summary", heading), side_by_side(columns)])
            parts.append(element("details", content, open=""))
    return joined(parts)


def denoised(inspected: Sequence["Inspected"], images: Sequence[int]) -> Html:
    """The denoising queries that a training would draw for an image, and the attention mask."""
    parts = [
        note(
            "In training, noised copies of the objects go through the decoder as further queries, "
            "in groups. The mask hides them from the matching queries, and the groups from each "
            "other. These are drawn for the first image of the section above. Solid: the noised "
            "box, with both labels if its label is flipped; dashed: the object; dotted: a "
            "contrastive negative, which has to be recognized as no object."
        )
    ]
    columns = []
    for of_run in inspected:
        with_noise = [i for i in images if i in of_run.views and of_run.views[i].dn is not None]
        if not with_noise:
            what = "no denoising" if not of_run.run.setup.config.dn.groups else "no readable image"
            columns.append((of_run.run.name, note(f"This run has {what}.")))
            continue
        image_id = with_noise[0]
        columns.append((of_run.run.name, _denoised(of_run.run, image_id, of_run.views[image_id])))
    return joined([*parts, side_by_side(columns)])


def matched(inspected: Sequence["Inspected"], images: Sequence[int]) -> Html:
    """Which query takes which object in the kept checkpoints, and the instability by layer."""
    columns = []
    for of_run in inspected:
        stability, evaluated = of_run.stability, of_run.evaluated
        kept = ", ".join(map(str, stability.steps))
        parts = [
            element(
                "p",
                f"The run has kept {len(stability.steps)} checkpoints (steps {kept})"
                + (f" of {len(evaluated)} evaluations" if evaluated else "")
                + f"; they are compared on {stability.images} images.",
            )
        ]
        if len(stability.steps) < 2:
            parts.append(note("Two are needed to compare: raise checkpoint.keep_latest."))
        else:
            rows = [
                [f"{before} to {after}", *(number(value, 2) for value in values)]
                for before, after, values in zip(
                    stability.steps, stability.steps[1:], stability.instability, strict=False
                )
            ]
            layers = [f"layer {i + 1}" for i in range(stability.instability.shape[1])]
            parts.append(table(["steps", *layers], rows))
        names = of_run.run.setup.class_names
        for image_id in images:
            if image_id in stability.queries:
                labels = of_run.views[image_id].labels
                parts.append(element("h3", f"Image {image_id}: the query of each object"))
                queries = stability.queries[image_id]
                parts.append(_query_table(stability.steps, queries, [names[i] for i in labels]))
        columns.append((of_run.run.name, joined(parts)))
    about = note(
        "Instability is the number of entries per image that differ in the match vector (which "
        "object each query takes, or none) from one checkpoint to the next, for the matching of "
        "every decoder layer. Denoising is meant to make it small. The curve of the instability "
        "above is that of the last layer at every evaluation of the training. Highlighted: the "
        "object has moved to another query."
    )
    parts = [about]
    comparable = {
        of_run.run.name: of_run.stability for of_run in inspected if len(of_run.stability.steps) > 1
    }
    if any(len(stability.steps) > 2 for stability in comparable.values()):
        parts.append(charts.instability_by_layer(comparable))
    return joined([*parts, side_by_side(columns)])


def _decoded(run: Run, image_id: int, view: View, trace: Trace) -> Html:
    """All queries by layer, and each object's query with its attention."""
    assigned = trace.assignment[-1, view.row]
    objects = [(i, int(q)) for i, q in enumerate(assigned[: len(view.labels)]) if q >= 0]
    parts = [_overview(image_id, view, trace, run, dict(objects))]
    if not trace.maps:
        parts.append(note("The cross-attention of this decoder is not known here."))
    choices = []
    names = run.setup.class_names
    for i, query in objects[:_MOST_OBJECTS]:
        title = f"object {i + 1} ({names[view.labels[i]]}): query {query}"
        layers = [
            _layer_scene(run, image_id, view, trace, layer, i, query)
            for layer in range(len(trace.boxes))
        ]
        content = element("h4", title), element("div", *layers, class_="scenes small")
        choices.append(element("div", *content, class_="choice", data_title=title))
    if len(objects) > _MOST_OBJECTS:
        parts.append(note(f"The first {_MOST_OBJECTS} of {len(objects)} objects."))
    parts.append(element("div", *choices, class_="choices", data_label="Query of"))
    if trace.maps and "cross_sampling_offsets" in trace.maps[0]:
        parts.append(level_legend(len(trace.shapes)))
    return joined(parts)


def _overview(image_id: int, view: View, trace: Trace, run: Run, query_of: dict[int, int]) -> Html:
    """The boxes of all queries: the first anchors, then what every layer predicts."""
    size = view.pixels.shape[:2]
    object_of = {query: i for i, query in query_of.items()}
    best = _scores(trace, run)[-1, view.row].max(axis=-1)
    order = np.argsort(best)[::-1][:_MOST_BOXES]
    shown = [int(q) for q in order[::-1] if int(q) not in object_of] + list(object_of)
    stages = [] if trace.anchors is None else [("anchors of layer 1", trace.anchors[0])]
    stages += [(f"layer {i + 1}", boxes) for i, boxes in enumerate(trace.boxes)]
    scenes = []
    for caption, boxes in stages:
        shapes = [
            box(
                boxes[view.row, query],
                size,
                "other" if query not in object_of else "",
                f"query {query}",
                color=object_color(object_of[query]) if query in object_of else None,
            )
            for query in shown
        ]
        scenes.append(scene(f"image-{image_id}", size, shapes, caption))
    return element("div", *scenes, class_="scenes small")


def _layer_scene(
    run: Run, image_id: int, view: View, trace: Trace, layer: int, number_of: int, query: int
) -> Html:
    """A layer's attention of a query, its anchor, its prediction and the object."""
    size = view.pixels.shape[:2]
    shapes = []
    if trace.maps:
        heads = run.setup.config.model.num_heads
        looks = cross_attention(trace, layer, view.row, query, heads)
        shapes += attention(looks, size, view.canvas)
    shapes.append(box(view.boxes[number_of], size, "true", "object"))
    if trace.anchors is not None:
        anchor = trace.anchors[layer, view.row, query]
        shapes.append(box(anchor, size, "anchor", f"anchor of layer {layer + 1}"))
    shapes.append(
        box(
            trace.boxes[layer, view.row, query],
            size,
            "",
            f"predicted by layer {layer + 1}",
            color=object_color(number_of),
        )
    )
    scores = _scores(trace, run)[layer, view.row, query]
    name = run.setup.class_names[int(scores.argmax())]
    caption = f"layer {layer + 1}: {name} {scores.max():.2f}"
    return scene(f"image-{image_id}", size, shapes, caption)


def _scores(trace: Trace, run: Run) -> np.ndarray:
    """Scores [L, B, N, C] of the classes."""
    class_loss = loss_settings(run.setup.config).class_loss
    return np.asarray(class_loss.scores(jnp.asarray(trace.logits, jnp.float32)))


def _denoised(run: Run, image_id: int, view: View) -> Html:
    """The noised boxes of every group, and the attention mask."""
    assert view.dn is not None
    dn, config, names = view.dn, run.setup.config, run.setup.class_names
    size = view.pixels.shape[:2]
    real = np.asarray(dn.valid[0])
    scenes = []
    groups = np.unique(np.asarray(dn.group[0])[real])
    for group in groups[:_MOST_GROUPS]:
        slots = np.flatnonzero(real & (np.asarray(dn.group[0]) == group))
        shapes = [box(b, size, "true", "object") for b in view.boxes]
        flipped = 0
        for slot in slots:
            shape, is_flipped = _noised_box(dn, int(slot), view, size, names)
            shapes.append(shape)
            flipped += is_flipped
        caption = f"group {group + 1}: {flipped} labels flipped"
        scenes.append(scene(f"image-{image_id}", size, shapes, caption))
    num_queries = num_matching_queries(config.model)
    mask = denoising.attention_mask(dn, num_queries, attend_padding=config.dn.attend_padding)
    drawn = render_attention_mask(
        np.broadcast_to(np.asarray(mask)[0], (dn.num_slots + num_queries,) * 2),
        np.asarray(dn.group[0]),
        real,
    )
    alt = "the attention mask: which query may attend to which"
    figure = element("p", Html(f'<img src="{png_uri(drawn)}" alt="{alt}">'), class_="figure")
    some = note(f"The first {_MOST_GROUPS} of {len(groups)} groups.")
    return joined(
        [
            element("div", *scenes, class_="scenes small"),
            some if len(groups) > _MOST_GROUPS else "",
            figure,
        ]
    )


def _noised_box(
    dn: Denoising, slot: int, view: View, size: tuple[int, int], names: Sequence[str]
) -> tuple[Html, bool]:
    """A noised box, and whether its label is flipped."""
    noised, target = int(dn.labels[0, slot]), int(dn.target_labels[0, slot])
    negative = bool(dn.negative[0, slot])
    distance = np.abs(view.boxes - np.asarray(dn.target_boxes[0, slot])).sum(axis=1)
    number_of = int(distance.argmin())
    is_flipped = not negative and noised != target
    title = "negative" if negative else f"group of {names[target]}"
    label = f"{names[target]} → {names[noised]}" if is_flipped else ""
    color = object_color(number_of)
    kind = "anchor" if negative else ""
    shape = box(np.asarray(dn.boxes[0, slot]), size, kind, title, label=label, color=color)
    return shape, is_flipped


def _query_table(steps: Sequence[int], queries: np.ndarray, names: Sequence[str]) -> Html:
    """Rows are objects, columns checkpoints, cells queries."""
    rows = []
    for i, name in enumerate(names):
        swatch = element("span", class_="bar", style=f"width:.8em;background:{object_color(i)}")
        cells: list[object] = [joined([swatch, f"object {i + 1} ({name})"])]
        for at, query in enumerate(queries[:, i]):
            changed = at > 0 and query != queries[at - 1, i]
            text = str(query) if query >= 0 else "-"
            class_ = "number changed" if changed else "number"
            cells.append(element("td", text, class_=class_))
        rows.append(cells)
    return table(["object", *map(str, steps)], rows, class_="same")
