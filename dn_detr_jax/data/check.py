"""Looks a COCO-format directory over before anything is trained on it, and says what is wrong.

    python -m dn_detr_jax check DIR
    python -m dn_detr_jax check DIR --config configs/finetune.py
    python -m dn_detr_jax check DIR --config.data.train.annotations=a.json

Errors would stop a training; the exit status is then 1. With warnings a training goes on, as the
report says. Of the images only the headers are read; `--decode` reads all their pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dn_detr_jax.config import expand_user
from dn_detr_jax.data import coco, images
from dn_detr_jax.data.annotations import Annotations, label_categories
from dn_detr_jax.data.coco import Findings, SplitFiles
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import SPLITS, find_tfds
from dn_detr_jax.errors import DataError

_READERS = 8
_TOLERANCE = 1.0  # pixels that a box may reach beyond its picture: annotation tools round
_EXCEEDING = 0.005  # share of the images that may have more objects than the proposed max_objects


class Split(NamedTuple):
    """What was found of a split; without files or annotations if they can't be read at all."""

    name: str
    findings: Findings
    files: SplitFiles | None = None
    annotations: Annotations | None = None
    categories: tuple[Category, ...] = ()


def check(data_config: ConfigDict, decode: bool = False) -> list[Split]:
    """Checks both splits of a directory, and whether they fit together.

    Args:
      data_config: `config.data`, of which `dir`, `train` and `validation` are read.
      decode: whether to decode the images, too.

    Returns:
      The training split, then the validation split.

    Raises:
      DataError: it is no directory in the format of COCO.
    """
    directory = expand_user(data_config.dir, "data.dir")
    if not directory.is_dir():
        raise DataError(f"{directory}: there is no such folder")
    if find_tfds(directory) is not None:
        raise DataError(
            f"{find_tfds(directory)} is prepared by TFDS, which has checked it; this command is "
            "for directories in the format of COCO"
        )
    splits = [check_split(directory, name, data_config[name], decode) for name in SPLITS]
    _check_both(*splits)
    for split in splits:
        _check_unlisted(split, splits)
    return splits


def check_split(
    directory: Path, name: str, split_config: ConfigDict, decode: bool = False
) -> Split:
    """Checks a split alone: its paths, its annotations, and its images.

    Args:
      directory: in the format of COCO.
      name: "train" or "validation".
      split_config: `config.data.train` or `config.data.validation`.
      decode: whether to decode the images, too.
    """
    findings = Findings()
    try:
        files = coco.find_split(directory, name, split_config)
        loaded = coco.read_annotations(files.annotations, findings)
    except (DataError, OSError) as error:
        findings.error("files not found", error)
        return Split(name, findings)
    if loaded is None:
        return Split(name, findings, files)
    annotations, categories = loaded
    _check_objects(annotations, categories, findings)
    missing = set(coco.missing_files(files.images, annotations.file_names))
    for file_name in annotations.file_names:
        if file_name in missing:
            findings.error("image that is not on disk", file_name)
    _check_images(annotations, files.images, missing, findings, decode)
    return Split(name, findings, files, annotations, categories)


