"""Data sets in the format of Pascal VOC: an XML file of objects for each image.

Pixels are numbered from 1, and a box names its first and its last pixel: `xmin` of 1 is the left
edge of the image, `xmax` of its width is the right edge (development kit of VOC 2012, section 5).
Objects that are marked `difficult` are neither learned nor missed, as crowd regions of COCO.
Classes have names only; they are numbered from 0 in alphabetical order, over all the splits.
"""

import math
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data import images
from dn_detr_jax.data.annotations import Annotations, ImageRow, ObjectRow, build_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import (
    SPLIT_NAMES,
    ImageFolder,
    SplitFiles,
    files_in,
    find_path,
    is_plain,
    normal_name,
    text_lines,
)
from dn_detr_jax.data.findings import Findings, Kind, shortened

_LISTS = {
    "train": ("train", "trainval", "default"),  # the last of CVAT
    "validation": ("val", "valid", "validation"),
}
_IMAGE_FOLDERS = ("JPEGImages", "images")  # and the folder above them
_MOST_PIXELS = 2**31 - 1  # of a side


def find(directory: Path, split: str) -> SplitFiles | None:
    """Finds a split in a directory; returns None if there is none in this format.

    Args:
      directory: `config.data.dir`.
      split: "train" or "validation".
    """
    annotations = find_path(directory, "Annotations")
    if annotations is not None and annotations.is_dir():
        for name in _LISTS[split]:
            listed = find_path(directory, f"ImageSets/Main/{name}.txt")
            if listed is not None:
                return SplitFiles(annotations, directory, "voc", (listed,))
        for name in SPLIT_NAMES[split]:
            folder = find_path(annotations, name)
            if folder is not None and _has_xml(folder):
                return SplitFiles(folder, directory, "voc")
        has_lists = find_path(directory, "ImageSets/Main") is not None
        if split == "train" and not has_lists and _has_xml(annotations):
            return SplitFiles(annotations, directory, "voc")
    for name in SPLIT_NAMES[split]:  # of Roboflow: beside the images
        folder = find_path(directory, name)
        if folder is not None and _has_xml(folder):
            return SplitFiles(folder, folder, "voc")
    return None


def named(path: Path) -> SplitFiles | None:
    """Returns the files of a split that the config names; None if it is not in this format.

    Args:
      path: folder of XML files, or a list in `ImageSets/Main`.
    """
    if path.is_dir():
        root = path
        while root.name.casefold() != "annotations" and root != root.parent:
            root = root.parent
        root = root.parent if root != root.parent else path
        return SplitFiles(path, root, "voc") if _has_xml(path) else None
    root = path.parent.parent.parent
    annotations = find_path(root, "Annotations")
    if path.suffix != ".txt" or path.parent.name.casefold() != "main" or annotations is None:
        return None
    return SplitFiles(annotations, root, "voc", (path,))


def _has_xml(folder: Path) -> bool:
    return any(name.lower().endswith(".xml") for name in files_in(folder))


def _xml_files(folder: Path, deep: bool = False) -> list[Path]:
    """Returns the XML files of a folder, in order; those of the folders in it too, if `deep`."""
    folders = [Path(above) for above, _, _ in os.walk(folder)] if deep else [folder]
    paths = [above / name for above in folders for name in files_in(above)]
    return sorted(p for p in paths if p.suffix.lower() == ".xml" and not p.name.startswith("._"))


def _of_split(files: SplitFiles) -> list[Path]:
    """Returns the XML files of a split, those of lists whether they exist or not."""
    if not files.listed:
        return _xml_files(files.annotations, deep=True)
    return [files.annotations / f"{name}.xml" for path in files.listed for name in _listed(path)]


def _listed(path: Path) -> list[str]:
    """Returns the images of a list; those of one class have 1, 0 or -1 behind the name."""
    return [re.sub(r"\s+(-1|0|1)$", "", line) for line in text_lines(path)]


def _of_all_splits(files: SplitFiles) -> list[Path]:
    """Returns the XML files of all the splits, which name the classes."""
    try:
        beside = sorted(files.annotations.parent.glob("*/"))
    except OSError:
        beside = []
    others = [
        path for folder in beside if folder != files.annotations for path in _xml_files(folder)
    ]
    return [*_xml_files(files.annotations, deep=True), *others]


def files_read(files: SplitFiles) -> Iterator[Path]:
    """Yields all files that decide what the table of a split is."""
    yield from files.listed
    yield from _of_all_splits(files)


class _Element:
    """An element of an XML file: its line, its text, and the elements in it by name."""

    def __init__(self, line: int):
        self.line, self.text = line, ""
        self.children: dict[str, list[_Element]] = {}

    def __getitem__(self, path: str) -> "_Element":
        """The first element of a path such as "size/width"; raises _EntryError if it is missing."""
        element = self
        for name in path.split("/"):
            if name not in element.children:
                raise _EntryError(f"{path} is missing", self.line)
            element = element.children[name][0]
        return element

    def get(self, name: str) -> str:
        """The text of an element, empty if it is missing."""
        found = self.children.get(name)
        return found[0].text.strip() if found else ""


class _EntryError(Exception):
    """An element that is not as the format has it."""

    def __init__(self, text: str, line: int):
        super().__init__(text)
        self.line = line


def _parse(path: Path) -> _Element:
    """Parses an XML file; returns an element that has the outermost one.

    Raises:
      _EntryError: it is no XML.
      OSError: it can't be read.
    """
    parser = expat.ParserCreate()
    top = _Element(1)
    open_elements = [top]

    def start(name: str, _: dict[str, str]) -> None:
        element = _Element(parser.CurrentLineNumber)
        open_elements[-1].children.setdefault(name, []).append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        open_elements.pop()

    def text(data: str) -> None:
        open_elements[-1].text += data

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise _EntryError(f"no XML ({expat.ErrorString(error.code)})", error.lineno) from error
    except (ValueError, LookupError) as error:  # an encoding that is not known
        raise _EntryError(f"no XML ({error})", 1) from error
    return top


