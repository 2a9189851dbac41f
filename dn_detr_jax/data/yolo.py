"""Data sets in the format of YOLO: a text file of objects for each image, and the class names.

A line of a text file is a class number and a box, center x, center y, width and height as shares of
the image; or a class number and the corners of an outline, x and y in turn, whose bounding box is
taken. An image without a text file has no objects. The format:
https://docs.ultralytics.com/datasets/detect/

Class names and splits are in `data.yaml` (Ultralytics, Roboflow, CVAT), or in `obj.data` (Darknet,
CVAT's "YOLO 1.1"); Label Studio writes `classes.txt`, which has names only.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data import images
from dn_detr_jax.data.annotations import Annotations, ImageRow, ObjectRow, build_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import (
    SPLIT_NAMES,
    ImageFolder,
    SplitFiles,
    find_path,
    is_file,
    is_folder,
    is_plain,
    is_there,
    listing,
    normal_name,
    text_lines,
)
from dn_detr_jax.data.findings import Findings, Kind, shortened
from dn_detr_jax.errors import DataError

_DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "obj.data")
_KEYS = {"train": ("train",), "validation": ("val", "valid", "validation")}
_FARTHEST = 2.0  # a number beyond is no share of an image
_READERS = 8


class _Description(NamedTuple):
    """What a file says of a data set.

    Attributes:
      names: of the classes, by number.
      root: folder that the paths start from.
      paths: folders and list files, by key.
      has_keypoints: whether key points follow the boxes.
    """

    names: dict[int, str]
    root: Path
    paths: dict[str, list[str]]
    has_keypoints: bool = False


def find(directory: Path, split: str) -> SplitFiles | None:
    """Finds a split in a directory; returns None if there is none in this format.

    Args:
      directory: `config.data.dir`.
      split: "train" or "validation".

    Raises:
      DataError: a description that is damaged, or that names what is not there.
    """
    for name in _DESCRIPTIONS:
        path = find_path(directory, name)
        if path is not None and path.is_file():
            return named(path, split)
    others = [path for path in sorted(directory.glob("*.y*ml")) if _describes(path)]
    if len(others) > 1:
        raise DataError(
            f"{directory} has {', '.join(path.name for path in others)}: say which with "
            f"--config.data.{split}.annotations=..."
        )
    if others:
        return named(others[0], split)
    classes = find_path(directory, "classes.txt")
    if classes is not None and find_path(directory, "labels") is not None:
        return named(classes, split)
    return None


def _describes(path: Path) -> bool:
    """Whether a YAML file of any name describes a data set."""
    try:
        content = _parse_yaml(path)
    except (DataError, OSError):
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def named(path: Path, split: str, folder: Path | None = None) -> SplitFiles | None:
    """Returns the files of a split that a description has; None if it has no such split.

    Args:
      path: `data.yaml`, `obj.data` or `classes.txt`, under any name.
      split: "train" or "validation".
      folder: of the images, in place of what the file says.

    Raises:
      DataError: it is damaged, or names what is not there.
    """
    description = _describe(path)
    root = description.root
    if folder is not None:
        return SplitFiles(path, root, "yolo", (folder,))
    if path.suffix == ".txt":
        found = _usual_folder(root, split)
        return None if found is None else SplitFiles(path, root, "yolo", (found,))
    for key in _KEYS[split]:
        entries = [entry for entry in description.paths.get(key, ()) if entry]
        if entries:
            listed = tuple(_resolve(entry, key, path, root) for entry in entries)
            return SplitFiles(path, root, "yolo", listed)
    return None


def _usual_folder(root: Path, split: str) -> Path | None:
    """Returns the folder of a split's images where no file names it."""
    names = [
        form.format(name) for name in SPLIT_NAMES[split] for form in ("images/{}", "{}/images")
    ]
    names += ["images"] if split == "train" else []
    found = (find_path(root, name) for name in names)
    return next((path for path in found if path is not None and path.is_dir()), None)


def _resolve(entry: str, key: str, path: Path, root: Path) -> Path:
    """Returns the path of a folder or list file that a description names.

    Roboflow writes `../train/images` for `train/images`, and CVAT `data/train.txt` for `train.txt`:
    first folders that do not exist are left out.
    """
    plain = entry.replace("\\", "/")
    for name in [plain, *_without_first_folders(plain)]:
        for base in (root, path.parent):
            found = base / name if is_there(base / name) else find_path(base, name)
            if found is not None:
                return Path(os.path.normpath(found))
    raise DataError(
        f"{path}: {key} is {shortened(entry)!r}, but there is no {root / plain}; {root} has "
        f"{listing(root)}"
    )


