"""Folders that TensorFlow Datasets has prepared with the features of `coco/2017`.

Read without TensorFlow, by position, in TFDS' formats `array_record` and `tfrecord`, its default.
TFDS is imported when such a folder is opened: data in other formats needs none of it.
"""

import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dn_detr_jax.data.annotations import Annotations, load_table, save_table
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.tfds_files import damage_named
from dn_detr_jax.data.tfrecord import TFRecords
from dn_detr_jax.errors import DataError, short_reason

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

logger = logging.getLogger(__name__)

_TABLE_FORMAT = 2
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # in the JSON of TFDS' features
_OF_TFDS = "tensorflow_datasets.core.features."


_Item_co = TypeVar("_Item_co", covariant=True)


class RandomAccess(Protocol[_Item_co]):
    """Items that are read by their position, from 0 on."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> _Item_co: ...


@dataclasses.dataclass(frozen=True)
class Example:
    """An encoded image and the objects to learn from.

    Attributes:
      image: the bytes of the image's file.
      image_id: its id.
      boxes: float32 [n, 4], left, top, right, bottom in pixels, within the image.
      labels: int32 [n], positions in `Dataset.categories`.
    """

    image: bytes
    image_id: int
    boxes: np.ndarray
    labels: np.ndarray


class EncodedImages:
    """The bytes of the image files in the records of a split, by position.

    Can be pickled; reading is safe for threads.
    """

    def __init__(self, folder: Path, split: str):
        """Opens the records.

        Args:
          folder: prepared by TFDS.
          split: name of the split there.

        Raises:
          DataError, OSError: as `open_records`.
        """
        self._folder, self._split = folder, split
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        self._records, features = open_records(self._folder, self._split)
        # Of a record's features only the image is parsed: half the time.
        self._features = tfds.features.FeaturesDict({"image": features["image"]})

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_split": self._split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        with damage_named(f"{self._folder}: a damaged record at {index}"):
            return _parse(self._features, self._records[index])["image"]


class RecordSource:
    """The examples of a split: images from the records, objects from the table.

    Can be pickled; reading is safe for threads.
    """

    def __init__(self, images: RandomAccess[bytes], annotations: Annotations, label_of: dict):
        """Combines images and objects.

        Args:
          images: the files of the images.
          annotations: the table of the split.
          label_of: label of each category id.
        """
        self._images = images
        self._annotations, self._label_of = annotations, label_of

    def __len__(self) -> int:
        return len(self._annotations.image_ids)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a split of {len(self)} images")
        targets = self._annotations.targets_of(index)
        labels = [self._label_of[category_id] for category_id in targets.category_ids.tolist()]
        return Example(
            image=self._images[index],
            image_id=int(self._annotations.image_ids[index]),
            boxes=targets.boxes,
            labels=np.array(labels, np.int32),
        )


def open_records(
    folder: Path, split: str
) -> tuple[RandomAccess[bytes], "tfds.features.FeaturesDict"]:
    """Opens the serialized records of a split, and the features to parse them with.

    Raises:
      DataError: the folder has no such split, other features, damaged records or another format.
      OSError: a file can't be read.
    """
    try:
        _check_features(folder / "features.json")
        return _open_records(folder, split)
    except (DataError, OSError):
        raise
    except Exception as error:  # TFDS passes on many kinds of errors
        raise DataError(
            f"{folder}: not readable as a folder of TFDS ({short_reason(error)})"
        ) from error


def _open_records(
    folder: Path, split: str
) -> tuple[RandomAccess[bytes], "tfds.features.FeaturesDict"]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    info = builder.info
    missing = {"image", "image/id", "objects"} - set(info.features)
    if missing:
        raise DataError(
            f"{folder}: its features lack {', '.join(sorted(missing))}; expected those of TFDS' "
            f"coco/2017, found {', '.join(sorted(info.features))}"
        )
    if split not in info.splits:
        raise DataError(f"{folder}: no split {split!r}, it has {', '.join(info.splits)}")
    formats = tfds.core.FileFormat
    if formats.ARRAY_RECORD in info.available_file_formats():
        records = builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format=formats.ARRAY_RECORD,
        )
    elif info.file_format == formats.TFRECORD:
        files = [Path(path) for path in info.splits[split].filepaths]
        lengths = info.splits[split].shard_lengths
        records = TFRecords(files, lengths, folder / f"tfrecord-index-1-{split}.npy")
    else:
        raise DataError(
            f"{folder}: its records are in the format {info.file_format.value}; array_record and "
            "tfrecord can be read"
        )
    return records, info.features


def _check_features(path: Path) -> None:
    """Raises a DataError if a file of features names a class that is not one of TFDS.

    TFDS imports the module of the named class, which could be a file beside the records.
    """
    if not path.exists():  # TFDS says so
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    foreign = [name for name in _class_names(content) if not name.startswith(_OF_TFDS)]
    if foreign:
        raise DataError(f"{path}: names {foreign[0]!r}, no feature of TFDS; nothing was imported")


def _class_names(value: Any) -> Iterator[str]:
    """The classes that are named anywhere in the JSON of features."""
    if isinstance(value, list):
        for entry in value:
            yield from _class_names(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in _CLASS_KEYS and isinstance(entry, str):
                yield entry
            elif key == "json" and isinstance(entry, str):
                yield from _class_names(json.loads(entry))
            else:
                yield from _class_names(entry)


def read_table(folder: Path, split: str) -> tuple[Annotations, tuple[str, ...]]:
    """Reads the table of a split, and the names of its labels.

    It is made in one pass over the records, and saved beside them if the folder allows it. Its
    category ids are the labels of the records.
    """
    path = folder / f"annotations-{_TABLE_FORMAT}-{split}.npz"
    if path.exists():
        annotations, categories = load_table(path)
        return annotations, tuple(category.name for category in categories)
    records, features = open_records(folder, split)
    positions = range(len(records))
    shown = tqdm(positions, f"reading sizes and objects of {split}", unit=" images", disable=None)
    annotations = _collect(_parse(features, records[position]) for position in shown)
    names = tuple(features["objects"]["label"].names or ())
    try:
        save_table(path, annotations, [Category(i, name) for i, name in enumerate(names)])
    except OSError:  # a read-only folder: the table is made again next time
        logger.info("%s is not saved: the folder can't be written", path)
    return annotations, names


def _parse(features: "tfds.features.FeaturesDict", record: bytes) -> dict[str, Any]:
    """Parses a record, without decoding its image."""
    import tensorflow_datasets as tfds

    return features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})


def _collect(examples: Iterable[dict[str, Any]]) -> Annotations:
    image_ids, sizes, file_names, counts, objects = [], [], [], [], []
    for example in examples:
        with Image.open(io.BytesIO(example["image"])) as opened:  # reads the header only
            width, height = opened.size
        found = example["objects"]
        image_ids.append(example["image/id"])
        sizes.append((height, width))
        file_names.append(bytes(example.get("image/filename", b"")).decode())
        counts.append(len(found["label"]))
        boxes = np.array(found["bbox"], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
        # TFDS keeps corners as float32 shares of the image. Annotations have at most two
        # decimals: rounding gives back the numbers that were there before.
        boxes = np.round(boxes * (width, height, width, height), 2)
        boxes[:, 2:] = np.round(boxes[:, 2:] - boxes[:, :2], 2)
        objects.append((found["id"], boxes, found["label"], found["area"], found["is_crowd"]))

    def column(i: int, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(row[i], dtype) for row in objects])

    return Annotations(
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int32),
        file_names=tuple(file_names),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=column(0, np.int64),
        bboxes=column(1, np.float64),
        category_ids=column(2, np.int64),
        areas=column(3, np.float64),
        crowd=column(4, np.bool_),
    )
