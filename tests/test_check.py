"""The report on a directory names every kind of defect, and no content of a file makes it fail."""

import copy
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from coco_directory import document, photograph, write_coco, write_split
from coco_sample import COCO_SAMPLE, needs_coco_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data import findings, images
from dn_detr_jax.data.check import check, check_split
from dn_detr_jax.data.check_report import report
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.errors import DataError

REPOSITORY = Path(__file__).parent.parent
TRAIN = "annotations/instances_train2017.json"


def data_config(directory):
    config = base_config().data
    config.dir = str(directory)
    return config


def train_findings(directory, decode=False):
    """Returns errors and warnings of the training split by kind, with their text."""
    train, _ = check(data_config(directory), decode)
    errors = {kind: str(finding) for kind, finding in train.findings.errors.items()}
    return errors, {kind: str(finding) for kind, finding in train.findings.warnings.items()}


def change(directory, function):
    path = directory / TRAIN
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def test_a_directory_without_fault(tmp_path):
    splits = check(data_config(write_coco(tmp_path)), decode=True)
    text = report(splits)
    assert not any(split.findings.errors for split in splits)
    assert "0 errors" in text and "This can be trained on." in text
    assert "model.num_classes=8 with data.labels=category_ids" in text
    assert "model.num_classes=3 with data.labels=contiguous" in text
    counts = splits[0].annotations.counts
    content = json.loads((tmp_path / TRAIN).read_text())
    assert counts.sum() == sum(not a["iscrowd"] for a in content["annotations"])
    assert f"all up to {counts.max()}" in text and "6 images" in text


def exif_of(path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)


def rotate_file(directory, name):
    exif_of(directory / "train2017" / name, 6)


