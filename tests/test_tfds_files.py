"""Records and metadata that are written without TFDS are those that TFDS writes and reads."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from dn_detr_jax.data.tfds_files import bytes_feature, encode, write_metadata

NAMES = ["cat", "fish", "été"]


def features():
    """The features that packed images have."""
    objects = {
        "id": np.int64,
        "area": np.float32,
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=NAMES),
        "is_crowd": np.bool_,
    }
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
    )


@given(
    image=st.binary(max_size=400),
    name=st.text(max_size=20),
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
)
def test_tfds_reads_what_is_written_and_the_reverse(image, name, numbers):
    """Catches negative and large numbers, empty lists, and lengths of several bytes."""
    count = len(numbers)
    rng = np.random.default_rng(count)
    fields = {
        "id": np.array(numbers, np.int64),
        "area": rng.normal(size=count).astype(np.float32),
        "bbox": rng.random((count, 4)).astype(np.float32),
        "label": rng.integers(0, 3, count),
        "is_crowd": rng.integers(0, 2, count),
    }
    flat = {f"objects/{key}": value for key, value in fields.items()}
    flat |= {"image": image, "image/filename": name.encode(), "image/id": np.int64(7)}
    record = encode(flat)
    skip = {"image": tfds.decode.SkipDecoding()}
    found = features().deserialize_example_np(record, decoders=skip)
    assert found["image"] == image and found["image/id"] == 7
    assert found["image/filename"] == name.encode()
    for key, value in fields.items():
        np.testing.assert_array_equal(np.reshape(found["objects"][key], value.shape), value)
    assert bytes_feature(record, "image") == image
    serializer = tfds.core.example_serializer.ExampleSerializer(features().get_serialized_info())
    written = serializer.serialize_example(
        {"image": image, "image/filename": name, "image/id": 7, "objects": fields}
    )
    assert bytes_feature(written, "image") == image


def test_a_damaged_record_is_an_error():
    record = encode({"image": b"x" * 300, "image/id": np.int64(3)})
    for kept in range(len(record)):
        with pytest.raises((ValueError, IndexError)):
            bytes_feature(record[:kept], "image")
    with pytest.raises(ValueError, match="without 'picture'"):
        bytes_feature(record, "picture")


def test_metadata_are_those_of_tfds(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    for number in range(2):
        (theirs / f"coco_records-images.array_record-0000{number}-of-00002").write_bytes(b"")
    write_metadata(mine, "images", NAMES, [512, 3], 12345, "some images")
    split = tfds.core.SplitInfo(name="images", shard_lengths=[512, 3], num_bytes=12345)
    tfds.folder_dataset.write_metadata(
        data_dir=theirs,
        features=features(),
        split_infos=[split],
        check_data=False,
        description="some images",
    )
    for name in ("dataset_info.json", "features.json"):
        content, expected = (json.loads((folder / name).read_text()) for folder in (mine, theirs))
        assert content == expected
    label_names = "objects-label.labels.txt"
    assert (mine / label_names).read_text().split() == (theirs / label_names).read_text().split()
