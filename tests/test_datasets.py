"""COCO-format directories and TFDS folders, opened without a conversion by the user."""

import json
import logging
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from coco_directory import CATEGORIES, document, write_coco, write_split
from tensorboardX.record_writer import RecordWriter

from dn_detr_jax.config import base_config
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.packing import SPLIT
from dn_detr_jax.data.records import open_records
from dn_detr_jax.errors import DataError
from dn_detr_jax.training.setup import check_same_classes


def data_config(directory, **values):
    config = base_config().data
    config.dir = str(directory)
    config.update(values)
    return config


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def annotations_of(directory, name="train2017"):
    return json.loads((directory / f"annotations/instances_{name}.json").read_text())


def test_examples_are_those_of_the_annotation_file(coco_dir):
    """Compares with a plain reading of the file: bytes, order, boxes, no crowd regions."""
    written = annotations_of(coco_dir)
    dataset = open_dataset(data_config(coco_dir), "train")
    assert len(dataset) == len(dataset.source) == 6
    for source in (dataset.source, pickle.loads(pickle.dumps(dataset.source))):
        for i, image in enumerate(written["images"]):
            example = source[i]
            path = coco_dir / "train2017" / image["file_name"]
            assert example.image == path.read_bytes()
            assert example.image_id == image["id"] == dataset.image_ids[i]
            assert dataset.sizes[i].tolist() == [image["height"], image["width"]]
            mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
            mine = [a for a in mine if not a["iscrowd"]]
            boxes = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_array_equal(example.boxes, boxes.astype(np.float32))
            assert example.labels.tolist() == [a["category_id"] for a in mine]
            assert dataset.annotations.counts[i] == len(mine)
    assert dataset.annotations.counts[5] == 0  # an image without objects stays


def test_labels_are_category_ids_or_contiguous(coco_dir):
    by_id = open_dataset(data_config(coco_dir), "train")
    assert [c.id for c in by_id.categories] == list(range(8))
    names = ["", "", "", "cat", "", "dog", "", "fish"]
    assert [c.name for c in by_id.categories] == names
    contiguous = open_dataset(data_config(coco_dir, labels="contiguous"), "train")
    assert [(c.id, c.name) for c in contiguous.categories] == [(3, "cat"), (5, "dog"), (7, "fish")]
    for i in range(6):
        ids = [contiguous.categories[label].id for label in contiguous.source[i].labels]
        assert by_id.source[i].labels.tolist() == ids


def test_ground_truth_is_the_annotation_file(coco_dir):
    written = annotations_of(coco_dir, "val2017")
    truth = open_dataset(data_config(coco_dir), "validation").coco_ground_truth()
    assert truth["images"] == written["images"]
    assert sorted(truth["categories"], key=str) == sorted(CATEGORIES, key=str)
    order = sorted(written["annotations"], key=lambda a: a["id"])
    assert sorted(truth["annotations"], key=lambda a: a["id"]) == order


def test_tfds_opens_what_is_packed(coco_dir):
    open_dataset(data_config(coco_dir), "train")
    (folder,) = (coco_dir / "packed").glob("instances_train2017-*")
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits[SPLIT].num_examples == 6
    written = annotations_of(coco_dir)
    for image, example in zip(written["images"], builder.as_data_source(SPLIT), strict=True):
        assert example["image/id"] == image["id"]
        assert example["image"].shape == (image["height"], image["width"], 3)
        mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
        found = example["objects"]
        assert [int(i) for i in found["id"]] == [a["id"] for a in mine]
        names = builder.info.features["objects"]["label"].names
        by_id = {c["id"]: c["name"] for c in CATEGORIES}
        labels = [by_id[a["category_id"]] for a in mine]
        assert [names[label] for label in found["label"]] == labels
        assert [bool(c) for c in found["is_crowd"]] == [bool(a["iscrowd"]) for a in mine]


def test_boxes_are_clipped_in_training_only_and_degenerate_ones_counted(tmp_path, caplog):
    content = document(1)
    image = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 50}
    boxes = [[-5, 10, 20, 50], [60, 5, 5, 5], [1, 1, 0, 4], [1, 1, 3, -4], [0.25, 0.5, 7.5, 8]]
    objects = [{"id": i, "image_id": 1, "category_id": 3, "bbox": b} for i, b in enumerate(boxes)]
    objects.append({"id": 9, "image_id": 1, "category_id": 3, "bbox": [1, float("nan"), 3, 4]})
    content |= {"images": [image], "annotations": objects}
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(data_config(tmp_path), "train")
    assert "4 boxes without extent" in caplog.text
    expected = [[0, 10, 15, 40], [0.25, 0.5, 7.75, 8.5]]
    assert dataset.source[0].boxes.tolist() == expected
    truth = dataset.coco_ground_truth()["annotations"]
    assert [a["bbox"] for a in truth] == boxes
    assert [a["area"] for a in truth] == [w * h for _, _, w, h in boxes]


