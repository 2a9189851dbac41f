"""Images with what is drawn over them, as inline SVG: boxes, attention, points.

The pixels of an image are embedded once, in `library`; every scene refers to them. Boxes have their
text as a tooltip, without scripts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dn_detr_jax.inspection.markup import Html, element, image_uri, joined
from dn_detr_jax.inspection.tracing import AttentionMap, AttentionPoints
from dn_detr_jax.visualize.colors import BY_OBJECT

_ATTENTION = (213, 94, 0)  # vermillion
_LEVELS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


def library(images: Mapping[str, np.ndarray]) -> Html:
    """Embeds images, uint8 [h, w, 3], under ids that `scene` refers to."""
    embedded = [
        element("image", id=name, width=x.shape[1], height=x.shape[0], href=image_uri(x))
        for name, x in images.items()
    ]
    return element(
        "svg", element("defs", *embedded), width=0, height=0, class_="embedded", aria_hidden="true"
    )


def scene(name: str, size: tuple[int, int], shapes: Sequence[Html], caption: object) -> Html:
    """Shows an image of the library with shapes over it and a caption.

    Args:
      name: id of the image.
      size: its height and width.
      shapes: in coordinates of its pixels.
      caption: text or markup below it.
    """
    height, width = size
    drawing = element(
        "svg",
        element("use", href=f"#{name}"),
        *shapes,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"{name}: {caption}",
    )
    return element("figure", drawing, element("figcaption", caption), class_="scene")


def box(
    cxcywh: np.ndarray,
    size: tuple[int, int],
    kind: str,
    title: str,
    *,
    label: str = "",
    color: str | None = None,
    **data: object,
) -> Html:
    """Draws a normalized box.

    Args:
      cxcywh: normalized.
      size: height and width of the image.
      kind: class of the style: "true", "missed", "right", "wrong", "anchor", "other".
      title: tooltip.
      label: text at the box; none by default.
      color: of the line; by default that of the kind.
      data: attributes for scripts.
    """
    height, width = size
    cx, cy, w, h = (float(v) for v in cxcywh * (width, height, width, height))
    rectangle = element(
        "rect",
        element("title", title),
        x=f"{cx - w / 2:.2f}",
        y=f"{cy - h / 2:.2f}",
        width=f"{max(w, 0):.2f}",
        height=f"{max(h, 0):.2f}",
        style=None if color is None else f"stroke:{color}",
    )
    parts = [rectangle]
    if label:
        font = max(height, width) / 21
        y = cy - h / 2 - 0.15 * font if cy - h / 2 > font else cy + h / 2 + 0.9 * font
        y = min(y, height - 0.15 * font)
        x = min(max(cx - w / 2, 0), max(width - 0.6 * font * len(label), 0))
        parts.append(element("text", label, x=f"{x:.2f}", y=f"{y:.2f}", font_size=f"{font:.2f}"))
    return element("g", *parts, class_=f"box {kind}", **data)


def object_color(number: int) -> str:
    """The color of an object of an image, by its number."""
    return BY_OBJECT[number % len(BY_OBJECT)]


def attention(
    levels: Sequence[AttentionMap] | Sequence[AttentionPoints],
    size: tuple[int, int],
    canvas: tuple[int, int],
) -> list[Html]:
    """Draws where a query looks.

    Dense attention is a veil over the canvas, the mean over the heads, strongest at its largest
    value. Points of deformable attention have a color for each level, and an area by their weight.

    Args:
      levels: of the memory.
      size: height and width of the image.
      canvas: height and width with padding.
    """
    maps = [level for level in levels if isinstance(level, AttentionMap)]
    if maps:
        means = [level.weights.mean(axis=0) for level in maps]
        most = max(float(mean.max()) for mean in means) or 1.0
        return [_veil(mean / most, canvas) for mean in means]
    circles = []
    height, width = size
    for number, level in enumerate(levels):
        assert isinstance(level, AttentionPoints)
        points = zip(level.points.reshape(-1, 2), level.weights.ravel(), strict=True)
        for (x, y), weight in points:
            radius = 0.045 * max(size) * float(weight) ** 0.5
            circles.append(
                element(
                    "circle",
                    element("title", f"level {number + 1}, weight {weight:.3f}"),
                    cx=f"{x * width:.2f}",
                    cy=f"{y * height:.2f}",
                    r=f"{radius:.2f}",
                    fill=_LEVELS[number % len(_LEVELS)],
                )
            )
    return [element("g", *circles, class_="points")]


def level_legend(levels: int) -> Html:
    """Names the colors of the levels, finest first."""
    names = [
        element(
            "span",
            element("i", style=f"background:{_LEVELS[n % len(_LEVELS)]}"),
            f"level {n + 1}{', the finest' if n == 0 and levels > 1 else ''}",
        )
        for n in range(levels)
    ]
    return element("p", joined(names), class_="legend")


def _veil(shares: np.ndarray, canvas: tuple[int, int]) -> Html:
    """A map [h, w] of 0 to 1 as opacity, stretched over the canvas."""
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _ATTENTION
    pixels[..., 3] = np.round(215 * np.clip(shares, 0, 1)).astype(np.uint8)
    height, width = canvas
    return element(
        "image", href=image_uri(pixels), width=width, height=height, preserveAspectRatio="none"
    )
