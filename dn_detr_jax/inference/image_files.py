"""Predictions for image files and URLs: ids by file name, COCO results as JSON, drawn images."""

import dataclasses
import io
import json
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dn_detr_jax.checkpoints.categories import match_labels, matched_categories
from dn_detr_jax.data import coco
from dn_detr_jax.data.annotations import Annotations, label_categories
from dn_detr_jax.data.findings import Findings
from dn_detr_jax.data.images import (
    SUFFIXES,
    Exif,
    PixelRange,
    decode,
    decode_upright,
    read_header,
    size_of_boxes,
)
from dn_detr_jax.errors import DataError
from dn_detr_jax.files import write_text_atomically
from dn_detr_jax.inference.other_outputs import OtherOutputs
from dn_detr_jax.inference.predictor import Predictor, Run
from dn_detr_jax.inference.tiles import TiledPredictor
from dn_detr_jax.inference.urls import Url
from dn_detr_jax.visualize.boxes import draw_detections
from dn_detr_jax.visualize.save import save_jpeg

logger = logging.getLogger(__name__)

_MOST_NAMED = 5  # files named in a message


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file to predict for.

    Attributes:
      path: of the file, or its address.
      image_id: in the results.
      size: annotated height and width, None if there is no annotation.
    """

    path: Path | Url
    image_id: int
    size: tuple[int, int] | None = None


def find_images(arguments: Iterable[str | os.PathLike | Url]) -> list[Path | Url]:
    """Finds the files that are named, and the images in the folders that are named, each once.

    A folder's images are recognized by their suffix, in any case. The log names its other files and
    its subfolders, except for the `._` files of macOS. URLs are not looked at.

    Raises:
      DataError: a missing file or folder, or a folder without images.
    """
    found: dict[Path | Url, None] = {}
    for argument in arguments:
        path = argument if isinstance(argument, Url) else Path(argument)
        if isinstance(path, Path) and path.is_dir():
            found |= dict.fromkeys(_images_in(path))
        elif isinstance(path, Url) or path.exists():
            found[path] = None
        else:
            raise DataError(f"{path}: there is no such file or folder")
    return list(found)


def _images_in(folder: Path) -> list[Path]:
    images, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("._"):  # what macOS stores about a file of that name
            continue
        if path.is_dir():
            others.append(f"{path.name}/")
        elif path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            others.append(path.name)
    if not images:
        raise DataError(f"{folder}: a folder without images ({', '.join(SUFFIXES)})")
    if others:
        logger.warning("%s: not predicted for: %s", folder, _listed(others))
    return images


def number_images(paths: Sequence[Path | Url]) -> list[ImageFile]:
    """Gives every file an image id: the number in its name, or its position.

    The names' numbers are used if every name is a number and no two are equal.

    Examples:
      >>> [f.image_id for f in number_images([Path("000000000139.jpg"), Path("000000000285.jpg")])]
      [139, 285]
      >>> [f.image_id for f in number_images([Path("1.jpg"), Path("01.jpg"), Path("2.jpg")])]
      [0, 1, 2]
    """
    stems = [path.stem for path in paths]
    ids, source = list(range(len(paths))), "positions in the list of files"
    if all(stem.isascii() and stem.isdecimal() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            ids, source = numbers, "the numbers in the file names"
    logger.warning(
        "image ids are invented: they are %s. An AP needs those of an annotation file: "
        "--annotations FILE",
        source,
    )
    return [ImageFile(path, image_id) for path, image_id in zip(paths, ids, strict=True)]


def match_annotations(
    paths: Sequence[Path | Url], annotations: str | os.PathLike, run: Run
) -> tuple[list[ImageFile], Run]:
    """Takes image ids, sizes and category ids from a COCO annotation file.

    Args:
      paths: of the images.
      annotations: path of the annotation file.
      run: whose classes are matched with those of the file by name.

    Returns:
      A file for every path, and the run with the categories of the annotation file.

    Raises:
      DataError: a malformed annotation file, or images that are not in it.
      CheckpointError: other classes.
      OSError: the annotation file can't be read.
    """
    annotations = Path(annotations)
    findings = Findings()
    loaded = coco.read_annotations(annotations, findings)
    findings.raise_errors(str(annotations), "")
    assert loaded is not None  # without errors there is a table
    table, found = loaded
    data = label_categories(found, run.config.data.labels)
    labels = match_labels(run.categories, data, "the run", str(annotations))
    categories = matched_categories(run.categories, data, labels)
    files = _match_images(paths, table, annotations)
    if len(files) < len(table.image_ids):
        logger.warning(
            "%s: %d of its %d images are not among the files; an AP over all of them counts their "
            "objects as missed",
            annotations,
            len(table.image_ids) - len(files),
            len(table.image_ids),
        )
    return files, dataclasses.replace(run, categories=categories)


def _match_images(
    paths: Sequence[Path | Url], table: Annotations, annotations: Path
) -> list[ImageFile]:
    local = [path.path if isinstance(path, Url) else path for path in paths]
    positions = match_file_names(local, table.file_names)
    missing = [str(path) for path, found in zip(paths, positions, strict=True) if not found]
    if missing:
        raise DataError(
            f"{annotations}: {len(missing)} of {len(paths)} images are not in it: "
            f"{_listed(missing)}"
        )
    taken: dict[int, Path | Url] = {}
    files = []
    for path, found in zip(paths, positions, strict=True):
        position = found[0]
        if len(found) > 1:
            ids = [int(table.image_ids[p]) for p in found]
            raise DataError(f"{annotations}: {path} could be any of the images {_listed(ids)}")
        if position in taken:
            name = table.file_names[position]
            raise DataError(f"{annotations}: {path} and {taken[position]} are both its {name}")
        taken[position] = path
        height, width = table.sizes[position].tolist()
        files.append(ImageFile(path, int(table.image_ids[position]), (height, width)))
    return files


def match_file_names(
    paths: Sequence[str | os.PathLike], file_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Finds the annotated file name of every path.

    A path belongs to the longest file name, folders included, that it ends with. If it ends with
    none, it belongs to those with the same last part. Unicode forms of a name are equal, as are
    both kinds of slashes in file names.

    Args:
      paths: of files.
      file_names: of annotated images, relative to a folder that is not known.

    Returns:
      For every path the positions of its file names: one, none, or several that are equally good.

    Examples:
      >>> match_file_names(["data/b/1.jpg", "2.jpg", "3.jpg"], ["a/1.jpg", "b/1.jpg", "c/2.jpg"])
      [(1,), (2,), ()]
    """
    by_last_part = defaultdict(list)
    for position, name in enumerate(file_names):
        parts = _parts(name.replace("\\", "/"))
        by_last_part[parts[-1]].append((parts, position))

    def match(path: str) -> tuple[int, ...]:
        parts = _parts(path)
        candidates = by_last_part.get(parts[-1], [])
        endings = [(name, p) for name, p in candidates if parts[-len(name) :] == name]
        longest = max((len(name) for name, _ in endings), default=0)
        best = [p for name, p in endings if len(name) == longest]
        return tuple(best or [p for _, p in candidates])

    return [match(os.path.abspath(path)) for path in paths]