def rename(directory, *pairs):
    for old, new in pairs:
        (directory / new).parent.mkdir(parents=True, exist_ok=True)
        (directory / old).rename(directory / new)


TRAIN, VAL = "annotations/instances_train2017.json", "annotations/instances_val2017.json"
LAYOUTS = {
    "coco": [],
    "no year": [
        (TRAIN, "annotations/instances_train.json"),
        (VAL, "annotations/instances_val.json"),
        ("train2017", "train"),
        ("val2017", "val"),
    ],
    "plain": [
        (TRAIN, "train.json"),
        (VAL, "val.json"),
        ("train2017", "train"),
        ("val2017", "val"),
    ],
    "images": [
        (TRAIN, "annotations/train.json"),
        (VAL, "annotations/valid.json"),
        ("train2017", "images/train"),
        ("val2017", "images/valid"),
    ],
    "roboflow": [
        ("train2017", "train"),
        ("val2017", "valid"),
        (TRAIN, "train/_annotations.coco.json"),
        (VAL, "valid/_annotations.coco.json"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts_are_found(tmp_path, layout):
    rename(write_coco(tmp_path), *LAYOUTS[layout])
    config = data_config(tmp_path)
    assert [len(open_dataset(config, split)) for split in ("train", "validation")] == [6, 4]


def test_one_folder_of_images_for_both_splits(tmp_path):
    write_split(tmp_path / "train.json", tmp_path / "images", document(3))
    write_split(tmp_path / "val.json", tmp_path / "images", document(2))
    config = data_config(tmp_path)
    assert [len(open_dataset(config, split)) for split in ("train", "validation")] == [3, 2]


def test_named_paths_win_over_found_ones(tmp_path):
    write_coco(tmp_path)
    write_split(tmp_path / "my/subset.json", tmp_path / "my/images", document(2))
    config = data_config(tmp_path)
    config.train.update({"annotations": "my/subset.json", "images": "my/images"})
    assert len(open_dataset(config, "train")) == 2
    config.train.update({"annotations": TRAIN, "images": str(tmp_path / "train2017")})
    assert len(open_dataset(config, "train")) == 6


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda d: (d / TRAIN).unlink(),
            r"has none of .*instances_train2017\.json.*it has the JSON files annot",
        ),
        (lambda d: rename(d, ("train2017", "photos")), r"has none of train2017/.*data\.train\.im"),
        (lambda d: (d / "train.json").write_text("{}"), r"has .*, train\.json: say which with"),
        (lambda d: (d / "images/train2017").mkdir(parents=True), r"train2017, images/train2017: "),
    ],
)
def test_what_is_not_found_or_ambiguous_is_named(tmp_path, change, message):
    change(write_coco(tmp_path))
    with pytest.raises(DataError, match=message):
        open_dataset(data_config(tmp_path), "train")


def test_wrong_named_paths_are_named(tmp_path):
    config = data_config(write_coco(tmp_path))
    config.train.annotations = "nothing.json"
    with pytest.raises(DataError, match=r"data\.train\.annotations: there is no file .*nothing"):
        open_dataset(config, "train")
    config.train.update({"annotations": "", "images": "nothing"})
    with pytest.raises(DataError, match=r"data\.train\.images: there is no folder .*nothing"):
        open_dataset(config, "train")
    with pytest.raises(DataError, match=r"no such folder"):
        open_dataset(data_config(tmp_path / "nowhere"), "train")