def _without_first_folders(name: str) -> list[str]:
    """Returns all the ends of a path, the longest first."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _describe(path: Path) -> _Description:
    """Reads `data.yaml`, `obj.data` or `classes.txt`.

    Raises:
      DataError: one line with the file and what is wrong.
    """
    content: Any
    if path.suffix.lower() in (".yaml", ".yml"):
        content = _parse_yaml(path)
    elif path.suffix == ".txt":
        content = {"names": text_lines(path)}
    else:  # of Darknet: "key = value" in each line
        pairs = (line.partition("=") for line in text_lines(path))
        content = {key.strip(): value.strip() for key, _, value in pairs}
        entry = content.get("names") or "obj.names"
        content["names"] = text_lines(_resolve(entry, "names", path, path.parent))
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys such as train, val and names")
    names = _class_names(content.get("names"), path)
    count = content.get("nc", str(len(names)))
    if isinstance(content.get("names"), list) and count != str(len(names)):
        raise DataError(f"{path}: nc is {count}, but names has {len(names)}")
    root = path.parent
    above = content.get("path")
    if isinstance(above, str) and is_folder(path.parent / above):
        root = Path(os.path.normpath(path.parent / above))
    paths = {}
    for key in ("train", *_KEYS["validation"]):
        value = content.get(key) or []
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) and is_plain(entry) for entry in entries):
            raise DataError(f"{path}: {key} is not a folder, a list file or a list of them")
        paths[key] = entries
    return _Description(names, root, paths, "kpt_shape" in content)


def _parse_yaml(path: Path) -> Any:
    """Parses a YAML file; every scalar stays text, so that a class may be called `no` or 1."""
    try:
        return yaml.load(path.read_bytes(), yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: no YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: no YAML ({shortened(reason)})") from error


def _class_names(value: Any, path: Path) -> dict[int, str]:
    """Returns names by number, of a list or of numbers with names."""
    if isinstance(value, list):
        value = {str(number): name for number, name in enumerate(value)}
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: names is missing or empty; expected the names of the classes")
    names: dict[int, str] = {}
    for number, name in value.items():
        if not isinstance(number, str) or not re.fullmatch(r"[0-9]{1,9}", number):
            raise DataError(f"{path}: names has the number {shortened(str(number))!r}")
        if not isinstance(name, str) or not name or not is_plain(name):
            raise DataError(f"{path}: names[{number}] is {shortened(str(name))!r}, expected text")
        names[int(number)] = name
    return names


def image_names(files: SplitFiles) -> list[str]:
    """Returns the names of a split's images, relative to its folder, in order.

    Raises:
      DataError, OSError: a list file can't be read.
    """
    folder = ImageFolder(files.images)
    names: list[str] = []
    for path in files.listed:
        if path.is_dir():
            names += sorted(_relative(image, files.images) for image in _images_below(path))
        else:
            names += [_find(line, path, files.images, folder) for line in text_lines(path)]
    return names


def _images_below(folder: Path) -> Iterator[Path]:
    for above, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(above) / name
            hidden = name.startswith("._")  # macOS keeps attributes of files in such
            if path.suffix.lower() in images.SUFFIXES and not hidden and is_file(path):
                yield path


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _find(line: str, list_file: Path, root: Path, folder: ImageFolder) -> str:
    """Returns the image of a line: from the root, from the list file, or without first folders."""
    plain = posixpath.normpath(line.replace("\\", "/"))
    beside = _relative(Path(os.path.normpath(list_file.parent / plain)), root)
    candidates = [beside, plain] if line.startswith("./") else [plain, beside]
    candidates += _without_first_folders(plain)
    return next((name for name in candidates if folder.find(name)), plain)


def label_path(image: Path) -> Path:
    """Returns the text file of an image: in `labels/` instead of `images/`, or beside it.

    Examples:
      >>> str(label_path(Path("a/images/train/b.jpg")))
      'a/labels/train/b.txt'
    """
    parts = image.parts
    for place in reversed(range(len(parts) - 1)):
        if parts[place].casefold() == "images":
            labels = "labels" if parts[place].islower() else "Labels"
            return Path(*parts[:place], labels, *parts[place + 1 :]).with_suffix(".txt")
    return image.with_suffix(".txt")


def _find_label(image: Path) -> Path | None:
    found = label_path(image)
    if is_file(found):
        return found
    beside = image.with_suffix(".txt")
    return beside if is_file(beside) else None


def files_read(files: SplitFiles, names: Sequence[str]) -> Iterator[Path]:
    """Yields all files that decide what the table of a split of these images is, without them."""
    yield files.annotations
    yield from (path for path in files.listed if path.is_file())
    for name in names:
        label = _find_label(files.images / name)
        if label is not None:
            yield label


class _ImageRead(NamedTuple):
    """An image: height and width, (class, box) of its objects, and what is wrong with it.

    Boxes are left, top, width and height in pixels.
    """

    size: tuple[int, int] | None
    objects: list[tuple[int, list[float]]]
    found: list[tuple[Kind, str]]
    has_label: bool = False


def read(
    files: SplitFiles, findings: Findings, exif: images.Exif = "auto"
) -> tuple[Annotations, tuple[Category, ...]] | None:
    """Reads a split: the sizes of its images from their headers, and its text files.

    Args:
      files: of the split.
      findings: gets what is wrong with it.
      exif: `config.data.exif`; with "auto" boxes lie in the images as shown.

    Returns:
      Table and categories. Images are numbered from 1, classes as in the file. None if nothing can
      be read.

    Raises:
      DataError, OSError: the description or a list file can't be read.
    """
    description = _describe(files.annotations)
    names = image_names(files)
    if not names:
        findings.add(kinds.NO_IMAGES, f"no image in {', '.join(map(str, files.listed))}")
        return None

    def look(name: str) -> _ImageRead:
        return _read_image(files.images, name, description, exif)

    rows: list[ImageRow] = []
    objects: list[ObjectRow] = []
    seen: set[str] = set()
    labels = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for name, image in zip(names, pool.map(look, names), strict=True):
            for kind, text in image.found:
                findings.add(kind, text)
            if image.size is None:
                continue
            if normal_name(name) in seen:
                findings.add(kinds.LISTED_TWICE, name)
            seen.add(normal_name(name))
            labels += image.has_label
            for category_id, box in image.objects:
                area = box[2] * box[3]
                number = len(objects) + 1
                objects.append(ObjectRow(len(rows), number, box, category_id, area, False))
            rows.append(ImageRow(len(rows) + 1, image.size, name))
    if rows and not labels:
        first = label_path(files.images / rows[0].file_name)
        findings.add(kinds.NO_LABELS, f"such as {first}")
    if findings.errors and not rows:
        return None
    categories = sorted(description.names.items())
    return build_table(rows, objects), tuple(Category(*item) for item in categories)


def _read_image(root: Path, name: str, description: _Description, exif: images.Exif) -> _ImageRead:
    path = root / name
    if not is_plain(name):
        return _ImageRead(None, [], [(kinds.MALFORMED_IMAGE, f"{name!r}: a control character")])
    if not is_file(path):
        return _ImageRead(None, [], [(kinds.MISSING_IMAGE, name)])
    try:
        with path.open("rb") as file:
            header = images.read_header(file)
    except (DataError, OSError) as error:
        return _ImageRead(None, [], [(kinds.UNUSABLE_IMAGE, f"{name}: {error}")])
    size = header.size if exif == "as_stored" else header.shown_size
    label = _find_label(path)
    if label is None:
        return _ImageRead(size, [], [])
    shown = _relative(label, root)
    try:
        lines = label.read_bytes().decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        found = [(kinds.MALFORMED_ANNOTATION, f"{shown}: no text ({error})")]
        return _ImageRead(size, [], found, True)
    objects: list[tuple[int, list[float]]] = []
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{shown}, line {number}"
            try:
                objects.append(_read_line(line, size, description))
            except _LineError as error:
                found.append((error.kind, f"{where}: {error}"))
    return _ImageRead(size, objects, found, True)


class _LineError(Exception):
    """A line that is not as the format has it."""

    def __init__(self, text: str, kind: Kind = kinds.MALFORMED_ANNOTATION):
        super().__init__(text)
        self.kind = kind


def _read_line(
    line: str, size: tuple[int, int], description: _Description
) -> tuple[int, list[float]]:
    """Returns the class and the box in pixels of a line."""
    words = line.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise _LineError(f"{shortened(line)!r}, expected numbers") from None
    if not (values[0].is_integer() and values[0] >= 0):
        raise _LineError(f"class {words[0]!r}, expected a whole number of at least 0")
    if int(values[0]) not in description.names:
        text = f"class {words[0]} is none of the {len(description.names)} in names"
        raise _LineError(text, kinds.UNKNOWN_CATEGORY)
    shares = values[1:5] if description.has_keypoints else values[1:]
    if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
        raise _LineError(
            f"{len(words)} numbers, expected a class and center x, center y, width, height, or a "
            "class and at least 3 corners"
        )
    for value in shares:
        if not abs(value) <= _FARTHEST:  # also what is not a number
            raise _LineError(f"{value:g} is no share of the image: expected 0 to 1, not pixels")
    return int(values[0]), _box_in_pixels(shares, size)


def _box_in_pixels(shares: list[float], size: tuple[int, int]) -> list[float]:
    """Returns left, top, width, height of a box or of an outline."""
    height, width = size
    if len(shares) == 4:
        center_x, center_y, box_width, box_height = shares
        left, top = center_x - box_width / 2, center_y - box_height / 2
    else:
        left, top = min(shares[::2]), min(shares[1::2])
        box_width, box_height = max(shares[::2]) - left, max(shares[1::2]) - top
    return [left * width, top * height, box_width * width, box_height * height]