ERRORS = {
    "unknown category": (
        lambda c: c["annotations"][2].update(category_id=12),
        "annotation of an unknown category",
        "category_id 12",
    ),
    "unknown image": (
        lambda c: c["annotations"][2].update(image_id=12),
        "annotation of an unknown image",
        "image_id 12",
    ),
    "image twice": (
        lambda c: c["images"].append(dict(c["images"][1], file_name="b.jpg")),
        "image id that comes twice",
        "493 (0493.jpg and b.jpg)",
    ),
    "category twice": (
        lambda c: c["categories"].append({"id": 7, "name": "crab"}),
        "category id that comes twice",
        "7 ('fish' and 'crab')",
    ),
    "missing file": (
        lambda c: c["images"].append({"id": 1, "file_name": "no.jpg", "height": 1, "width": 1}),
        "image that is not on disk",
        "no.jpg",
    ),
    "wrong size": (
        lambda c: c["images"][0].update(height=999),
        "image that can't be used",
        "0500.jpg: is ",
    ),
    "text for a number": (
        lambda c: c["annotations"][3].update(bbox=[1, 2, "3", 4]),
        "malformed annotation",
        'annotations[3]: bbox is [1, 2, "3", 4]',
    ),
    "three numbers": (
        lambda c: c["annotations"][3].update(bbox=[1, 2, 3]),
        "malformed annotation",
        "expected [left, top, width, height]",
    ),
    "no bbox": (
        lambda c: c["annotations"][3].pop("bbox"),
        "malformed annotation",
        "annotations[3]: bbox is missing",
    ),
    "crowd of 2": (
        lambda c: c["annotations"][3].update(iscrowd=2),
        "malformed annotation",
        "iscrowd is 2, expected 0 or 1",
    ),
    "no height": (
        lambda c: c["images"][3].pop("height"),
        "malformed image",
        "images[3]: height is missing",
    ),
    "id of an image as text": (
        lambda c: c["images"][3].update(id="3"),
        "malformed image",
        'id is "3", expected a whole number of at least 0',
    ),
    "nameless category": (
        lambda c: c["categories"][0].pop("name"),
        "malformed category",
        "categories[0]: name is missing",
    ),
    "no images": (lambda c: c.update(images=[]), "no images", "empty"),
    "no list": (
        lambda c: c.update(categories={"7": "fish"}),
        "no COCO format",
        "expected a list of categories, got a dict",
    ),
    "part is missing": (
        lambda c: c.pop("annotations"),
        "no COCO format",
        "expected a list of annotations, got nothing",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named_and_stop_a_training(tmp_path, name):
    defect, kind, example = ERRORS[name]
    change(write_coco(tmp_path), defect)
    errors, _ = train_findings(tmp_path)
    assert example in errors[kind]
    with pytest.raises(DataError):
        dataset = open_dataset(data_config(tmp_path), "train")
        for i in range(len(dataset)):
            images.decode(dataset.source[i].image, tuple(dataset.sizes[i].tolist()))


WARNINGS = {
    "beyond": (
        lambda c: c["annotations"][2].update(bbox=[-9, 1, 20, 20]),
        "box beyond its image, cut in training",
        "[-9, 1, 20, 20], annotation",
    ),
    "outside": (
        lambda c: c["annotations"][2].update(bbox=[900, 1, 20, 20]),
        "box without extent in its image, no training target",
        "[900, 1, 20, 20], annotation",
    ),
    "no width": (
        lambda c: c["annotations"][2].update(bbox=[9, 1, 0, 20]),
        "box without extent in its image, no training target",
        "[9, 1, 0, 20], annotation",
    ),
    "nan": (
        lambda c: c["annotations"][2].update(bbox=[float("nan"), 1, 2, 20]),
        "box without extent in its image, no training target",
        "[nan, 1, 2, 20], annotation",
    ),
    "area": (
        lambda c: c["annotations"][2].update(area=-1),
        "area that is negative or not finite, of no size in the evaluation",
        "annotation",
    ),
    "annotation twice": (
        lambda c: c["annotations"][2].update(id=c["annotations"][1]["id"]),
        "annotation id that comes twice",
        "10",
    ),
    "unlisted": (
        lambda c: (
            c["images"].pop(),
            c.update(annotations=[a for a in c["annotations"] if a["image_id"] != 465]),
        ),
        "image that no annotation file lists, not used",
        "0465.jpg",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_named_and_stop_nothing(tmp_path, name):
    defect, kind, example = WARNINGS[name]
    change(write_coco(tmp_path), defect)
    errors, warnings = train_findings(tmp_path)
    assert not errors and example in warnings[kind]
    dataset = open_dataset(data_config(tmp_path), "train")
    for i in range(len(dataset)):
        assert np.isfinite(dataset.source[i].boxes).all()


def test_a_class_without_objects_is_a_warning(tmp_path):
    write_coco(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 9, "name": "whale"})
        path.write_text(json.dumps(content))
    errors, warnings = train_findings(tmp_path)
    assert not errors and warnings["class without any object"] == "whale (9)"


def test_sizes_are_compared_with_the_orientation(tmp_path):
    """Catches a size check that ignores EXIF: the stored and the shown size both fit."""
    write_coco(tmp_path)
    exif_of(tmp_path / "train2017/0500.jpg", 6)
    assert not train_findings(tmp_path)[0]

    def turn(content):
        image = content["images"][0]
        image["height"], image["width"] = image["width"], image["height"]

    change(tmp_path, turn)
    assert not train_findings(tmp_path)[0]
    exif_of(tmp_path / "train2017/0500.jpg", 1)
    assert "0500.jpg: is " in train_findings(tmp_path)[0]["image that can't be used"]


def test_damaged_images(tmp_path):
    """Catches a missed damaged header, and with --decode missing pixels."""
    write_coco(tmp_path)
    (tmp_path / "train2017/0500.jpg").write_bytes(b"rubbish")
    whole = (tmp_path / "train2017/0493.jpg").read_bytes()
    (tmp_path / "train2017/0493.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (problem,) = train_findings(tmp_path)[0].values()
    assert "0500.jpg: 7 bytes that are no readable" in problem and "0493" not in problem
    (problem,) = train_findings(tmp_path, decode=True)[0].values()
    assert "0493.jpg: a damaged image" in problem


def test_headers_are_all_that_is_read(tmp_path, monkeypatch):
    write_coco(tmp_path)
    monkeypatch.setattr(images.Image.Image, "load", None)
    assert not train_findings(tmp_path)[0]


def test_splits_are_compared(tmp_path):
    write_split(tmp_path / "train.json", tmp_path / "images", document(3))
    content = document(2)
    content["categories"] = [
        {"id": 7, "name": "fish"},
        {"id": 3, "name": "hat"},
        *content["categories"][2:],
    ]
    write_split(tmp_path / "val.json", tmp_path / "images", content)
    _, validation = check(data_config(tmp_path))
    (error,) = validation.findings.errors.values()
    assert error.count == 2 and "'cat' (3) is in the training file" in str(error)
    assert "'hat' (3) is in the validation file" in str(error)
    (kind,) = (kind for kind in validation.findings.warnings if "in the training split" in kind)
    assert str(validation.findings.warnings[kind]) == "0500.jpg; 0493.jpg"
    assert not any("lists" in kind for kind in validation.findings.warnings)


def test_examples_are_limited(tmp_path):
    write_coco(tmp_path, train=12)
    for image in json.loads((tmp_path / TRAIN).read_text())["images"]:
        (tmp_path / "train2017" / image["file_name"]).unlink()
    text = report(check(data_config(tmp_path)))
    assert "image that is not on disk (12)" in text and "and 7 more" in text
    assert text.count(".jpg") < 12


def run_command(*arguments):
    command = [sys.executable, "-m", "dn_detr_jax", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tmp_path):
    write_coco(tmp_path)
    (tmp_path / TRAIN).rename(tmp_path / "mine.json")
    run = run_command(tmp_path, "--config.data.train.annotations=mine.json")
    assert run.returncode == 0 and "This can be trained on." in run.stdout and not run.stderr
    run = run_command(tmp_path)
    assert run.returncode == 1 and "error: files not found (1)" in run.stdout and not run.stderr
    assert "mine.json" in run.stdout  # the value that is there instead


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.exiv=1", "error: --config.data.exiv: there is no such key; did you mean data.exif?"),
        ("data.exif=7", "error: config.data.exif = '7': one of 'auto', 'as_shown', 'as_stored'"),
    ],
)
def test_a_wrong_override_without_a_config_is_one_line(tmp_path, override, message):
    """Catches a traceback where no --config was given."""
    run = run_command(tmp_path, f"--config.{override}")
    assert run.returncode == 1 and run.stderr.splitlines() == [message]


def test_what_is_no_such_directory(tmp_path, digits_dir):
    with pytest.raises(DataError, match="there is no such folder"):
        check(data_config(tmp_path / "nothing"))
    with pytest.raises(DataError, match="is prepared by TFDS"):
        check(data_config(digits_dir / "digit_scenes" / "tiny"))


@needs_coco_sample
def test_the_sample_of_coco():
    """It has a photograph in both splits, and two without objects."""
    train, validation = check(data_config(COCO_SAMPLE))
    assert not train.findings.errors and not validation.findings.errors
    assert not train.findings.warnings
    assert (train.annotations.counts == 0).sum() == 2
    (finding,) = validation.findings.warnings.values()
    assert str(finding) == "000000184321.jpg"


RUBBISH = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**6, 2**31, 2**63, 10**400, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "a", "0001.jpg", "../x", "/", "\0", "a\nb", "\ud800", "1"]),
    st.just([]),
    st.just({}),
    st.lists(st.floats(-50, 80), min_size=4, max_size=4),
)


