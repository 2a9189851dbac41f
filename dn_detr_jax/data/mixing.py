"""Several training splits as one: their images one after the other, their classes by name."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.records import Example, RandomAccess
from dn_detr_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The examples of several sources, one source after the other.

    Can be pickled if the sources can.

    Attributes:
      sources: of the examples.
      labels: for each source int32 [K], the label in the mixture of each of its labels.
    """

    sources: tuple[RandomAccess[Example], ...]
    labels: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, position: int) -> Example:
        if not 0 <= position < len(self):
            raise IndexError(f"index {position} of a split of {len(self)} images")
        for source, labels in zip(self.sources, self.labels, strict=True):
            if position < len(source):
                example = source[position]
                return dataclasses.replace(example, labels=labels[example.labels])
            position -= len(source)
        raise AssertionError("unreachable: the sources have as many images as the mixture")


def match_classes(
    categories: Sequence[Category],
    annotations: Annotations,
    first: Sequence[Category],
    folder: str,
) -> dict[int, int]:
    """Matches the classes of a data set with those of the first one by name.

    Args:
      categories: of the data set, by label; an empty name is no class.
      annotations: its table.
      first: categories of the first data set, by label.
      folder: of the data set, for messages.

    Returns:
      The label in the first data set of each category id; classes that it lacks are left out.

    Raises:
      DataError: the data set has objects of a class that the first one lacks, or a name stands for
        several classes.
    """
    label_of: dict[str, int] = {}
    for label, category in enumerate(first):
        if category.name and category.name in label_of:
            raise DataError(
                f"data.mix: {category.name!r} is the name of several classes of data.dir: classes "
                "of several data sets can't be matched by name"
            )
        label_of[category.name] = label
    used = set(annotations.category_ids.tolist())
    found: dict[int, int] = {}
    for category in categories:
        if category.name and category.name in label_of:
            found[category.id] = label_of[category.name]
        elif category.id in used:
            near = [name for name in label_of if _plain(name) == _plain(category.name)]
            advice = f"there it is {near[0]!r}: use one name" if near else "list it there, too"
            raise DataError(
                f"data.mix: {folder} has objects of the class {category.name!r}, which is no class "
                f"of data.dir; {advice}"
            )
    names = [category.name for category in categories if category.id in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"data.mix: {folder}: {twice[0]!r} is the name of several classes")
    return found


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def concatenated(
    tables: Sequence[Annotations], category_ids: Sequence[np.ndarray], folders: Sequence[str]
) -> Annotations:
    """Returns the table of several splits together.

    Args:
      tables: of the splits.
      category_ids: for each table int64 [K], the category ids of its objects in the result.
      folders: put in front of the file names; empty: nothing is.
    """
    starts = np.cumsum([0, *(len(table.ids) for table in tables)])
    offsets = [table.offsets[:-1] + start for table, start in zip(tables, starts, strict=False)]

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(table, field) for table in tables])

    return Annotations(
        image_ids=joined("image_ids"),
        sizes=joined("sizes"),
        file_names=tuple(
            f"{folder}/{name}" if folder else name
            for table, folder in zip(tables, folders, strict=True)
            for name in table.file_names
        ),
        offsets=np.concatenate([*offsets, starts[-1:]]),
        ids=joined("ids"),
        bboxes=joined("bboxes"),
        category_ids=np.concatenate(category_ids),
        areas=joined("areas"),
        crowd=joined("crowd"),
    )
