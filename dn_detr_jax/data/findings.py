"""Everything that is looked for in a data set, and how often each was found.

`KINDS` is the one list: the reader of annotation files and the check count what they find by it,
and the table in docs/own_data.md is made from it (`table`).
"""

from typing import Literal, NamedTuple

from dn_detr_jax.errors import DataError

_EXAMPLES = 5


class Kind(NamedTuple):
    """Something that may be wrong.

    Attributes:
      name: as reports have it.
      severity: "error": no training starts, or it would fail. "warning": a training goes on.
      meaning: what it means, or what a training makes of it, for the table.
    """

    name: str
    severity: Literal["error", "warning"]
    meaning: str


def _error(name: str, meaning: str) -> Kind:
    return Kind(name, "error", meaning)


def _warning(name: str, meaning: str) -> Kind:
    return Kind(name, "warning", meaning)


FILES_NOT_FOUND = _error(
    "files not found",
    "no annotations or no folder of images are there, several fit, or `data.yaml` is damaged",
)
NO_JSON = _error("no JSON", "the annotation file can't be parsed")
NO_COCO = _error("no COCO format", "`images`, `annotations` or `categories` is not a list")
NO_XML = _error("no XML", "a file of Pascal VOC is missing or can't be parsed")
NO_LABELS = _error(
    "no text files of YOLO", "no image has one: they are looked for in `labels/` and beside images"
)
NO_IMAGES = _error("no images", "the list or the folder of images is empty")
NO_CATEGORIES = _error("no categories", "the list of categories is empty, or no object has a name")
MALFORMED_IMAGE = _error(
    "malformed image", "an entry without a usable id, size or file name; its objects are ignored"
)
MALFORMED_CATEGORY = _error(
    "malformed category", "an entry without a usable id or name; its objects are ignored"
)
MALFORMED_ANNOTATION = _error(
    "malformed annotation",
    "an entry without usable ids or box, such as `[]`, a box of strings or of pixels in YOLO",
)
IMAGE_ID_TWICE = _error("image id that comes twice", "objects can't be told apart by image")
CATEGORY_ID_TWICE = _error("category id that comes twice", "objects can't be told apart by class")
UNKNOWN_IMAGE = _error("annotation of an unknown image", "its `image_id` is no image's id")
UNKNOWN_CATEGORY = _error("annotation of an unknown category", "its `category_id` is no class")
MISSING_IMAGE = _error(
    "image that is not on disk",
    "the report adds what is there instead: a backslash, another case, suffix or folder",
)
UNUSABLE_IMAGE = _error(
    "image that can't be used",
    "no image, damaged, of more than 2**28 pixels, or not of the annotated size",
)
SHARES = _error(
    "boxes as shares of the image instead of pixels",
    "most boxes lie between 0 and 1: multiply them by width and height",
)
CORNERS = _error(
    "boxes as corners instead of left, top, width, height",
    "many boxes leave their image by far, and all fit as `[left, top, right, bottom]`",
)
NO_TARGETS = _error(
    "no object to learn from", "no annotations at all, or all are crowd regions or without extent"
)
CLASS_OF_ONE_SPLIT = _error(
    "class that only one of the splits has", "its split has objects of it: both must list it"
)

MAYBE_CORNERS = _warning(
    "boxes that may be corners",
    "all fit as corners, and some leave their image; taken as left, top, width, height",
)
TINY_BOX = _warning(
    "box smaller than a pixel", "a share of the image? Taken as pixels, too small to be learned"
)
NO_EXTENT = _warning("box without extent in its image, no training target", "left out in training")
BEYOND = _warning("box beyond its image, cut in training", "by more than a pixel")
BAD_AREA = _warning(
    "area that is negative or not finite, of no size in the evaluation",
    "AP of small, medium and large objects does not count it",
)
ANNOTATION_ID_TWICE = _warning("annotation id that comes twice", "both objects are used")
LISTED_TWICE = _warning(
    "image that is listed more than once",
    "each entry is an image of its own, with a part of the objects: merge them",
)
EMPTY_CLASS_OF_ONE_SPLIT = _warning(
    "class without objects that only one of the splits has",
    "the classes are those of the training split",
)
EMPTY_CLASS = _warning("class without any object", "the model has an output for it")
NOTHING_TO_EVALUATE = _warning(
    "no object to evaluate on", "the validation split has no objects: AP is not defined"
)
LEAK = _warning(
    "image that is in the training split, too",
    "the same file, or the same content under any name: AP is too high",
)
UNLISTED = _warning("image that no annotation file lists, not used", "in a folder of a split")
OPEN_ORIENTATION = _warning(
    "EXIF orientation that the size leaves open",
    "boxes are taken as drawn on the stored pixels; `data.exif` says it",
)
FEW_BITS = _warning(
    "image of 16 bits that uses fewer",
    "scaled by the bits that it uses (8, 10, 12 or 14), each image by itself; `data.pixel_range` "
    "gives all one range",
)
TOO_MANY_OBJECTS = _warning(
    "more objects than the model has queries",
    "at most `model.num_queries` objects of an image can be found (times `num_patterns`)",
)

KINDS = tuple(value for value in list(globals().values()) if isinstance(value, Kind))


def table() -> str:
    """Returns the table of all kinds, in Markdown."""
    rows = [f"| {kind.severity} | {kind.name} | {kind.meaning} |" for kind in KINDS]
    return "\n".join(["| severity | finding | meaning |", "|---|---|---|", *rows])


class Finding:
    """How often a kind was found, and the first examples."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        return "; ".join(self.examples) + (f"; and {more} more" if more else "")


class Findings:
    """What was found, by the name of the kind.

    Attributes:
      errors: a training can't start, or would fail.
      warnings: a training goes on.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Finding] = {}
        self.warnings: dict[str, Finding] = {}

    def add(self, kind: Kind, example: object) -> None:
        """Counts something that was found; only the first examples are kept."""
        found = self.errors if kind.severity == "error" else self.warnings
        finding = found.setdefault(kind.name, Finding())
        finding.count += 1
        if len(finding.examples) < _EXAMPLES:
            finding.examples.append(shortened(" ".join(str(example).splitlines()), 1000))

    def wants_example(self, kind: Kind) -> bool:
        """Whether an example that takes long to make would be kept."""
        found = self.errors if kind.severity == "error" else self.warnings
        return kind.name not in found or len(found[kind.name].examples) < _EXAMPLES

    def raise_errors(self, source: str, advice: str) -> None:
        """Raises a DataError that names all the errors, if there are any."""
        if self.errors:
            found = ". ".join(f"{kind} ({f.count}): {f}" for kind, f in self.errors.items())
            raise DataError(f"{source}: {found}. {advice}")


def shortened(text: str, length: int = 100) -> str:
    """Shortens a text to a number of characters."""
    return text if len(text) <= length else text[: length - 3] + "..."
