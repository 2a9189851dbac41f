"""Detection data sets by name: random access to encoded images, and a table of their objects.

`config.data.name` chooses. "coco" opens `config.data.dir`: a folder that TFDS has prepared with the
features of `coco/2017`, or a directory in the format of COCO, YOLO or Pascal VOC, which is packed
on first use.
"digits" opens scenes of handwritten digits, which are drawn into `config.data.dir` on first use.
"""

import copy
import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.config import expand_user
from dn_detr_jax.data import coco, packing
from dn_detr_jax.data.annotations import Annotations, label_categories
from dn_detr_jax.data.coco_classes import COCO_CATEGORIES, Category
from dn_detr_jax.data.division import Part, divide
from dn_detr_jax.data.findings import Findings
from dn_detr_jax.data.formats import load_split
from dn_detr_jax.data.layout import find_annotations, find_any_split, find_split
from dn_detr_jax.data.mixing import Mixture, concatenated, match_classes
from dn_detr_jax.data.records import (
    EncodedImages,
    Example,
    RandomAccess,
    RecordSource,
    read_table,
)
from dn_detr_jax.data.shards import PackedImages
from dn_detr_jax.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
Images = Literal["pack", "packed", "unread"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      name: the key of the configuration.
      split: "train" or "validation".
      source: `source[i]` reads the `Example` at position i; can be pickled, safe for threads.
      annotations: the table of all images.
      categories: one per label, in the order of the labels; an empty name is no class.
      annotation_file: in COCO's format, to evaluate against instead of the table, which TFDS
        has rounded.
      folder: of the records; None if there are several, or none.
      mixed: number of images of each data set that it is mixed of; empty: it is one data set.
    """

    name: str
    split: str
    source: RandomAccess[Example]
    annotations: Annotations
    categories: tuple[Category, ...]
    annotation_file: Path | None = None
    folder: Path | None = None
    mixed: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of images of each data set, at least one."""
        return self.mixed or (len(self),)

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width of every image, in pixels."""
        return self.annotations.sizes

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [N]: the id of every image."""
        return self.annotations.image_ids

    def coco_ground_truth(self) -> dict[str, Any]:
        """Returns the split in the JSON format of COCO, as `pycocotools.coco.COCO.dataset` has it.

        Boxes, areas and crowd regions are those of the annotation file, to the last digit, if
        there is one.
        """
        if self.annotation_file is not None and self.annotation_file.is_file():
            annotations, categories = _read_ground_truth(self.annotation_file, self.image_ids)
        else:
            annotations = self.annotations
            categories = tuple(category for category in self.categories if category.name)
        return annotations.coco_json(categories, f"{self.name}, {self.split}")


def _read_ground_truth(
    path: Path, image_ids: np.ndarray
) -> tuple[Annotations, tuple[Category, ...]]:
    findings = Findings()
    loaded = coco.read_annotations(path, findings)
    findings.raise_errors(str(path), "The evaluation needs it without errors")
    assert loaded is not None  # without errors there is a table
    if not np.array_equal(np.sort(loaded[0].image_ids), np.sort(image_ids)):
        raise DataError(
            f"{path}: its {len(loaded[0].image_ids)} images are not the {len(image_ids)} of the "
            "records; set data.validation.annotations to the file that they were made from"
        )
    return loaded


def open_dataset(data_config: ConfigDict, split: str, images: Images = "pack") -> Dataset:
    """Opens a split of the configured data set, and prepares the data set if need be.

    Args:
      data_config: `config.data`; `name`, `dir`, `packed_dir`, `labels`, `exif`, `prepare_split`,
        `mix`, `train` and `validation` are used.
      split: "train" or "validation".
      images: of a directory that is to be packed. "pack" packs them if need be; with "packed", a
        split that is not packed is an error, and one that is packed is taken as it is; with
        "unread" none is packed, and none can be read from the split.

    Returns:
      The split.

    Raises:
      DataError: for an unknown name or split, without a folder, or for data that can't be used,
        such as a training split without objects.
      OSError: when the folder can't be read or written.
    """
    if data_config.name not in _OPEN:
        known = ", ".join(sorted(_OPEN))
        raise DataError(f"data.name is {data_config.name!r}, expected one of: {known}")
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {SPLITS}")
    if not data_config.dir:
        raise DataError(
            "data.dir is empty: name the folder where the data is or can be prepared, "
            "such as --config.data.dir=data"
        )
    directory = expand_user(data_config.dir, "data.dir")
    if is_divided(data_config, directory):
        whole = _OPEN[data_config.name](data_config, "train", directory, images)
        dataset = _part(whole, split, data_config.prepare_split)
    else:
        dataset = _OPEN[data_config.name](data_config, split, directory, images)
    if split == "train" and data_config.mix.dirs:
        others = [open_dataset(other, split, images) for other in mixed_configs(data_config)]
        dataset = _mixture(dataset, others, data_config.mix.dirs)
    if split == "train" and not dataset.annotations.targets.any():
        reason = nothing_to_learn(dataset.annotations)
        raise DataError(f"{directory}, train: no object to learn from: {reason}")
    return dataset


def is_divided(data_config: ConfigDict, directory: Path) -> bool:
    """Whether the validation split is a part of the training images (`data.prepare_split`).

    Raises:
      DataError: the config names validation data that is not there.
    """
    if not data_config.prepare_split or data_config.name != "coco":
        return False
    if not data_config.validation.images and find_tfds(directory) is not None:
        return False
    return find_any_split(directory, "validation", data_config.validation) is None


def mixed_configs(data_config: ConfigDict) -> list[ConfigDict]:
    """Returns `config.data` of each data set of `data.mix`.

    Raises:
      DataError: the kind of data set can't be mixed.
    """
    if data_config.name != "coco" and data_config.mix.dirs:
        raise DataError(f"data.mix.dirs needs data.name='coco', this is {data_config.name!r}")
    configs = []
    for number, folder in enumerate(data_config.mix.dirs):
        config = copy.deepcopy(data_config)
        packed_dir = f"{data_config.packed_dir}/mix_{number}" if data_config.packed_dir else ""
        config.update(dir=folder, packed_dir=packed_dir, prepare_split=0.0)
        config.train.update(annotations="", images="")
        config.mix.update(dirs=(), shares=())
        configs.append(config)
    return configs


def _mixture(first: Dataset, others: Sequence[Dataset], folders: Sequence[str]) -> Dataset:
    """Returns training splits as one, with the classes of the first.

    Raises:
      DataError: classes of another one can't be matched by name.
    """
    labels = [np.arange(len(first.categories), dtype=np.int32)]
    category_ids = [first.annotations.category_ids]
    for other, folder in zip(others, folders, strict=True):
        label_of = match_classes(other.categories, other.annotations, first.categories, folder)
        labels.append(np.array([label_of.get(c.id, 0) for c in other.categories], np.int32))
        id_of = {found: first.categories[label].id for found, label in label_of.items()}
        own = other.annotations.category_ids.tolist()
        category_ids.append(np.array([id_of[found] for found in own], np.int64))
    datasets = (first, *others)
    tables = [dataset.annotations for dataset in datasets]
    return dataclasses.replace(
        first,
        source=Mixture(tuple(dataset.source for dataset in datasets), tuple(labels)),
        annotations=concatenated(tables, category_ids, ["", *folders]),
        annotation_file=None,
        folder=None,
        mixed=tuple(map(len, datasets)),
    )


def _part(whole: Dataset, split: str, share: float) -> Dataset:
    """Returns one of the splits that a training split is divided into."""
    positions = divide(whole.annotations.file_names, share)[SPLITS.index(split)]
    logger.info(
        "%s: %d of the %d training images are the split %s (data.prepare_split=%g)",
        whole.name,
        len(positions),
        len(whole),
        split,
        share,
    )
    return dataclasses.replace(
        whole,
        split=split,
        source=Part(whole.source, positions),
        annotations=whole.annotations.at(positions),
    )


def nothing_to_learn(annotations: Annotations) -> str:
    """Says why a split has no object to learn from."""
    return (
        f"of {len(annotations.ids)} annotations, "
        f"{int(annotations.crowd.sum())} are crowd regions (iscrowd is 1) and "
        f"{int((annotations.degenerate & ~annotations.crowd).sum())} have no extent in their image"
    )


def _open_coco(data_config: ConfigDict, split: str, directory: Path, images: Images) -> Dataset:
    """Opens a TFDS folder or a directory of annotations and images, whichever is there."""
    split_config = data_config[split]
    prepared = None if split_config.images else find_tfds(directory)
    if prepared is None:
        files = find_split(directory, split, split_config)
        if images == "unread":
            annotations, categories = load_split(files, data_config.exif)
            return _dataset(data_config, split, None, (), annotations, categories)
        packed_dir = directory / "packed"
        if data_config.packed_dir:
            packed_dir = expand_user(data_config.packed_dir, "data.packed_dir")
        packed = packing.open_packed(
            files, directory, packed_dir, data_config.exif, images == "pack"
        )
        annotations, categories = packed.annotations, packed.categories
        encoded = PackedImages(packed.folder, len(annotations.image_ids))
        return _dataset(data_config, split, packed.folder, encoded, annotations, categories)
    if data_config.exif == "as_shown":
        raise DataError(
            f"data.exif is 'as_shown', but {prepared} is prepared by TFDS, which has the boxes of "
            "images as stored; use 'auto', or the data in the format of COCO"
        )
    annotation_file = find_annotations(directory, split, split_config)
    dataset = _open_tfds(data_config, split, prepared)
    return dataclasses.replace(dataset, annotation_file=annotation_file)


def _open_digits(data_config: ConfigDict, split: str, directory: Path, images: Images) -> Dataset:
    from dn_detr_jax.data.digit_scenes import prepare  # imports TFDS

    del images  # scenes of both splits are drawn at once
    scenes = {"digits": "full", "digits_tiny": "tiny"}[data_config.name]
    try:
        folder = prepare(scenes, directory)
    except OSError as error:
        raise OSError(
            f"data.dir={str(directory)!r}: the data set {data_config.name!r} can't be prepared "
            f"there ({error}); name a folder that can be written, with free space"
        ) from error
    return _open_tfds(data_config, split, folder)


def _open_tfds(data_config: ConfigDict, split: str, folder: Path) -> Dataset:
    """Opens a split of a folder that TFDS has prepared with the features of `coco/2017`.

    Labels of the records are numbered 0 to K - 1. They stand for the ids of COCO's categories if
    they have their names, otherwise for themselves.
    """
    annotations, names = read_table(folder, split)
    labels = annotations.category_ids
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise DataError(
            f"{folder}: image {annotations.image_ids[annotations.rows[outside[0]]]} of {split} has "
            f"an object of label {labels[outside[0]]}, and {len(outside)} objects have labels that "
            f"can't be: the {len(names)} classes are labels 0 to {len(names) - 1}"
        )
    ids = np.arange(len(names))
    coco_ids = {category.name: category.id for category in COCO_CATEGORIES}
    if set(names) == set(coco_ids):
        ids = np.array([coco_ids[name] for name in names])
        annotations = dataclasses.replace(annotations, category_ids=ids[annotations.category_ids])
    categories = tuple(map(Category, ids.tolist(), names))
    images = EncodedImages(folder, split)
    return _dataset(data_config, split, folder, images, annotations, categories)


def _dataset(
    data_config: ConfigDict,
    split: str,
    folder: Path | None,
    images: RandomAccess[bytes],
    annotations: Annotations,
    categories: Sequence[Category],
) -> Dataset:
    degenerate = int((annotations.degenerate & ~annotations.crowd).sum())
    if degenerate:
        logger.info(
            "%s, %s: %d boxes without extent in their image are no training targets",
            data_config.dir,
            split,
            degenerate,
        )
    by_label = label_categories(categories, data_config.labels)
    label_of = {category.id: label for label, category in enumerate(by_label)}
    source = RecordSource(images, annotations, label_of)
    return Dataset(data_config.name, split, source, annotations, by_label, folder=folder)


def annotated_folder(data_config: ConfigDict, of_tfds: str = "") -> Path:
    """Returns `data.dir` for a command that reads COCO, YOLO or Pascal VOC.

    Args:
      data_config: `config.data`; `dir` is used.
      of_tfds: for the message, what else is true of a folder of TFDS.

    Raises:
      DataError: there is no such folder, or it is prepared by TFDS.
    """
    directory = expand_user(data_config.dir, "data.dir")
    if not directory.is_dir():
        raise DataError(f"{directory}: there is no such folder")
    prepared = find_tfds(directory)
    if prepared is not None:
        raise DataError(
            f"{prepared} is prepared by TFDS{of_tfds}; this command is for data in the format of "
            "COCO, YOLO or Pascal VOC"
        )
    return directory


def find_tfds(directory: Path) -> Path | None:
    """Returns the folder of a data set prepared by TFDS: the path itself, or the highest version of
    `coco/2017` below it; None if there is none.
    """
    info = "dataset_info.json"
    if (directory / info).is_file():
        return directory
    for above in (directory / "coco" / "2017", directory / "2017", directory):
        versions = [path.parent for path in above.glob(f"*/{info}")]
        versions = [path for path in versions if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
        if versions:
            return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    return None


# By name, what opens a split: gets `config.data`, the split, `config.data.dir`, and whether images
# may be packed.
_OPEN: dict[str, Callable[[ConfigDict, str, Path, Images], Dataset]] = {
    "coco": _open_coco,
    "digits": _open_digits,
    "digits_tiny": _open_digits,
}