def paths_in(value, path=()):
    """Yields the path of every item in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from paths_in(entry, (*path, key))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """Yields a directory whose annotation file may be changed, and the original content."""
    directory = tmp_path_factory.mktemp("fuzzed")
    content = document(3)
    write_split(directory / "train.json", directory / "train", content)
    return directory, content


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_says_is_reported_and_stops_a_training_or_does_not(fuzzed, data):
    """No traceback; and a directory without errors can be opened, one with errors can't."""
    directory, original = fuzzed
    content = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(list(paths_in(content))))
        place = content
        for key in above:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(RUBBISH)
        else:
            place.pop(last)
        if not content:
            break
    (directory / "train.json").write_text(json.dumps(content))
    config = data_config(directory)
    split = check_split(directory, "train", config.train)
    report([split]).encode()
    try:
        dataset = open_dataset(config, "train")
        for i in range(len(dataset)):
            example = dataset.source[i]
            assert np.isfinite(example.boxes).all() and (example.labels >= 0).all()
            images.decode(example.image, tuple(dataset.sizes[i].tolist()))
        assert dataset.coco_ground_truth()["images"]
        usable = True
    except DataError as error:
        assert "\n" not in str(error)
        usable = "category_ids" in str(error)  # valid numbers, but not valid labels
    assert usable == (not split.findings.errors)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"text"', "null", "[" * 100_000, "1" * 5000, '{"images": NaN}']
)
def test_what_is_no_annotation_file_at_all(tmp_path, text):
    write_coco(tmp_path)
    (tmp_path / TRAIN).write_text(text)
    errors, _ = train_findings(tmp_path)
    assert errors
    with pytest.raises(DataError, match=r"instances_train2017\.json: no (JSON|COCO format)"):
        open_dataset(data_config(tmp_path), "train")


def test_bytes_that_are_no_text(tmp_path):
    write_coco(tmp_path)
    (tmp_path / TRAIN).write_bytes(photograph(8, 8).tobytes())
    assert "no JSON" in train_findings(tmp_path)[0]


