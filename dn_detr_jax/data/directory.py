"""Files and folders of a data set, found by name: in any case, in any Unicode form."""

import contextlib
import os
import posixpath
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dn_detr_jax.errors import DataError

Format = Literal["coco", "yolo", "voc"]

# Folders and files of a split are called so by the tools that write them, in any case.
SPLIT_NAMES = {
    "train": ("train2017", "train2014", "train"),
    "validation": ("val2017", "val2014", "val", "valid", "validation"),
}
_LISTED = 12  # entries of a folder that a message names


class SplitFiles(NamedTuple):
    """The files of a split.

    Attributes:
      annotations: COCO: the annotation file. YOLO: the file with the names of the classes. VOC:
        the folder of the XML files.
      images: folder that the names of the images start from.
      format: of the annotations.
      listed: YOLO: folders of images, and files that list images. VOC: files that list images; none
        for all XML files of the folder.
    """

    annotations: Path
    images: Path
    format: Format = "coco"
    listed: tuple[Path, ...] = ()

    @property
    def source(self) -> str:
        """Names the split in messages."""
        if not self.listed:
            return str(self.annotations)
        return f"{self.annotations} ({', '.join(path.name for path in self.listed)})"


def find_path(directory: Path, name: str) -> Path | None:
    """Returns a path below a directory, its parts in any case; None if it does not exist.

    A part that exists as it is named wins over one of another case.
    """
    first, *rest = Path(name).parts or (".",)
    exact = directory / first
    candidates = [exact] if is_there(exact) else []
    if not candidates or rest:
        with contextlib.suppress(OSError, ValueError):
            entries = sorted(entry.name for entry in os.scandir(directory))
            candidates += [directory / e for e in entries if _folded(e) == _folded(first)]
    for path in candidates:
        found = find_path(path, "/".join(rest)) if rest else path
        if found is not None:
            return found
    return None


def _folded(name: str) -> str:
    return composed(name).casefold()


def normal_name(file_name: str) -> str:
    """Returns one spelling for all the spellings of a path."""
    if "/" in file_name:
        file_name = posixpath.normpath(file_name)
    return composed(file_name)


def is_plain(text: str) -> bool:
    """Whether a text has no control characters, and no surrogates, which no encoding has."""
    if text.isprintable():
        return True
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def listing(directory: Path) -> str:
    """Returns the first entries of a folder, for a message."""
    if not directory.is_dir():
        return "nothing, since there is no such folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(directory))
    return some(names) if names else "nothing in it"


def some(names: Sequence[str]) -> str:
    """Returns the first of some names, and how many are left out, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def files_in(folder: Path) -> set[str]:
    """Returns the names of the files of a folder; none if there is no such folder."""
    try:
        # Neither folders nor devices and pipes, which may have no end.
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


def text_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, without spaces around them and without empty ones.

    Raises:
      DataError: it is no text.
      OSError: it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error.reason})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


class ImageFolder:
    """The images of a folder, found by the names that an annotation file has for them.

    Names are compared in Unicode's composed form (NFC): the same name is stored decomposed by some
    systems and annotation tools. Each folder is listed once.
    """

    def __init__(self, root: Path):
        self._root = root
        self._folders: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, name: str) -> str | None:
        """Returns the path of an image as it is on disk, relative to the folder, or None."""
        above, _, last = name.rpartition("/")
        folder, files = self._listed(above)
        found = files.get(last) or files.get(composed(last))
        if found is None:
            return None
        return f"{folder}/{found}" if folder else found

    def _listed(self, folder: str) -> tuple[str, dict[str, str]]:
        """A folder as it is on disk, and the names of its files by themselves and composed."""
        if folder not in self._folders:
            found = self._on_disk(folder)
            names = sorted(files_in(self._root / found if found else self._root))
            by_form = {composed(name): name for name in names}
            self._folders[folder] = found, by_form | {name: name for name in names}
        return self._folders[folder]

    def _on_disk(self, folder: str) -> str:
        """Replaces the parts of a folder that exist in another Unicode form only."""
        if folder.isascii() or is_folder(self._root / folder):
            return folder
        found = Path()
        for part in folder.split("/"):
            try:
                entries = sorted(entry.name for entry in os.scandir(self._root / found))
            except (OSError, ValueError):
                return folder
            same = [entry for entry in entries if composed(entry) == composed(part)]
            found = found / (part if part in entries or not same else same[0])
        return str(found)

    def hint(self, name: str) -> str:
        """Returns what is there instead of a missing image, in words that follow its name."""
        plain = name.replace("\\", "/")
        above, _, last = plain.rpartition("/")
        if plain != name and self.find(plain):
            return f" (a backslash: {plain} is there)"
        files = set(self._listed(above)[1].values())
        by_case = {file.casefold(): file for file in files}
        by_stem = {file.casefold().rpartition(".")[0]: file for file in files}
        other = by_case.get(last.casefold()) or by_stem.get(last.casefold().rpartition(".")[0])
        if other:
            return f" ({other} is there)"
        if above and plain.split("/")[0] == self._root.name and is_file(self._root.parent / plain):
            return (
                f" (it is there from {self._root.parent}: name the folder that file names start "
                "from with data.train.images and data.validation.images, such as '.')"
            )
        if above and self.find(last):
            return f" ({last} is there, without the folder)"
        return ""


def composed(name: str) -> str:
    """Returns a name in Unicode's composed form."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False for names that none can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a path is a file; False for names that none can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether a path exists; False for names that none can have."""
    return is_folder(path) or is_file(path)