def read(files: SplitFiles, findings: Findings) -> tuple[Annotations, tuple[Category, ...]] | None:
    """Reads the XML files of a split.

    Args:
      files: of the split.
      findings: gets what is wrong with it.

    Returns:
      Table and categories. Images are numbered from 1. None if nothing can be read.

    Raises:
      DataError, OSError: a list or a file can't be read.
    """
    parsed: dict[Path, _Element | _EntryError] = {}
    for path in _of_all_splits(files):
        try:
            parsed[path] = _parse(path)["annotation"]
        except _EntryError as error:
            parsed[path] = error
    found = [element for element in parsed.values() if isinstance(element, _Element)]
    names = sorted({name for element in found for name in _class_names(element)})
    reader = _Reader(files, {name: number for number, name in enumerate(names)}, findings)
    paths = _of_split(files)
    for path in paths:
        reader.add(path, parsed.get(path))
    if not paths:
        findings.add(kinds.NO_IMAGES, f"no XML file in {files.source}")
    if not names:
        findings.add(kinds.NO_CATEGORIES, f"no object of {files.source} has a name")
    if findings.errors and not (reader.images and names):
        return None
    categories = tuple(Category(number, name) for number, name in enumerate(names))
    return build_table(reader.images, reader.objects), categories


def _class_names(annotation: _Element) -> Iterator[str]:
    for entry in annotation.children.get("object", ()):
        name = entry.get("name")
        if name and is_plain(name):
            yield name


class _Reader:
    """Collects the images and objects of XML files."""

    def __init__(self, files: SplitFiles, numbers: dict[str, int], findings: Findings):
        self.images: list[ImageRow] = []
        self.objects: list[ObjectRow] = []
        self._numbers, self._findings = numbers, findings
        self._folder = ImageFolder(files.images)
        self._annotations = files.annotations
        self._seen: set[str] = set()
        found = (find_path(files.images, name) for name in _IMAGE_FOLDERS)
        self._image_folders = [f"{path.name}/" for path in found if path is not None] + [""]

    def add(self, path: Path, annotation: _Element | _EntryError | None) -> None:
        """Adds the image and the objects of a file."""
        if annotation is None:
            self._findings.add(kinds.NO_XML, f"{path.name}: there is no such file")
        elif isinstance(annotation, _EntryError):
            self._add_error(kinds.NO_XML, path, annotation)
        else:
            try:
                row = self._image(path, annotation)
            except _EntryError as error:
                self._add_error(kinds.MALFORMED_IMAGE, path, error)
                return
            if normal_name(row.file_name) in self._seen:
                self._findings.add(kinds.LISTED_TWICE, row.file_name)
            self._seen.add(normal_name(row.file_name))
            for entry in annotation.children.get("object", ()):
                try:
                    self.objects.append(self._object(entry))
                except _EntryError as error:
                    self._add_error(kinds.MALFORMED_ANNOTATION, path, error)
            self.images.append(row)

    def _add_error(self, kind: Kind, path: Path, error: _EntryError) -> None:
        self._findings.add(kind, f"{path.name}, line {error.line}: {error}")

    def _image(self, path: Path, annotation: _Element) -> ImageRow:
        width, height = (
            _number(annotation[f"size/{side}"], f"size/{side}", least=1)
            for side in ("width", "height")
        )
        if not (width.is_integer() and height.is_integer()):
            raise _EntryError(f"size is {width:g} x {height:g}", annotation["size"].line)
        name = self._find(path, annotation.get("filename").replace("\\", "/"))
        if not is_plain(name):
            line = annotation["filename"].line
            raise _EntryError(f"filename {name!r}, expected text", line)
        return ImageRow(len(self.images) + 1, (int(height), int(width)), name)

    def _find(self, path: Path, file_name: str) -> str:
        """Returns the name of a file's image: as it is written, or that of the XML file."""
        below = path.parent.relative_to(self._annotations).as_posix()
        split = self._annotations.name
        stems = [path.stem + suffix for suffix in images.SUFFIXES]
        stems += [path.stem + suffix.upper() for suffix in images.SUFFIXES]
        last = file_name.rpartition("/")[2]
        for name in [file_name, f"{below}/{last}", *(f"{below}/{stem}" for stem in stems)]:
            plain = posixpath.normpath(name)
            for folder in self._image_folders:
                for full in (f"{folder}{plain}", f"{folder}{split}/{plain}"):
                    if self._folder.find(full):
                        return full
        return f"{self._image_folders[0]}{file_name or path.stem}"

    def _object(self, entry: _Element) -> ObjectRow:
        name = entry.get("name")
        if name not in self._numbers:
            line = entry["name"].line
            raise _EntryError(f"name {shortened(name)!r}, expected text", line)
        left, top, right, bottom = (
            _number(entry[f"bndbox/{side}"], f"bndbox/{side}")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
        left, top = left - 1, top - 1
        box = [left, top, right - left, bottom - top]
        ignored = entry.get("difficult") not in ("", "0")
        number = len(self.objects) + 1
        area = max(box[2], 0.0) * max(box[3], 0.0)
        return ObjectRow(len(self.images), number, box, self._numbers[name], area, ignored)


def _number(element: _Element, name: str, least: float = -math.inf) -> float:
    """Returns the number in an element.

    Raises:
      _EntryError: there is none, or one out of range.
    """
    text = element.text.strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= _MOST_PIXELS or not math.isfinite(value):
        raise _EntryError(f"{name} is {shortened(text)!r}, expected a number", element.line)
    return value
