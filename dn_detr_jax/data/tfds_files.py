"""Records and metadata of packed images, as TensorFlow Datasets (TFDS) reads them.

Written without TFDS: importing it takes about as long as opening a packed data set. A record is a
`tf.train.Example`, a message of Protocol Buffers (https://protobuf.dev/programming-guides/encoding):
field 1 is a map from names to features, and a feature is a list of bytes (field 1), float32 (2) or
int64 (3).
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dn_detr_jax.errors import DataError, short_reason

# Tags of fields: their number times 8, and how they are encoded, here always with their length.
_FIELD_1, _FIELD_2, _FIELD_3 = b"\x0a", b"\x12", b"\x1a"

_FEATURES = "tensorflow_datasets.core.features."


def encode(features: Mapping[str, bytes | np.ndarray]) -> bytes:
    """Encodes a record.

    Args:
      features: bytes, or an array of float32 or integers, of any shape, by name.

    Returns:
      The message; equal features give equal bytes.
    """
    entries = []
    for name, value in sorted(features.items()):
        if isinstance(value, bytes):
            feature = _sized(_FIELD_1, _sized(_FIELD_1, value))
        elif value.dtype == np.float32:
            packed = value.astype("<f4").tobytes()
            feature = _sized(_FIELD_2, _sized(_FIELD_1, packed) if packed else b"")
        else:
            packed = b"".join(map(_varint, value.ravel().tolist()))
            feature = _sized(_FIELD_3, _sized(_FIELD_1, packed) if packed else b"")
        entry = _sized(_FIELD_1, name.encode()) + _sized(_FIELD_2, feature)
        entries.append(_sized(_FIELD_1, entry))
    return _sized(_FIELD_1, b"".join(entries))


def bytes_feature(record: bytes, name: str) -> bytes:
    """Returns a feature of a record that is a list of one bytes object.

    Raises:
      ValueError: a damaged record, or one without such a feature.
    """
    for features in _fields(memoryview(record)):
        for entry in _fields(features):
            key, feature = _fields(entry)
            if bytes(key) == name.encode():
                (values,) = _fields(feature)
                (value,) = _fields(values)
                return bytes(value)
    raise ValueError(f"a record without {name!r}")


@contextlib.contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Makes any error of reading a record a `DataError` that begins with `what`.

    Damaged records lead their readers to many kinds of errors. `OSError` stays what it is.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({short_reason(error)})") from error


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Encodes an integer, 7 bits a byte, the lowest first; negative ones as 64 bits."""
    number &= 2**64 - 1
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _fields(message: memoryview) -> Iterator[memoryview]:
    """Yields the contents of a message's fields, all of which have a length."""
    place = 0
    while place < len(message):
        if message[place] & 7 != 2:
            raise ValueError("a field without a length")
        size, shift = 0, 0
        place += 1
        while True:
            byte = message[place]  # raises an IndexError at the end
            size |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                break
        if place + size > len(message):
            raise ValueError("a field that is cut off")
        yield message[place : place + size]
        place += size


def write_metadata(
    folder: Path,
    split: str,
    class_names: Sequence[str],
    shard_lengths: Sequence[int],
    num_bytes: int,
    description: str,
) -> None:
    """Writes the files around the records that `tfds.builder_from_directory` needs.

    Args:
      folder: of the records.
      split: name of the only split.
      class_names: by label.
      shard_lengths: number of records in each file.
      num_bytes: of all these files.
      description: of the data set.
    """
    info = {
        "description": description,
        "fileFormat": "array_record",
        "name": "coco_records",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(num_bytes),
                "shardLengths": [str(length) for length in shard_lengths],
            }
        ],
        "version": "1.0.0",
    }
    _write_json(folder / "dataset_info.json", info)
    _write_json(folder / "features.json", _features(len(class_names)))
    names = "".join(f"{name}\n" for name in class_names)
    (folder / "objects-label.labels.txt").write_text(names, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _features(num_classes: int) -> dict[str, Any]:
    """Returns the features of TFDS' `coco/2017`, with areas as numbers that need not be whole."""

    def feature(kind: str, **content: Any) -> dict[str, Any]:
        return {"pythonClassName": _FEATURES + kind, **content}

    def number(dtype: str) -> dict[str, Any]:
        content = {"dtype": dtype, "encoding": "none", "shape": {}}
        return feature("tensor_feature.Tensor", tensor=content)

    def group(features: dict[str, Any]) -> dict[str, Any]:
        return feature("features_dict.FeaturesDict", featuresDict={"features": features})

    box = {"dtype": "float32", "shape": {"dimensions": ["4"]}, "bboxFormat": "REL_YXYX"}
    label = {"numClasses": str(num_classes)}
    objects = {
        "id": number("int64"),
        "area": number("float32"),
        "bbox": feature("bounding_boxes.BBoxFeature", boundingBox=box),
        "label": feature("class_label_feature.ClassLabel", classLabel=label),
        "is_crowd": number("bool"),
    }
    image = {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}}
    sequence = {"feature": group(objects), "length": "-1"}
    return group(
        {
            "image": feature("image_feature.Image", image=image),
            "image/filename": feature("text_feature.Text", text={}),
            "image/id": number("int64"),
            "objects": feature("sequence_feature.Sequence", sequence=sequence),
        }
    )