def _parts(path: str) -> list[str]:
    normalized = unicodedata.normalize("NFC", path)
    return [part for part in normalized.split("/") if part not in ("", ".")] or [""]


def predict_files(
    predictor: Predictor | TiledPredictor,
    files: Sequence[ImageFile],
    out: Path,
    threshold: float,
    *,
    draw: bool = True,
    others: OtherOutputs | None = None,
    exif: Exif = "auto",
) -> list[str]:
    """Predicts for files and writes `detections.json`, `images.json` and drawn images.

    Args:
      predictor: finds the objects.
      files: to predict for. An annotated image is decoded as the evaluation does, another one
        upright.
      out: folder for the results; files of the same names are replaced.
      threshold: lowest score.
      draw: whether to write the images with boxes.
      others: writes what else is wanted of each image.
      exif: `config.data.exif` for annotated images.

    Returns:
      A message for each file that can't be read.

    Raises:
      OSError: `out` can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = _output_names(files)
    failures: list[str] = []
    results: dict[int, list[dict]] = {}
    images: dict[int, dict] = {}

    def readable() -> Iterator[tuple[tuple[int, np.ndarray], np.ndarray]]:
        for index, file in enumerate(tqdm(files, unit=" images", disable=None)):
            try:
                pixels = _read(file, exif, predictor.pixel_range)
            except (DataError, OSError) as error:
                named = isinstance(error, DataError)
                failures.append(str(error) if named else f"{file.path}: {error}")
                continue
            yield (index, pixels), pixels

    for (index, pixels), found in predictor.stream(readable(), threshold):
        file_name, image_id = str(files[index].path), files[index].image_id
        results[index] = [line | {"file_name": file_name} for line in found.to_coco(image_id)]
        height, width = found.size
        images[index] = {
            "id": image_id, "file_name": file_name, "width": width, "height": height
        }  # fmt: skip
        if draw:
            drawn = draw_detections(
                pixels, found.boxes, found.labels, found.scores, found.class_names
            )
            save_jpeg(drawn, out / "pictures" / names[index])
        if others is not None:
            others.write(Path(names[index]).stem, pixels, found)
    in_order = sorted(results)
    _write_json(out / "detections.json", [line for i in in_order for line in results[i]])
    _write_json(out / "images.json", [images[i] for i in in_order])
    return failures


def _read(file: ImageFile, exif: Exif, pixel_range: PixelRange) -> np.ndarray:
    data = file.path.read_bytes()
    try:
        if file.size is None:
            return decode_upright(data, pixel_range)
        header = read_header(io.BytesIO(data))
        return decode(data, size_of_boxes(header, file.size, exif), exif, pixel_range)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from error


def _output_names(files: Sequence[ImageFile]) -> list[str]:
    """A file name for each drawn image, with its id if two files have the same name."""
    stems = [file.path.stem for file in files]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}_{file.image_id}" for stem, file in zip(stems, files, strict=True)]
    return [f"{stem}.jpg" for stem in stems]


def _write_json(path: Path, lines: list[dict]) -> None:
    """Writes a list with one entry per line."""
    text = ",\n".join(json.dumps(line) for line in lines)
    write_text_atomically(path, f"[\n{text}\n]\n")


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:_MOST_NAMED]))
    more = len(names) - _MOST_NAMED
    return shown + (f" and {more} more" if more > 0 else "")
