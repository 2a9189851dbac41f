"""Finds the annotation files, folders and images of a directory in COCO format."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dn_detr_jax.config import expand_user
from dn_detr_jax.errors import DataError

_FOLDERS = {
    "train": ("train2017", "train2014", "train"),
    "validation": ("val2017", "val2014", "val", "valid", "validation"),
}
_LISTED = 12  # entries of a folder that a message names


class SplitFiles(NamedTuple):
    """The annotation file of a split, and the folder that its file names start from."""

    annotations: Path
    images: Path


def find_split(directory: Path, split: str, split_config: ConfigDict) -> SplitFiles:
    """Finds the files of a split.

    Args:
      directory: `config.data.dir`.
      split: "train" or "validation".
      split_config: `config.data.train` or `config.data.validation`; what it leaves empty is
        looked for in the usual layouts.

    Returns:
      Annotation file and folder; both exist.

    Raises:
      DataError: nothing is there, or several things are; says what was found or looked for.
    """
    annotations = find_annotations(directory, split, split_config)
    if annotations is None:
        year, _, plain, *_ = _FOLDERS[split]
        usual = [f"annotations/instances_{name}.json" for name in (year, plain)]
        usual += [f"{plain}.json", f"{plain}/_annotations.coco.json and the like"]
        raise DataError(
            _nothing_found(directory, usual, _json_files(directory), f"data.{split}.annotations")
        )
    if split_config.images:
        images = directory / expand_user(split_config.images, f"data.{split}.images")
        if not images.is_dir():
            raise DataError(f"data.{split}.images: there is no folder {images}")
    else:
        folders = _image_folders(directory, split, annotations)
        found = _at_most_one(folders, Path.is_dir, directory, f"data.{split}.images")
        if found is None:
            names = [str(path.relative_to(directory)) + "/" for path in folders]
            raise DataError(
                _nothing_found(directory, names, _listing(directory), f"data.{split}.images")
            )
        images = found
    return SplitFiles(annotations, images)


def find_annotations(directory: Path, split: str, split_config: ConfigDict) -> Path | None:
    """Finds the annotation file of a split; None if the config names none and none is found.

    Raises:
      DataError: the file that the config names is missing, or several are found.
    """
    key = f"data.{split}.annotations"
    if split_config.annotations:
        annotations = directory / expand_user(split_config.annotations, key)
        if not annotations.is_file():
            found = _json_files(directory)
            raise DataError(f"{key}: there is no file {annotations}; {directory} has {found}")
        return annotations
    candidates = [directory / name for name in _annotation_names(split)]
    return _at_most_one(candidates, Path.is_file, directory, key)


def _annotation_names(split: str) -> list[str]:
    names = []
    for name in _FOLDERS[split]:
        names += [f"annotations/instances_{name}.json", f"annotations/{name}.json"]
        names += [f"instances_{name}.json", f"{name}.json"]
        names += [f"{name}/_annotations.coco.json", f"{name}/annotations.json"]
    return names


def _image_folders(directory: Path, split: str, annotations: Path) -> list[Path]:
    """Returns the folders where the images of an annotation file may lie."""
    year = [name for name in _FOLDERS[split] if annotations.stem.endswith(f"_{name}")]
    names = year or [annotations.parent.name, *_FOLDERS[split]]
    folders = [directory / name for name in names if name in _FOLDERS[split]]
    folders += [directory / "images" / name for name in names if name in _FOLDERS[split]]
    if annotations.name == "_annotations.coco.json":  # beside its images
        return [annotations.parent]
    if not any(folder.is_dir() for folder in folders):
        folders.append(directory / "images")
    return folders


def _at_most_one(
    candidates: Sequence[Path], exists: Callable[[Path], bool], directory: Path, key: str
) -> Path | None:
    """Returns the one of some paths that exists; several are a DataError."""
    found = [path for path in dict.fromkeys(candidates) if exists(path)]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(directory)) for path in found)
        raise DataError(f"{directory} has {names}: say which with --config.{key}=...")
    return found[0] if found else None


def _nothing_found(directory: Path, names: Iterable[str], found: str, key: str) -> str:
    return (
        f"{directory} has none of {', '.join(dict.fromkeys(names))}; it has {found}. "
        f"Name the right path, relative to data.dir, with --config.{key}=..."
    )


def _json_files(directory: Path) -> str:
    """The JSON files of a directory and the folders in it, for a message; else its entries."""
    found: list[str] = []
    for folder in (directory, *_folders(directory)):
        files = sorted(name for name in files_in(folder) if name.lower().endswith(".json"))
        found += [str((folder / name).relative_to(directory)) for name in files]
    return f"the JSON files {_some(found)}" if found else _listing(directory)


def _folders(directory: Path) -> Iterator[Path]:
    """The folders of a directory and of those, without those that this package writes."""
    for folder in sorted(directory.glob("*/")):
        if folder.name != "packed":
            yield folder
            yield from sorted(folder.glob("*/"))


def _listing(directory: Path) -> str:
    """The first entries of a folder, for a message."""
    if not directory.is_dir():
        return "nothing, since there is no such folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(directory))
    return _some(names) if names else "nothing in it"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def files_in(folder: Path) -> set[str]:
    """Returns the names of the files of a folder; none if there is no such folder."""
    try:
        # Neither folders nor devices and pipes, which may have no end.
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


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
        found = files.get(last) or files.get(_composed(last))
        if found is None:
            return None
        return f"{folder}/{found}" if folder else found

    def _listed(self, folder: str) -> tuple[str, dict[str, str]]:
        """A folder as it is on disk, and the names of its files by themselves and composed."""
        if folder not in self._folders:
            found = self._on_disk(folder)
            names = sorted(files_in(self._root / found if found else self._root))
            composed = {_composed(name): name for name in names}
            self._folders[folder] = found, composed | {name: name for name in names}
        return self._folders[folder]

    def _on_disk(self, folder: str) -> str:
        """Replaces the parts of a folder that exist in another Unicode form only."""
        if folder.isascii() or _is_folder(self._root / folder):
            return folder
        found = Path()
        for part in folder.split("/"):
            try:
                entries = sorted(entry.name for entry in os.scandir(self._root / found))
            except (OSError, ValueError):
                return folder
            same = [entry for entry in entries if _composed(entry) == _composed(part)]
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
        if above and plain.split("/")[0] == self._root.name and _is_file(self._root.parent / plain):
            return (
                f" (it is there from {self._root.parent}: name the folder that file names start "
                "from with data.train.images and data.validation.images, such as '.')"
            )
        if above and self.find(last):
            return f" ({last} is there, without the folder)"
        return ""


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