@pytest.fixture
def tfds_dir(coco_dir, tmp_path):
    """Makes a TFDS folder with the split `train` from a packed one."""
    dataset = open_dataset(data_config(coco_dir), "train")
    folder = tmp_path / "coco" / "2017" / "1.1.0"
    folder.mkdir(parents=True)
    (packed,) = (coco_dir / "packed").glob("instances_train2017-*")
    for path in packed.iterdir():
        if path.name not in ("annotations.npz", "source.json"):
            name = path.name.replace(f"-{SPLIT}.", "-train.")
            (folder / name).write_bytes(path.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["name"] = "train"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(dataset) == 6
    return tmp_path


def test_a_folder_of_tfds_with_other_classes_than_coco(tfds_dir):
    """Covers labels without ids, which stand for themselves."""
    for directory in (tfds_dir, tfds_dir / "coco/2017", tfds_dir / "coco/2017/1.1.0"):
        dataset = open_dataset(data_config(directory), "train")
        assert len(dataset) == 6 and len(dataset.source[2].image) > 0
        assert [(c.id, c.name) for c in dataset.categories] == [(0, "fish"), (1, "cat"), (2, "dog")]


def test_a_label_of_tfds_beyond_the_classes_is_named(tfds_dir):
    """Catches an IndexError, or a label -1 that becomes the last class."""
    folder = tfds_dir / "coco/2017/1.1.0"
    text = (folder / "features.json").read_text()
    assert '"numClasses": "3"' in text
    (folder / "features.json").write_text(text.replace('"numClasses": "3"', '"numClasses": "2"'))
    (folder / "objects-label.labels.txt").write_text("fish\ncat\n")
    with pytest.raises(DataError, match=r"image \d+ of train has an object of label 2, .* 0 to 1"):
        open_dataset(data_config(tfds_dir), "train")


def test_the_highest_version_is_opened(tfds_dir):
    versions = tfds_dir / "coco" / "2017"
    (versions / "1.1.0").rename(versions / "1.10.0")
    (versions / "1.9.0").mkdir()
    (versions / "1.9.0" / "dataset_info.json").write_text("{}")
    assert len(open_dataset(data_config(tfds_dir), "train")) == 6


@pytest.fixture
def tfrecord_dir(tfds_dir):
    """The same folder in TFDS' default format, in two shards, as another library writes them."""
    folder = tfds_dir / "coco/2017/1.1.0"
    records, _ = open_records(folder, "train")
    contents = [records[i] for i in range(len(records))]
    for shard, part in enumerate((contents[:4], contents[4:])):
        writer = RecordWriter(str(folder / f"coco_records-train.tfrecord-0000{shard}-of-00002"))
        for content in part:
            writer.write(content)
        writer.close()
    for path in folder.glob("*array_record*"):
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    info["splits"][0]["shardLengths"] = ["4", "2"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return tfds_dir


def test_a_folder_of_tfds_in_its_default_format(tfrecord_dir, tfds_dir, coco_dir):
    """Compares images and objects with those of the source directory."""
    expected = open_dataset(data_config(coco_dir), "train")
    for _ in range(2):  # the second time with the index from the first
        found = open_dataset(data_config(tfrecord_dir), "train")
        source = pickle.loads(pickle.dumps(found.source))
        assert len(found) == len(expected) == 6
        for i in (5, 0, 4, 3):
            assert source[i].image == expected.source[i].image
            np.testing.assert_allclose(source[i].boxes, expected.source[i].boxes, atol=0.01)
    assert list((tfrecord_dir / "coco/2017/1.1.0").glob("tfrecord-index-*.npy"))


@pytest.mark.parametrize("kept", [0, 5, 12, -1])
def test_a_tfrecord_file_that_is_cut_off_is_named(tfrecord_dir, kept):
    """Covers a file that was cut after its index was kept."""
    open_dataset(data_config(tfrecord_dir), "train")
    (path,) = (tfrecord_dir / "coco/2017/1.1.0").glob("*tfrecord-00001-of-00002")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"{path.name}: (has 0 records|no TFRecord file)"):
        open_dataset(data_config(tfrecord_dir), "train")


def test_records_of_another_format_are_refused(tfds_dir):
    folder = tfds_dir / "coco/2017/1.1.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "riegeli"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "riegeli"))
    with pytest.raises(DataError, match="in the format riegeli; array_record and tfrecord"):
        open_dataset(data_config(tfds_dir), "train")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda i, f: i["splits"][0].update(name="test"), "no split 'train', it has test"),
        (lambda i, f: f["featuresDict"]["features"].pop("objects"), "features lack objects"),
        (lambda i, f: i.clear(), "not readable as a folder of TFDS"),
    ],
)
def test_other_folders_of_tfds_are_refused(tfds_dir, change, message):
    folder = tfds_dir / "coco/2017/1.1.0"
    files = [folder / "dataset_info.json", folder / "features.json"]
    contents = [json.loads(path.read_text()) for path in files]
    change(*contents)
    for path, content in zip(files, contents, strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_dataset(data_config(tfds_dir), "train")


def test_a_damaged_table_is_named(coco_dir, tmp_path):
    config = data_config(coco_dir, packed_dir=str(tmp_path))
    open_dataset(config, "train")
    (table,) = tmp_path.glob("*/annotations.npz")
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"annotations\.npz: damaged"):
        open_dataset(config, "train")


def test_category_ids_that_can_be_no_labels(tmp_path):
    content = document(2)
    content["categories"] = [{"id": 90_000, "name": "far"}, *content["categories"]]
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    with pytest.raises(DataError, match=r"3 to 90000: set data\.labels=contiguous"):
        open_dataset(data_config(tmp_path), "train")
    assert len(open_dataset(data_config(tmp_path, labels="contiguous"), "train").categories) == 4


def test_splits_with_other_classes_do_not_train_together(tmp_path):
    write_coco(tmp_path)
    content = annotations_of(tmp_path, "val2017")
    content["categories"][1]["name"] = "hat"
    (tmp_path / VAL).write_text(json.dumps(content))
    splits = [open_dataset(data_config(tmp_path), split) for split in ("train", "validation")]
    with pytest.raises(DataError, match=r"label 3 .* is 'cat' \(id 3\) .* 'hat' \(id 3\) in the v"):
        check_same_classes(*splits)
    check_same_classes(splits[0], splits[0])
