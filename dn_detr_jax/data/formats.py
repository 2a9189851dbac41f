"""The annotations of a split in any of the formats: COCO, YOLO and Pascal VOC."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dn_detr_jax.data import coco, images, voc, yolo
from dn_detr_jax.data import findings as kinds
from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.box_format import check_box_format
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import ImageFolder, SplitFiles
from dn_detr_jax.data.findings import Findings
from dn_detr_jax.files import checksum as file_checksum


def read_annotations(
    files: SplitFiles, findings: Findings, exif: images.Exif = "auto"
) -> tuple[Annotations, tuple[Category, ...]] | None:
    """Reads the annotations of a split.

    Args:
      files: of the split.
      findings: gets what is wrong with them.
      exif: `config.data.exif`.

    Returns:
      Table and categories; what can't be used is left out, and counted as an error. None if nothing
      can be read.

    Raises:
      DataError, OSError: a file that describes or lists others can't be read.
    """
    if files.format == "yolo":
        return yolo.read(files, findings, exif)
    if files.format == "voc":
        return voc.read(files, findings)
    return coco.read_annotations(files.annotations, findings)


def load_split(
    files: SplitFiles, exif: images.Exif = "auto"
) -> tuple[Annotations, tuple[Category, ...]]:
    """Reads the annotations of a split that is to be trained or evaluated on.

    Raises:
      DataError: one line that names everything that would break a training.
      OSError: the annotations can't be read.
    """
    findings = Findings()
    loaded = read_annotations(files, findings, exif)
    if loaded is not None:
        check_box_format(loaded[0], findings)
        check_files(loaded[0].file_names, ImageFolder(files.images), findings)
    advice = (
        f"Images are looked for in {files.images}. Everything at once: python -m dn_detr_jax check "
        "DIR"
    )
    findings.raise_errors(files.source, advice)
    assert loaded is not None  # without errors there is a table
    return loaded


def check_files(file_names: Sequence[str], folder: ImageFolder, findings: Findings) -> list[int]:
    """Counts the images that are not on disk; returns the positions of those that are."""
    present = []
    for position, name in enumerate(file_names):
        if folder.find(name) is not None:
            present.append(position)
            continue
        hint = folder.hint(name) if findings.wants_example(kinds.MISSING_IMAGE) else ""
        findings.add(kinds.MISSING_IMAGE, f"{name}{hint}")
    return present


def checksum(files: SplitFiles, directory: Path) -> str:
    """Returns a checksum of all that the table of a split is made from, except for the images.

    Args:
      files: of the split.
      directory: `config.data.dir`; the checksum stays when all files move together.

    Raises:
      DataError, OSError: a file can't be read.
    """
    if files.format == "coco":
        return file_checksum(files.annotations)
    checksum = hashlib.sha256()
    for part in _parts(files, directory):
        checksum.update(f"{part}\n".encode("utf-8", "surrogateescape"))
    return checksum.hexdigest()


def _parts(files: SplitFiles, directory: Path) -> Iterator[str]:
    if files.format == "yolo":
        names = yolo.image_names(files)
        yield from names
        paths = yolo.files_read(files, names)
    else:
        paths = voc.files_read(files)
    for path in paths:
        yield os.path.relpath(path, directory)
        yield file_checksum(path)
