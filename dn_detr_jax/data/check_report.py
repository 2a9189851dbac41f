"""The report of `data.check` as text: findings, numbers of objects, classes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dn_detr_jax.data.annotations import Annotations, label_categories
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.directory import SplitFiles
from dn_detr_jax.data.findings import Findings
from dn_detr_jax.errors import DataError

NAMES = {"coco": "COCO", "yolo": "YOLO", "voc": "Pascal VOC"}  # of formats
_EXCEEDING = 0.005  # share of the images that may have more objects than the proposed max_objects


class Split(NamedTuple):
    """What was found of a split; without files or annotations if they can't be read at all."""

    name: str
    findings: Findings
    files: SplitFiles | None = None
    annotations: Annotations | None = None
    categories: tuple[Category, ...] = ()
    paths: tuple[Path | None, ...] = ()  # of the images, None where there is no file


def report(splits: Sequence[Split]) -> str:
    """Returns what was found, as text for a person."""
    parts = []
    for split in splits:
        parts.append("\n".join(_describe(split)))
    tables = {split.name: split.annotations for split in splits if split.annotations is not None}
    if tables:
        parts.append(_objects_per_image(*next(iter(tables.items()))))
        parts.append(_classes({category for s in splits for category in s.categories}, tables))
    errors = sum(finding.count for split in splits for finding in split.findings.errors.values())
    warnings = sum(f.count for split in splits for f in split.findings.warnings.values())
    verdict = "This can be trained on."
    if errors:
        verdict = "This can't be trained on yet."
    elif warnings:
        verdict = "This can be trained on, but read the warnings first."
    parts.append(f"{errors} errors, {warnings} warnings. {verdict}")
    return "\n\n".join(parts)


def _describe(split: Split) -> list[str]:
    lines = [f"{split.name}:"]
    if split.files is not None:
        lines.append(
            f"  {NAMES[split.files.format]}: annotations {split.files.source}, images in "
            f"{split.files.images}/"
        )
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


def _objects_per_image(name: str, table: Annotations) -> str:
    counts = table.counts
    proposal, most = propose_max_objects(counts), int(counts.max(initial=0))
    quantiles = np.quantile(counts, (0.5, 0.9, 0.99), method="higher") if len(counts) else [0] * 3
    exceeding = int((counts > proposal).sum())
    return (
        f"objects per image ({name}): median {quantiles[0]}, 90% have up to "
        f"{quantiles[1]}, 99% up to {quantiles[2]}, all up to {most}\n"
        f"  data.max_objects={proposal} would do: {exceeding} images have more, and learn a random "
        f"{proposal} of theirs each time (data.max_objects=0 takes all {max(most, 1)})"
    )


def _classes(found: Iterable[Category], tables: Mapping[str, Annotations]) -> str:
    categories = sorted(found, key=lambda category: (category.id, category.name))
    lines = [f"{len(categories)} classes:"]
    for labels in ("category_ids", "contiguous"):
        try:
            count = str(len(label_categories(categories, labels)))
        except DataError as error:
            count = f"not possible: {error}"
        lines.append(f"  model.num_classes={count} with data.labels={labels}")
    width = max((len(category.name) for category in categories), default=0)
    lines.append(f"  {'id':>6}  {'name':<{width}}  objects in {', '.join(tables)}")
    for category in categories:
        counts = [
            int((table.category_ids[table.targets] == category.id).sum())
            for table in tables.values()
        ]
        cells = "  ".join(f"{count:>9}" for count in counts)
        lines.append(f"  {category.id:>6}  {category.name:<{width}}  {cells}")
    return "\n".join(lines)