# Faults from public bug reports, with what the user reads of each.


def rewrite(directory, change, name=TRAIN):
    """Changes every annotation of a file; `change` takes the annotation and its image."""
    content = json.loads((directory / name).read_text())
    sizes = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        change(annotation, sizes[annotation["image_id"]])
    (directory / name).write_text(json.dumps(content))


def as_shares(annotation, image):
    x, y, w, h = annotation["bbox"]
    width, height = image["width"], image["height"]
    annotation["bbox"] = [x / width, y / height, w / width, h / height]


def as_corners(annotation, _):
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x, y, x + w, y + h]


def large_boxes(annotation, image):
    """Boxes over most of the image, as those of photographs of one object."""
    annotation["bbox"] = [2, 3, image["width"] - 4, image["height"] - 4]


@pytest.mark.parametrize(
    "change,kind",
    [
        (as_shares, findings.SHARES),
        (lambda a, i: a.update(bbox=[2, 3, i["width"], i["height"] - 5]), None),
        (as_corners, findings.CORNERS),
        (large_boxes, None),
    ],
)
def test_boxes_of_another_format_are_an_error(tmp_path, change, kind):
    """Catches boxes that are valid one by one but make a training useless without an error."""
    write_coco(tmp_path, train=20)
    rewrite(tmp_path, change)
    errors, _ = train_findings(tmp_path)
    assert list(errors) == ([] if kind is None else [kind.name])
    if kind is not None:
        with pytest.raises(DataError, match=kind.name):
            open_dataset(data_config(tmp_path), "train")


def test_one_small_box_is_a_warning(tmp_path):
    change(write_coco(tmp_path), lambda c: c["annotations"][2].update(bbox=[0.1, 0.2, 0.5, 0.3]))
    errors, warnings = train_findings(tmp_path)
    assert not errors and "[0.1, 0.2, 0.5, 0.3]" in warnings["box smaller than a pixel"]


