"""Detection data sets by name: random access to encoded pictures, and a table of what is in them.

Every data set is a folder prepared by TensorFlow Datasets in its `array_record` format, with the
features of TFDS' `coco/2017`, and is read here without TensorFlow. `config.data.name` chooses the
function that prepares the folder on first use.

Sizes, ids and objects of all the pictures are kept in a table (`Annotations`), made in one pass
and saved beside the records: plans and ground truth need no picture.
"""

import contextlib
import dataclasses
import fcntl
import functools
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.digit_scenes import DigitScenes
from dn_detr_jax.data.errors import DataError

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Example:
    """An encoded picture and the objects to detect in it, without crowd regions.

    Attributes:
      image: the bytes of a PNG or JPEG file.
      image_id: its id.
      boxes: float32 [n, 4], left, top, right, bottom in pixels.
      labels: int32 [n], positions in `Dataset.categories`.
    """

    image: bytes
    image_id: int
    boxes: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The objects of all the pictures of a split, one row per object, and the pictures' sizes.

    Attributes:
      image_ids: int64 [N].
      sizes: int32 [N, 2], heights and widths in pixels.
      offsets: int64 [N + 1], the objects of picture i are rows offsets[i] to offsets[i + 1].
      ids: int64 [K].
      boxes: float64 [K, 4], left, top, right, bottom in pixels.
      labels: int32 [K], positions in `Dataset.categories`.
      areas: float64 [K], in square pixels, of the object's shape if the source knows it.
      crowd: bool [K], regions of many objects, to be ignored.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 [N]: objects of every picture, crowd regions left out."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return np.diff(before[self.offsets])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      name: the key of the configuration.
      split: "train" or "validation".
      source: `source[i]` reads the `Example` at position i; can be pickled, safe for threads.
      annotations: what is in all the pictures.
      categories: in the order of the labels.
    """

    name: str
    split: str
    source: Sequence[Example]
    annotations: Annotations
    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width of every picture, in pixels."""
        return self.annotations.sizes

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [N]: the id of every picture."""
        return self.annotations.image_ids

    def coco_ground_truth(self) -> dict[str, Any]:
        """The split in the JSON format of COCO, as `pycocotools.coco.COCO.dataset` holds it."""
        table = self.annotations
        rows = np.repeat(np.arange(len(self)), np.diff(table.offsets))
        corners = table.boxes
        bboxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return {
            "info": {"description": f"{self.name}, {self.split}"},
            "images": [
                {"id": int(i), "height": int(h), "width": int(w)}
                for i, (h, w) in zip(table.image_ids, table.sizes, strict=True)
            ],
            "annotations": [
                {
                    "id": int(table.ids[k]),
                    "image_id": int(table.image_ids[rows[k]]),
                    "category_id": self.categories[table.labels[k]].id,
                    "bbox": bboxes[k].round(2).tolist(),
                    "area": float(table.areas[k]),
                    "iscrowd": int(table.crowd[k]),
                }
                for k in range(len(rows))
            ],
            "categories": [dataclasses.asdict(category) for category in self.categories],
        }


def open_dataset(data_config: ConfigDict, split: str) -> Dataset:
    """Opens a split of the configured data set, and prepares the data set if need be.

    Args:
      data_config: `config.data`, of which `name` and `dir` are read.
      split: "train" or "validation".

    Returns:
      The split.

    Raises:
      DataError: for an unknown name or split, or without a folder.
      OSError: when the folder can't be read or written.
    """
    if data_config.name not in _PREPARE:
        known = ", ".join(sorted(_PREPARE))
        raise DataError(f"data.name is {data_config.name!r}, expected one of: {known}")
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {SPLITS}")
    if not data_config.dir:
        raise DataError(
            "data.dir is empty: name the folder where the data lies or may be prepared, "
            "such as --config.data.dir=data"
        )
    directory = Path(data_config.dir).expanduser()
    try:
        folder = _PREPARE[data_config.name](directory)
    except OSError as error:
        raise OSError(
            f"data.dir={str(directory)!r}: the data set {data_config.name!r} can't be prepared "
            f"there ({error}); name a folder that can be written, with free space"
        ) from error
    return read_tfds(folder, split, data_config.name)


def read_tfds(folder: Path, split: str, name: str) -> Dataset:
    """Opens a split of a folder that TFDS has prepared with the features of `coco/2017`.

    Args:
      folder: holds `dataset_info.json` and the records.
      split: "train" or "validation".
      name: of the data set, for messages.

    Returns:
      The split, categories numbered by their labels.
    """
    builder = tfds.builder_from_directory(folder)
    labels = builder.info.features["objects"]["label"].names
    categories = tuple(Category(i, label) for i, label in enumerate(labels))
    annotations = _load_annotations(folder, split, builder.info.features)
    source = _RecordSource(folder, split, annotations)
    return Dataset(name, split, source, annotations, categories)


class _RecordSource(Sequence):
    """The examples of a split: pictures from the records, objects from the table."""

    def __init__(self, folder: Path, split: str, annotations: Annotations):
        self._folder, self._split, self._annotations = folder, split, annotations
        self._open()

    def _open(self) -> None:
        self._records, features = _open_records(self._folder, self._split)
        # Of a record's features only the picture is parsed: half the time.
        self._features = tfds.features.FeaturesDict({"image": features["image"]})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_records", "_features")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._annotations.image_ids)

    def __getitem__(self, index: int) -> Example:
        table = self._annotations
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a split of {len(self)} pictures")
        rows = np.arange(table.offsets[index], table.offsets[index + 1])
        rows = rows[~table.crowd[rows]]
        return Example(
            image=_parse(self._features, self._records[index])["image"],
            image_id=int(table.image_ids[index]),
            boxes=table.boxes[rows].astype(np.float32),
            labels=table.labels[rows],
        )


def _open_records(folder: Path, split: str) -> tuple[Sequence[bytes], tfds.features.FeaturesDict]:
    builder = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw), builder.info.features


def _parse(features: tfds.features.FeaturesDict, record: bytes) -> dict[str, Any]:
    """The features of a record, the picture still encoded."""
    return features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})


def _load_annotations(
    folder: Path, split: str, features: tfds.features.FeaturesDict
) -> Annotations:
    """The table of a split: the saved one, or a new one, which is saved if the folder allows it."""
    path = folder / f"annotations-1-{split}.npz"  # the number is that of the format
    if path.exists():
        with np.load(path) as arrays:
            return Annotations(**arrays)
    records, _ = _open_records(folder, split)
    annotations = _collect_annotations(_parse(features, record) for record in records)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **vars(annotations))
        partial.replace(path)
    except OSError:  # a folder for reading only: the table is made anew next time
        with contextlib.suppress(OSError):
            partial.unlink()
    return annotations


def _collect_annotations(examples: Iterator[dict[str, Any]]) -> Annotations:
    image_ids, sizes, counts, objects = [], [], [], []
    for example in examples:
        with Image.open(io.BytesIO(example["image"])) as picture:  # reads the header only
            width, height = picture.size
        found = example["objects"]
        image_ids.append(example["image/id"])
        sizes.append((height, width))
        counts.append(len(found["label"]))
        boxes = np.array(found["bbox"], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
        # TFDS keeps boxes as float32 shares of the picture. Annotations have at most two decimals:
        # rounding gives back the numbers that were there before.
        boxes = np.round(boxes * (width, height, width, height), 2)
        objects.append((found["id"], boxes, found["label"], found["area"], found["is_crowd"]))

    def column(i: int, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(row[i], dtype) for row in objects])

    return Annotations(
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=column(0, np.int64),
        boxes=column(1, np.float64),
        labels=column(2, np.int32),
        areas=column(3, np.float64),
        crowd=column(4, np.bool_),
    )


def _prepare_digits(scenes: str, directory: Path) -> Path:
    """Prepares `DigitScenes` under a directory unless it is there, and returns its folder."""
    builder = DigitScenes(config=scenes, data_dir=directory, file_format="array_record")
    folder = Path(builder.data_dir)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process prepares, others that start at the same time wait for it.
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(leftover)  # of a preparation that was killed
            config = builder.builder_config
            print(
                f"Preparing {config.train} + {config.validation} scenes of handwritten digits "
                f"in {folder}",
                flush=True,
            )
            _prepare_quietly(builder, directory)
    return folder


def _prepare_quietly(builder: tfds.core.DatasetBuilder, directory: Path) -> None:
    """Prepares without downloads; progress bars on a terminal only."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=directory / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )


# A data set's function takes `config.data.dir` and returns the folder that TFDS has prepared.
_PREPARE: dict[str, Callable[[Path], Path]] = {
    "digits": functools.partial(_prepare_digits, "full"),
    "digits_tiny": functools.partial(_prepare_digits, "tiny"),
}
