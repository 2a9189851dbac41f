"""Finds the annotations and images of the splits of a directory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dn_detr_jax.config import expand_user
from dn_detr_jax.data import voc, yolo
from dn_detr_jax.data.directory import (
    SPLIT_NAMES,
    SplitFiles,
    files_in,
    find_path,
    is_there,
    listing,
    some,
)
from dn_detr_jax.errors import DataError

_NOT_COCO = (".yaml", ".yml", ".data", ".txt")  # suffixes of annotations in other formats
# Files of CVAT and Label Studio for a data set without splits.
_WITHOUT_SPLIT = ("annotations/instances_default.json", "result.json")


def find_split(directory: Path, split: str, split_config: ConfigDict) -> SplitFiles:
    """Finds the files of a split.

    Args:
      directory: `config.data.dir`.
      split: "train" or "validation".
      split_config: `config.data.train` or `config.data.validation`; what it leaves empty is
        looked for in the usual layouts, those of COCO first.

    Returns:
      Annotations and folder; both exist.

    Raises:
      DataError: nothing is there, or several things are; says what was found or looked for.
    """
    found = find_any_split(directory, split, split_config)
    if found is None:
        year, _, plain, *_ = SPLIT_NAMES[split]
        usual = [f"annotations/instances_{name}.json" for name in (year, plain)]
        usual += [f"{plain}.json", f"{plain}/_annotations.coco.json and the like"]
        usual += [f"data.yaml with {plain}", f"ImageSets/Main/{plain}.txt"]
        reason = _nothing_found(
            directory, usual, _json_files(directory), f"data.{split}.annotations"
        )
        advice = (
            "; or evaluate on a fifth of the training images with --config.data.prepare_split=0.2; "
            "or train without evaluation with --config.train.eval_every="
        )
        raise DataError(reason + advice * (split == "validation"))
    return found


def find_any_split(directory: Path, split: str, split_config: ConfigDict) -> SplitFiles | None:
    """As `find_split`; returns None if the config names nothing and nothing is found."""
    images = None
    if split_config.images:
        images = directory / expand_user(split_config.images, f"data.{split}.images")
        if not images.is_dir():
            raise DataError(f"data.{split}.images: there is no folder {images}")
    if not split_config.annotations:
        path = find_annotations(directory, split, split_config)
        if path is None:
            return _other_format(directory, split, images)
    else:
        path = _named(directory, split, split_config)
        if path.is_dir() or path.suffix.lower() in _NOT_COCO:
            found = voc.named(path)
            if found is not None:
                return found._replace(images=images or found.images)
            found = yolo.named(path, split, images) if path.is_file() else None
            if found is None:
                wanted = "the classes of YOLO with such a split" if path.is_file() else "XML files"
                raise DataError(f"data.{split}.annotations: {path} has not {wanted}")
            return found
    return SplitFiles(path, images or _find_images(directory, split, path))


def _other_format(directory: Path, split: str, images: Path | None) -> SplitFiles | None:
    """Finds a split in the format of YOLO or Pascal VOC."""
    found = [yolo.find(directory, split), voc.find(directory, split)]
    if all(found):
        names = ", ".join(str(files.annotations) for files in found if files is not None)
        raise DataError(
            f"{directory} has {names}: say which with --config.data.{split}.annotations=..."
        )
    files = found[0] or found[1]
    if files is None or images is None:
        return files
    of_format = {"listed": (images,)} if files.format == "yolo" else {"images": images}
    return files._replace(**of_format)


def _find_images(directory: Path, split: str, annotations: Path) -> Path:
    """Finds the folder of the images of an annotation file in the format of COCO."""
    if annotations.name == "_annotations.coco.json":  # of Roboflow: beside its images
        return annotations.parent
    if annotations.name == "result.json":  # of Label Studio: names begin with images/
        return annotations.parent
    names = _image_folders(split, annotations)
    found = _existing(directory, names, Path.is_dir, f"data.{split}.images")
    if found is None:
        found = find_path(directory, "images")
    if found is None:
        names = [f"{name}/" for name in [*names, "images"]]
        raise DataError(
            _nothing_found(directory, names, listing(directory), f"data.{split}.images")
        )
    return found


def _image_folders(split: str, annotations: Path) -> list[str]:
    """Returns the folders where the images of an annotation file may lie."""
    known = (*SPLIT_NAMES[split], "default")
    stem = annotations.stem.lower()
    year = [name for name in known if stem.endswith(f"_{name}")]
    names = year or [annotations.parent.name.lower(), *SPLIT_NAMES[split]]
    names = [name for name in names if name in known]
    return [*names, *(f"images/{name}" for name in names)]


def find_annotations(directory: Path, split: str, split_config: ConfigDict) -> Path | None:
    """Finds the annotation file of a split in the format of COCO.

    Returns:
      The file; None if the config names none and none is found.

    Raises:
      DataError: the file that the config names is missing, or several are found.
    """
    if split_config.annotations:
        return _named(directory, split, split_config)
    for names in (_annotation_names(split), _WITHOUT_SPLIT if split == "train" else ()):
        found = _existing(directory, names, Path.is_file, f"data.{split}.annotations")
        if found is not None:
            return found
    return None


def _named(directory: Path, split: str, split_config: ConfigDict) -> Path:
    key = f"data.{split}.annotations"
    annotations = directory / expand_user(split_config.annotations, key)
    if not is_there(annotations):
        found = _json_files(directory)
        raise DataError(f"{key}: there is no file {annotations}; {directory} has {found}")
    return annotations


def _annotation_names(split: str) -> list[str]:
    names = []
    for name in SPLIT_NAMES[split]:
        names += [f"annotations/instances_{name}.json", f"annotations/{name}.json"]
        names += [f"instances_{name}.json", f"{name}.json"]
        names += [f"{name}/_annotations.coco.json", f"{name}/annotations.json"]
    return names


def _existing(
    directory: Path, names: Sequence[str], exists: Callable[[Path], bool], key: str
) -> Path | None:
    """Returns the one of some paths, in any case, that exists; several are a DataError."""
    paths = dict.fromkeys(find_path(directory, name) for name in names)
    found = [path for path in paths if path is not None and exists(path)]
    if len(found) > 1:
        listed = ", ".join(str(path.relative_to(directory)) for path in found)
        raise DataError(f"{directory} has {listed}: say which with --config.{key}=...")
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
    return f"the JSON files {some(found)}" if found else listing(directory)


def _folders(directory: Path) -> Iterator[Path]:
    """The folders of a directory and of those, without those that this package writes."""
    for folder in sorted(directory.glob("*/")):
        if folder.name != "packed":
            yield folder
            yield from sorted(folder.glob("*/"))