@pytest.mark.parametrize("name", ["all crowd", "none", "no extent"])
def test_nothing_to_learn_is_an_error(tmp_path, name):
    write_coco(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation.update(
                {"all crowd": {"iscrowd": 1}, "no extent": {"bbox": [1, 1, 0, 0]}}.get(name, {})
            )
        if name == "none":
            content["annotations"] = []
        path.write_text(json.dumps(content))
    train, validation = check(data_config(tmp_path))
    assert "no object to learn from" in train.findings.errors
    assert "no object to evaluate on" in validation.findings.warnings
    assert "This can be trained on" not in report([train, validation])
    with pytest.raises(DataError, match="no object to learn from"):
        open_dataset(data_config(tmp_path), "train")
    assert len(open_dataset(data_config(tmp_path), "validation")) == 4


@pytest.mark.parametrize("spelling", ["0500.jpg", "./0500.jpg", "x/../0500.jpg"])
def test_an_image_that_is_listed_twice_is_a_warning(tmp_path, spelling):
    write_coco(tmp_path)
    (tmp_path / "train2017/x").mkdir()
    change(
        tmp_path, lambda c: c["images"].append(c["images"][0] | {"id": 9, "file_name": spelling})
    )
    errors, warnings = train_findings(tmp_path)
    assert not errors and spelling in warnings["image that is listed more than once"]


def test_a_malformed_entry_is_one_error(tmp_path):
    """Its annotations are not of an unknown image or category besides."""
    write_coco(tmp_path)
    change(tmp_path, lambda c: (c["images"][0].pop("width"), c["categories"][0].update(name="")))
    train, _ = check(data_config(tmp_path))
    assert set(train.findings.errors) == {"malformed image", "malformed category"}
    assert {finding.count for finding in train.findings.errors.values()} == {1}


NAMES = ["a\u202fb.jpg", "a\u00a0b.jpg", "a\u200cb.jpg", "a\u2028b.jpg", "\u00e9t\u00e9/\u00e9.jpg"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_names_of_any_script_and_form_are_found(tmp_path, in_file, on_disk):
    write_coco(tmp_path)
    content = json.loads((tmp_path / TRAIN).read_text())
    contents = []
    for image, name in zip(content["images"], NAMES, strict=False):
        stored = tmp_path / "train2017" / unicodedata.normalize(on_disk, name)
        stored.parent.mkdir(exist_ok=True)
        (tmp_path / "train2017" / image["file_name"]).rename(stored)
        contents.append(stored.read_bytes())
        image["file_name"] = unicodedata.normalize(in_file, name)
    (tmp_path / TRAIN).write_text(json.dumps(content))
    train, _ = check(data_config(tmp_path), decode=True)
    assert not train.findings.errors and not train.findings.warnings
    dataset = open_dataset(data_config(tmp_path), "train")
    assert [dataset.source[i].image for i in range(len(NAMES))] == contents


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x07b.jpg", "a\x85b.jpg", "\ud800.jpg", ""])
def test_control_characters_are_malformed(tmp_path, name):
    change(write_coco(tmp_path), lambda c: c["images"][0].update(file_name=name))
    assert (
        "expected text without control characters" in train_findings(tmp_path)[0]["malformed image"]
    )


@pytest.mark.parametrize(
    "name,hint",
    [
        ("sub\\0500.jpg", "(a backslash: sub/0500.jpg is there)"),
        ("0493.JPG", "(0493.jpg is there)"),
        ("0493.png", "(0493.jpg is there)"),
        ("train2017/0493.jpg", "it is there from"),
        ("photos/0493.jpg", "(0493.jpg is there, without the folder)"),
        ("nothing.jpg", "nothing.jpg"),
    ],
)
def test_a_missing_image_comes_with_what_is_there(tmp_path, name, hint):
    write_coco(tmp_path)
    (tmp_path / "train2017/sub").mkdir()
    (tmp_path / "train2017/0500.jpg").rename(tmp_path / "train2017/sub/0500.jpg")
    change(tmp_path, lambda c: c["images"][0].update(file_name=name))
    found = train_findings(tmp_path)[0]["image that is not on disk"]
    assert found.startswith(name) and hint in found


def test_equal_names_in_other_folders_are_no_leak_and_equal_content_is(tmp_path):
    write_split(tmp_path / "train.json", tmp_path / "train", document(3), seed=0)
    write_split(tmp_path / "val.json", tmp_path / "val", document(3), seed=1)
    _, validation = check(data_config(tmp_path))
    assert not validation.findings.warnings
    copied = (tmp_path / "train/0500.jpg").read_bytes()
    (tmp_path / "val/0493.jpg").write_bytes(copied)
    _, validation = check(data_config(tmp_path))
    (finding,) = validation.findings.warnings.values()
    assert str(finding) == "0493.jpg (there 0500.jpg)"


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_orientations_that_the_size_leaves_open_are_counted(tmp_path, orientation):
    write_coco(tmp_path)
    for name in ("0500.jpg", "0493.jpg"):
        exif_of(tmp_path / "train2017" / name, orientation)
    train, _ = check(data_config(tmp_path))
    finding = train.findings.warnings[findings.OPEN_ORIENTATION.name]
    assert finding.count == 2 and f"orientation {orientation}" in str(finding)
    config = data_config(tmp_path)
    config.exif = "as_shown"
    assert not check(config)[0].findings.warnings


def test_more_objects_than_queries_is_a_warning(tmp_path):
    write_coco(tmp_path)
    train, _ = check(data_config(tmp_path))
    most = int(train.annotations.counts.max())
    name = findings.TOO_MANY_OBJECTS.name
    train, _ = check(data_config(tmp_path), num_queries=most - 1)
    assert f"{most} objects, {most - 1} queries" in str(train.findings.warnings[name])
    assert name not in check(data_config(tmp_path), num_queries=most)[0].findings.warnings


def test_an_image_of_12_bits_is_a_warning(tmp_path):
    change(write_coco(tmp_path), lambda c: c["images"][0].update(file_name="x_ray.tif"))
    (tmp_path / "train2017/0500.jpg").unlink()
    height, width = check(data_config(tmp_path))[0].annotations.sizes[0].tolist()
    values = np.linspace(0, 4095, height * width).reshape(height, width).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "train2017/x_ray.tif")
    assert train_findings(tmp_path)[1][findings.FEW_BITS.name] == "x_ray.tif: 12 bits"
    config = base_config()
    config.data.update(dir=str(tmp_path), pixel_range=(0, 8190), max_objects=4)
    config.data.update(canvases=((64, 64),), eval_short_side=40, eval_max_long_side=64)
    assert not check(config.data, decode=True)[0].findings.warnings
    for batch in eval_batches(open_dataset(config.data, "train"), config):
        row = batch["image_id"].tolist().index(500)
        assert 120 <= batch["image"][row].max() <= 128  # half of the range, not white


def test_the_table_of_the_docs_is_that_of_the_code():
    text = (REPOSITORY / "docs/own_data.md").read_text()
    assert findings.table() in text
    assert len({kind.name for kind in findings.KINDS}) == len(findings.KINDS) > 25
