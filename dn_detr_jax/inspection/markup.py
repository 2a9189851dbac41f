"""HTML by functions that escape everything that is not markup already."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

_LARGEST = 640  # pixels of the longer side of an embedded image
_LOSSLESS = 40_000  # pixels of an image up to which PNG is used


class Html(str):
    """Markup. Every other text is escaped where it enters a page."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Makes an element; children are markup, or texts to escape.

    Args:
      tag: name.
      children: content.
      attributes: None leaves one out. A final underscore is dropped, and others become hyphens.
    """
    listed = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{listed}>{joined(children)}</{tag}>")


def joined(children: Iterable[object]) -> Html:
    """Joins markup and texts, which are escaped."""
    return Html(
        "".join(x if isinstance(x, Html) else html.escape(str(x), quote=False) for x in children)
    )


def table(
    headers: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numbers: bool = True,
    **attributes: object,
) -> Html:
    """Makes a table whose first column has the names of the rows.

    Args:
      headers: of the columns.
      rows: cells, texts or markup; an `Html` that begins with `<td` stands for the whole cell.
      numbers: whether the other columns have numbers, which are aligned to the right.
      attributes: of the table.
    """
    class_ = "number" if numbers else None

    def cell(content: object) -> Html:
        if isinstance(content, Html) and content.startswith("<td"):
            return content
        return element("td", content, class_=class_)

    head = [
        element("th", h, scope="col", class_=class_ if i else None) for i, h in enumerate(headers)
    ]
    body = [
        element("tr", element("th", first, scope="row"), *map(cell, rest)) for first, *rest in rows
    ]
    made = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *body),
        **attributes,
    )
    return element("div", made, class_="wide")


def side_by_side(parts: Sequence[tuple[str, Html]]) -> Html:
    """Puts named parts into columns; the name of a single one is left out."""
    if len(parts) == 1:
        return parts[0][1]
    columns = [element("div", element("h4", name), part) for name, part in parts]
    return element("div", *columns, class_="columns")


def image_uri(pixels: np.ndarray) -> str:
    """Encodes uint8 RGB [h, w, 3] or RGBA [h, w, 4] as a data URI, large ones as reduced JPEG."""
    image = Image.fromarray(pixels)
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST))
    small = image.width * image.height <= _LOSSLESS or image.mode == "RGBA"
    return _data_uri(image, "PNG" if small else "JPEG")


def png_uri(pixels: np.ndarray) -> str:
    """Encodes a figure as it is."""
    return _data_uri(Image.fromarray(pixels), "PNG")


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: float, digits: int = 3) -> str:
    """Formats a figure; NaN, where nothing is measured, is a dash."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"