def _check_objects(
    annotations: Annotations, categories: Sequence[Category], findings: Findings
) -> None:
    rows = annotations.rows

    def warn(kind: str, objects: np.ndarray) -> None:
        for k in np.flatnonzero(objects).tolist():
            box = ", ".join(f"{value:g}" for value in annotations.bboxes[k])
            height, width = annotations.sizes[rows[k]].tolist()
            findings.warning(
                kind,
                f"[{box}], annotation {annotations.ids[k]}, in "
                f"{annotations.file_names[rows[k]]} of {width} x {height}",
            )

    warn("box without extent in its image, no training target", annotations.degenerate)
    limits = annotations.sizes[rows, ::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        ends = annotations.bboxes[:, :2] + annotations.bboxes[:, 2:]
        beyond = (annotations.bboxes[:, :2] < -_TOLERANCE) | (ends > limits + _TOLERANCE)
    warn("box beyond its image, cut in training", beyond.any(1) & ~annotations.degenerate)
    bad_area = ~(np.isfinite(annotations.areas) & (annotations.areas >= 0))
    warn("area that is negative or not finite, of no size in the evaluation", bad_area)
    used = set(annotations.category_ids[annotations.targets].tolist())
    for category in categories:
        if category.id not in used:
            findings.warning("class without any object", f"{category.name} ({category.id})")


def _check_images(
    annotations: Annotations, folder: Path, missing: set[str], findings: Findings, decode: bool
) -> None:
    """Compares every image that is there with its annotated size."""
    look = _decode if decode else _read_header
    found = [i for i, name in enumerate(annotations.file_names) if name not in missing]

    def problem(index: int) -> str | None:
        name = annotations.file_names[index]
        try:
            look(folder / name, tuple(annotations.sizes[index].tolist()))
        except (DataError, OSError) as error:
            return f"{name}: {error}"
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        problems = pool.map(problem, found)
        for text in tqdm(problems, "images", len(found), unit=" images", disable=None):
            if text is not None:
                findings.error("image that can't be used", text)


def _read_header(path: Path, size: tuple[int, int]) -> None:
    with path.open("rb") as file:
        images.needs_turn(images.read_header(file), size)


def _decode(path: Path, size: tuple[int, int]) -> None:
    images.decode(path.read_bytes(), size)


def _check_both(train: Split, validation: Split) -> None:
    """Whether no image is in both splits, and both have the same classes."""
    if train.annotations is None or validation.annotations is None:
        return
    seen = set(train.annotations.file_names)
    for name in validation.annotations.file_names:
        if name in seen:
            validation.findings.warning("file name that is in the training split, too", name)
    if set(train.categories) != set(validation.categories):
        for category in sorted(
            set(train.categories) ^ set(validation.categories), key=lambda c: (c.id, c.name)
        ):
            where = "training" if category in train.categories else "validation"
            validation.findings.error(
                "class that only one of the splits has",
                f"{category.name!r} ({category.id}) is in the {where} file",
            )


def _check_unlisted(split: Split, splits: Sequence[Split]) -> None:
    """Warns of pictures in a split's folder that no annotation file mentions."""
    if split.files is None or split.annotations is None:
        return
    listed: set[Path] = set()
    for other in splits:
        if other.files is not None and other.annotations is not None:
            listed.update(other.files.images / name for name in other.annotations.file_names)
    folders = {path.parent for path in listed if path.is_relative_to(split.files.images)}
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in images.SUFFIXES and path not in listed:
                split.findings.warning(
                    "image that no annotation file lists, not used",
                    path.relative_to(split.files.images),
                )


def report(splits: Sequence[Split]) -> str:
    """What was found, as text for a person."""
    parts = []
    for split in splits:
        parts.append("\n".join(_describe(split)))
    readable = [split for split in splits if split.annotations is not None]
    if readable:
        parts.append(_objects_per_image(readable))
        parts.append(_classes(readable))
    errors = sum(finding.count for split in splits for finding in split.findings.errors.values())
    warnings = sum(f.count for split in splits for f in split.findings.warnings.values())
    verdict = "This can be trained on." if not errors else "This can't be trained on yet."
    parts.append(f"{errors} errors, {warnings} warnings. {verdict}")
    return "\n\n".join(parts)


def _describe(split: Split) -> list[str]:
    lines = [f"{split.name}:"]
    if split.files is not None:
        lines.append(f"  annotations {split.files.annotations}, images in {split.files.images}/")
    table = split.annotations
    if table is not None:
        lines.append(
            f"  {len(table.image_ids)} images, {int((table.counts == 0).sum())} of them without "
            f"objects; {int(table.targets.sum())} objects, {int(table.crowd.sum())} crowd regions"
        )
    for label, found in (
        ("error", split.findings.errors),
        ("warning", split.findings.warnings),
    ):
        for kind, finding in found.items():
            lines.append(f"  {label}: {kind} ({finding.count})")
            lines += [f"    {example}" for example in finding.examples]
            more = finding.count - len(finding.examples)
            lines += [f"    and {more} more"] if more else []
    return lines


def propose_max_objects(counts: np.ndarray) -> int:
    """The least multiple of 5 that at most one image in 200 exceeds.

    Args:
      counts: int [N], objects of each image.

    Examples:
      >>> propose_max_objects(np.array([3] * 995 + [40] * 5))
      5
      >>> propose_max_objects(np.array([3] * 990 + [41] * 10))
      45
    """
    allowed = int(_EXCEEDING * len(counts))
    bound = int(np.sort(counts)[::-1][allowed]) if len(counts) else 0
    return max(-(-bound // 5), 1) * 5


def _objects_per_image(splits: Sequence[Split]) -> str:
    counts = splits[0].annotations.counts
    proposal, most = propose_max_objects(counts), int(counts.max(initial=0))
    quantiles = np.quantile(counts, (0.5, 0.9, 0.99), method="higher") if len(counts) else [0] * 3
    exceeding = int((counts > proposal).sum())
    return (
        f"objects per image ({splits[0].name}): median {quantiles[0]}, 90% have up to "
        f"{quantiles[1]}, 99% up to {quantiles[2]}, all up to {most}\n"
        f"  data.max_objects={proposal} would do: {exceeding} images have more, and learn a random "
        f"{proposal} of theirs each time (data.max_objects=0 takes all {max(most, 1)})"
    )


def _classes(splits: Sequence[Split]) -> str:
    categories = sorted(
        {category for split in splits for category in split.categories},
        key=lambda category: (category.id, category.name),
    )
    lines = [f"{len(categories)} classes:"]
    for labels in ("category_ids", "contiguous"):
        try:
            count = str(len(label_categories(categories, labels)))
        except DataError as error:
            count = f"not possible: {error}"
        lines.append(f"  model.num_classes={count} with data.labels={labels}")
    width = max((len(category.name) for category in categories), default=0)
    lines.append(f"  {'id':>6}  {'name':<{width}}  objects in {', '.join(s.name for s in splits)}")
    for category in categories:
        counts = [
            int((split.annotations.category_ids[split.annotations.targets] == category.id).sum())
            for split in splits
        ]
        cells = "  ".join(f"{count:>9}" for count in counts)
        lines.append(f"  {category.id:>6}  {category.name:<{width}}  {cells}")
    return "\n".join(lines)
