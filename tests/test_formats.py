"""YOLO and Pascal VOC give the tables that the same data gives in the format of COCO."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_directory import document, write_split
from damage import damaged, examples, one_line, within
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import write_voc, write_yolo
from PIL import ExifTags, Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data import findings, images
from dn_detr_jax.data.check import check, check_split
from dn_detr_jax.data.check_report import report
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.formats import load_split
from dn_detr_jax.data.layout import find_split
from dn_detr_jax.errors import DataError
from dn_detr_jax.training.setup import with_classes_of

# Names in alphabetical order and ids from 0, as VOC numbers its classes.
CLASSES = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog & co"}, {"id": 2, "name": "fish"}]


def data_config(directory, **values):
    config = base_config().data
    config.dir = str(directory)
    config.update(values)
    return config


def content(seed=0, count=3, crowds=False):
    """Like `document`, with images in the order of their names and an object of each class."""
    found = document(count, seed)
    found["images"].sort(key=lambda image: image["file_name"])
    found["categories"] = CLASSES[: len(found["annotations"])]
    new_ids = {7: 2, 3: 0, 5: 1}
    for number, annotation in enumerate(found["annotations"]):
        annotation["category_id"] = new_ids[annotation["category_id"]]
        annotation["category_id"] = number if number < 3 else annotation["category_id"]
        annotation["iscrowd"] *= crowds
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return found


def table_of(directory, split="train"):
    return load_split(find_split(Path(directory), split, data_config(directory)[split]))


def assert_same_table(found, expected):
    """Compares all but ids, which YOLO and VOC have none of."""
    table, categories = found
    assert categories == expected[1]
    names = [Path(name).name for name in table.file_names]
    assert names == list(expected[0].file_names)
    for name in ("sizes", "offsets", "category_ids", "crowd"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected[0], name))
    np.testing.assert_allclose(table.bboxes, expected[0].bboxes, atol=1e-5)
    np.testing.assert_allclose(table.areas, expected[0].areas, atol=1e-3)


@settings(max_examples=examples(12))
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5), outlines=st.booleans())
def test_the_same_data_in_three_formats_is_one_table(tmp_path_factory, seed, count, outlines):
    """Catches a wrong center, swapped axes, an off-by-one of VOC, and lost or mixed-up objects."""
    directory = tmp_path_factory.mktemp("three")
    found = content(seed, count)
    write_split(directory / "coco/train.json", directory / "coco/train", found)
    expected = table_of(directory / "coco")
    yolo = table_of(write_yolo(directory / "yolo", {"train": found}, outlines))
    voc = table_of(write_voc(directory / "voc", {"train": found}))
    assert_same_table(yolo, expected)
    assert_same_table(voc, expected)
    shutil.rmtree(directory)


def test_difficult_objects_of_voc_are_ignored(tmp_path):
    found = content(3, 5, crowds=True)
    assert any(annotation["iscrowd"] for annotation in found["annotations"])
    write_split(tmp_path / "coco/train.json", tmp_path / "coco/train", found)
    voc = table_of(write_voc(tmp_path / "voc", {"train": found}))
    assert_same_table(voc, table_of(tmp_path / "coco"))


@pytest.fixture
def directories(tmp_path):
    """The same two splits in the formats of YOLO and VOC."""
    splits = {"train": content(0, 5), "val": content(1, 4)}
    for image in splits["val"]["images"]:
        image["file_name"] = f"v{image['file_name']}"
    yolo, voc = write_yolo(tmp_path / "yolo", splits), write_voc(tmp_path / "voc", splits)
    return {"yolo": yolo, "voc": voc}


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_both_formats_are_checked_packed_and_read(directories, form):
    """Catches a split that replaces the other one's packed images, and an outdated table."""
    directory = directories[form]
    splits = check(data_config(directory), decode=True)
    text = report(splits)
    assert "0 errors, 0 warnings. This can be trained on." in text
    config = data_config(directory, labels="contiguous")
    for _ in range(2):
        train, validation = (open_dataset(config, split) for split in ("train", "validation"))
        assert (len(train), len(validation)) == (5, 4)
    assert len([path for path in (directory / "packed").iterdir() if path.is_dir()]) == 2
    assert [category.name for category in train.categories] == ["cat", "dog & co", "fish"]
    example = train.source[0]
    shape = images.decode(example.image, tuple(train.sizes[0].tolist())).shape
    assert shape[:2] == tuple(train.sizes[0].tolist())
    changed = next((directory / {"yolo": "labels", "voc": "Annotations"}[form]).rglob("0500.*"))
    before = changed.read_text()
    if form == "yolo":
        changed.write_text("".join(before.splitlines(keepends=True)[1:]))
    else:
        first, last = before.index("  <object>"), before.index("  </object>\n")
        changed.write_text(before[:first] + before[last + len("  </object>\n") :])
    again = open_dataset(config, "train")
    assert len(again.annotations.ids) == len(train.annotations.ids) - 1
    assert len(open_dataset(config, "validation")) == 4


def test_an_image_of_another_size_keeps_the_shares_of_yolo(directories):
    """Catches boxes in pixels that stay those of a replaced image."""
    config = data_config(directories["yolo"])
    before = open_dataset(config, "train").annotations
    path = directories["yolo"] / "images/train/0500.jpg"
    with Image.open(path) as image:
        image.resize((2 * image.width, 3 * image.height)).save(path)
    after = open_dataset(config, "train")
    index = after.annotations.file_names.index("images/train/0500.jpg")
    rows = slice(*after.annotations.offsets[index : index + 2])
    scaled = before.bboxes[rows] * (2, 3, 2, 3)
    np.testing.assert_allclose(after.annotations.bboxes[rows], scaled, rtol=1e-6)
    images.decode(after.source[index].image, tuple(after.sizes[index].tolist()))


def test_boxes_of_yolo_lie_in_the_image_as_shown(directories):
    """Catches shares of the stored width for an image that viewers turn."""
    path = directories["yolo"] / "images/train/0500.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(path) as image:
        image.load()
        size = image.size
        image.save(path, exif=exif)
    files = find_split(directories["yolo"], "train", data_config("").train)
    for rule, expected in (("auto", size), ("as_shown", size), ("as_stored", size[::-1])):
        table, _ = load_split(files, rule)
        index = table.file_names.index("images/train/0500.jpg")
        assert tuple(table.sizes[index]) == expected


# data.yaml and the like, as people and tools write them


def move(directory, *pairs):
    for old, new in pairs:
        (directory / new).parent.mkdir(parents=True, exist_ok=True)
        (directory / old).rename(directory / new)


def describe(directory, text, name="data.yaml"):
    (directory / "data.yaml").unlink()
    (directory / name).write_text(text)


NAMES = "names: [cat, dog & co, fish]\n"


def list_file(directory, prefix):
    names = sorted(path.name for path in (directory / "images/train").iterdir())
    (directory / "train.txt").write_text("\n".join(prefix + name for name in names) + "\n\n")


YOLO_LAYOUTS = {
    "names as numbers": lambda d: describe(
        d, "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog & co\n  2: fish\n"
    ),
    "lists of folders": lambda d: describe(d, f"train: [images/train]\nval: [images/val]\n{NAMES}"),
    "a path elsewhere": lambda d: describe(
        d, f"path: /content/none\ntrain: images/train\nval: images/val\n{NAMES}"
    ),
    "another name": lambda d: describe(
        d, f"path: ../yolo\ntrain: images/train\nval: images/val\n{NAMES}", "coco8.yml"
    ),
    "list file": lambda d: (
        list_file(d, "./images/train/"),
        describe(d, f"train: train.txt\nval: images/val\n{NAMES}"),
    ),
    "list file of CVAT": lambda d: (
        list_file(d, "data/images/train/"),
        describe(d, f"train: train.txt\nval: images/val\n{NAMES}"),
    ),
    "absolute list file of another machine": lambda d: (
        list_file(d, "/content/data/images/train/"),
        describe(d, f"train: train.txt\nval: images/val\n{NAMES}"),
    ),
    "Roboflow": lambda d: (
        move(d, ("images/train", "train/images"), ("labels/train", "train/labels")),
        move(d, ("images/val", "valid/images"), ("labels/val", "valid/labels")),
        describe(d, f"train: ../train/images\nval: ../valid/images\ntest:\n{NAMES}"),
    ),
    "capitals": lambda d: (
        move(d, ("images", "Images"), ("labels", "Labels")),
        move(d, ("Images/train", "Images/Train"), ("Labels/train", "Labels/Train")),
        describe(d, f"train: images/train\nval: Images/val\n{NAMES}", "Data.YAML"),
    ),
    "labels beside the images": lambda d: (
        move(d, ("images", "photos")),
        [path.rename(d / "photos" / path.relative_to(d / "labels")) for path in labels(d)],
        describe(d, f"train: photos/train\nval: photos/val\n{NAMES}"),
    ),
    "Darknet": lambda d: (
        list_file(d, "data/images/train/"),
        (d / "obj.names").write_text("cat\ndog & co\nfish\n"),
        describe(
            d,
            "classes = 3\ntrain = data/train.txt\nvalid = images/val\nnames = data/obj.names\n",
            "obj.data",
        ),
    ),
    "Label Studio": lambda d: describe(d, "cat\ndog & co\nfish\n", "classes.txt"),
}


def labels(directory):
    return sorted((directory / "labels").rglob("*.txt"))


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_layouts_of_yolo_are_found(directories, layout):
    """Each gives the same images, boxes and classes as the plain one."""
    directory = directories["yolo"]
    expected = [table_of(directory, split) for split in ("train", "validation")]
    YOLO_LAYOUTS[layout](directory)
    for split, (table, categories) in zip(("train", "validation"), expected, strict=True):
        found = table_of(directory, split)
        assert found[1] == categories
        names = [[Path(name).name for name in t.file_names] for t in (found[0], table)]
        assert names[0] == names[1]
        np.testing.assert_array_equal(found[0].bboxes, table.bboxes)


VOC_LAYOUTS = {
    "capitals": lambda d: (
        move(d, ("Annotations", "annotations"), ("ImageSets/Main", "imagesets/MAIN")),
        move(d, ("imagesets/MAIN/train.txt", "imagesets/MAIN/Train.txt"), ("JPEGImages", "Images")),
    ),
    "folders of splits": lambda d: (
        [move(d, (f"Annotations/{p.name}", f"Annotations/Val/{p.name}")) for p in xml(d, "v*")],
        [move(d, (f"Annotations/{p.name}", f"Annotations/Train/{p.name}")) for p in xml(d, "0*")],
        shutil.rmtree(d / "ImageSets"),
    ),
    "Roboflow": lambda d: (
        [move(d, (f"Annotations/{p.name}", f"valid/{p.name}")) for p in xml(d, "v*")],
        [move(d, (f"Annotations/{p.name}", f"train/{p.name}")) for p in xml(d, "0*")],
        [
            p.rename(d / ("valid" if p.name[0] == "v" else "train") / p.name)
            for p in sorted((d / "JPEGImages").iterdir())
        ],
        shutil.rmtree(d / "ImageSets"),
    ),
    "names without suffix": lambda d: [
        p.write_text(p.read_text().replace(".jpg", "")) for p in xml(d, "*")
    ],
}


def xml(directory, pattern):
    return sorted((directory / "Annotations").glob(f"{pattern}.xml"))


@pytest.mark.parametrize("layout", VOC_LAYOUTS)
def test_layouts_of_voc_are_found(directories, layout):
    directory = directories["voc"]
    expected = [table_of(directory, split) for split in ("train", "validation")]
    VOC_LAYOUTS[layout](directory)
    for split, (table, categories) in zip(("train", "validation"), expected, strict=True):
        found = table_of(directory, split)
        assert found[1] == categories
        # Without lists, images are in the order of their names.
        np.testing.assert_array_equal(found[0].bboxes, table.bboxes)


COCO_LAYOUTS = {
    "CVAT": ("annotations/instances_Train.json", "images/Train", ""),
    "CVAT without splits": ("annotations/instances_default.json", "images/default", ""),
    "CVAT, images in one folder": ("annotations/instances_default.json", "images", ""),
    "Label Studio": ("result.json", "images", "images/"),
    "Roboflow": ("Train/_annotations.coco.json", "Train", ""),
}


@pytest.mark.parametrize("layout", COCO_LAYOUTS)
def test_layouts_of_tools_in_the_format_of_coco(tmp_path, layout):
    annotations, folder, prefix = COCO_LAYOUTS[layout]
    found = content()
    write_split(tmp_path / annotations, tmp_path / folder, found)
    for image in found["images"]:
        image["file_name"] = prefix + image["file_name"]
    (tmp_path / annotations).write_text(json.dumps(found))
    assert len(table_of(tmp_path)[0].image_ids) == 3
    with pytest.raises(DataError, match=r"it has the JSON files .*\.json"):
        table_of(tmp_path, "validation")


@pytest.mark.parametrize(
    "value,count",
    [("data.yaml", 5), ("ImageSets/Main/val.txt", 4), ("Annotations", 9), ("nothing", None)],
)
def test_named_annotations_may_have_any_format(directories, value, count):
    directory = directories["yolo" if value == "data.yaml" else "voc"]
    config = data_config(directory)
    config.train.annotations = value
    if count is None:
        with pytest.raises(DataError, match=r"data\.train\.annotations: there is no file"):
            find_split(directory, "train", config.train)
    else:
        files = find_split(directory, "train", config.train)
        assert len(load_split(files)[0].image_ids) == count


def test_two_formats_in_a_folder_are_named(directories):
    for path in directories["voc"].iterdir():
        path.rename(directories["yolo"] / path.name)
    with pytest.raises(DataError, match=r"has .*data\.yaml, .*Annotations: say which with"):
        table_of(directories["yolo"])


# What is wrong


def change_line(directory, text):
    path = directory / "labels/train/0500.txt"
    path.write_text(f"{path.read_text()}{text}\n")
    return len(path.read_text().splitlines())


@pytest.mark.parametrize(
    "line,kind,message",
    [
        ("0 120 80 30 20", findings.MALFORMED_ANNOTATION, "120 is no share of the image"),
        ("0 0.5 0.5 0.1", findings.MALFORMED_ANNOTATION, "4 numbers, expected a class and"),
        ("0 0.5 0.5 0.1 0.1 0.9", findings.MALFORMED_ANNOTATION, "6 numbers"),
        ("0 0.5 0.5 0.1 nan", findings.MALFORMED_ANNOTATION, "nan is no share"),
        ("cat 0.5 0.5 0.1 0.1", findings.MALFORMED_ANNOTATION, "expected numbers"),
        ("0.5 0.5 0.5 0.1 0.1", findings.MALFORMED_ANNOTATION, "class '0.5'"),
        ("-1 0.5 0.5 0.1 0.1", findings.MALFORMED_ANNOTATION, "class '-1'"),
        ("3 0.5 0.5 0.1 0.1", findings.UNKNOWN_CATEGORY, "class 3 is none of the 3 in names"),
    ],
)
def test_a_wrong_line_is_named(directories, line, kind, message):
    number = change_line(directories["yolo"], line)
    train, _ = check(data_config(directories["yolo"]))
    (finding,) = train.findings.errors.items()
    assert finding[0] == kind.name
    assert f"labels/train/0500.txt, line {number}: " in str(finding[1])
    assert message in str(finding[1])
    with pytest.raises(DataError, match=rf"0500\.txt, line {number}: "):
        open_dataset(data_config(directories["yolo"]), "train")


@pytest.mark.parametrize(
    "text,message",
    [
        ("names: [a\ntrain: x", r"data\.yaml, line 2: no YAML"),
        ("[1, 2]", r"data\.yaml: expected keys such as train"),
        ("train: images/train", r"data\.yaml: names is missing or empty"),
        ("names: [a, [b]]\ntrain: images/train", r"names\[1\] is .* expected text"),
        ("names: {x: a}\ntrain: images/train", r"names has the number 'x'"),
        ("nc: 3\nnames: [a]\ntrain: images/train", r"nc is 3, but names has 1"),
        (
            "names: [a]\ntrain: photos",
            r"train is 'photos', but there is no .*; .* has data\.yaml",
        ),
        ("names: [a]\ntrain: {a: b}", r"train is not a folder, a list file or a list"),
    ],
)
def test_a_wrong_description_is_named(directories, text, message):
    (directories["yolo"] / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(data_config(directories["yolo"]), "train")
    one_line(error.value)


def test_names_of_yaml_stay_text(directories):
    """Catches `no` that becomes False, and numbers that become no names."""
    text = "train: images/train\nnames: [no, 1, 2.50]\n"
    (directories["yolo"] / "data.yaml").write_text(text)
    assert [c.name for c in table_of(directories["yolo"])[1]] == ["no", "1", "2.50"]


def test_labels_in_the_wrong_place_are_named(directories):
    """Catches a training on background alone."""
    (directories["yolo"] / "labels").rename(directories["yolo"] / "txt")
    with pytest.raises(DataError, match=r"no text files of YOLO \(1\): such as .*labels/train/0"):
        open_dataset(data_config(directories["yolo"]), "train")


@pytest.mark.parametrize(
    "old,new,kind,message",
    [
        ("<xmax>", "<xmax>x", findings.MALFORMED_ANNOTATION, "line 14: bndbox/xmax is 'x"),
        ("<xmin>", "<left>", findings.NO_XML, "line 12: no XML (mismatched tag)"),
        ("<width>", "<width>-", findings.MALFORMED_IMAGE, "line 4: size/width is '-"),
        ("<size>", "<size/><x>", findings.NO_XML, "no XML (mismatched tag)"),
        (".jpg</filename>", ".bmp</filename>", None, ""),
        ("0500.jpg</", "no.jpg</", None, ""),
        ("<bndbox>", "<bndbox/><bndbox>", findings.MALFORMED_ANNOTATION, "xmin is missing"),
    ],
)
def test_a_wrong_xml_file_is_named(directories, old, new, kind, message):
    path = directories["voc"] / "Annotations/0500.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    train, _ = check(data_config(directories["voc"]))
    if kind is None:  # the image is that of the XML file's name
        assert not train.findings.errors
        return
    assert list(train.findings.errors) == [kind.name]
    assert f"0500.xml, {message}"[:10] in str(train.findings.errors[kind.name])
    assert message in str(train.findings.errors[kind.name])
    with pytest.raises(DataError, match=r"0500\.xml, line \d+: "):
        open_dataset(data_config(directories["voc"]), "train")


def test_files_that_lists_name_and_are_not_there(directories):
    (directories["voc"] / "Annotations/0500.xml").unlink()
    with pytest.raises(DataError, match=r"no XML \(1\): 0500\.xml: there is no such file"):
        table_of(directories["voc"])
    list_file(directories["yolo"], "images/train/")
    with (directories["yolo"] / "train.txt").open("a") as file:
        file.write("images/train/nothing.jpg\n")
    describe(directories["yolo"], f"train: train.txt\n{NAMES}")
    with pytest.raises(DataError, match=r"not on disk \(1\): images/train/nothing\.jpg"):
        table_of(directories["yolo"])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """Directories of one split, and the files of annotations in them with their content."""
    above = tmp_path_factory.mktemp("fuzzed")
    splits = {"train": content(0, 3)}
    yolo, voc = write_yolo(above / "yolo", splits), write_voc(above / "voc", splits)
    files = [yolo / "data.yaml", *labels(yolo), voc / "ImageSets/Main/train.txt", *xml(voc, "*")]
    return {path: path.read_bytes() for path in files}


@settings(max_examples=examples(100))
@given(data=st.data())
def test_a_damaged_file_is_named(fuzzed, data):
    """Catches tracebacks, and errors that do not name the file; a report agrees with a training."""
    path = data.draw(st.sampled_from(sorted(fuzzed)), label="file")
    directory = next(above for above in path.parents if above.name in ("yolo", "voc"))
    path.write_bytes(data.draw(damaged(fuzzed[path])))
    config = data_config(directory)
    try:
        with within(20):
            split = check_split(directory, "train", config.train)
            report([split]).encode()
            usable = True
            try:
                table, _ = load_split(find_split(directory, "train", config.train))
                assert all(
                    np.isfinite(table.targets_of(i).boxes).all() for i in range(len(table.sizes))
                )
            except DataError as error:
                one_line(error)
                usable = False
        others = {findings.UNUSABLE_IMAGE.name, findings.NO_TARGETS.name}
        assert usable == (set(split.findings.errors) <= others)
    finally:
        path.write_bytes(fuzzed[path])


@pytest.mark.parametrize("text", ['<!DOCTYPE a [<!ENTITY b SYSTEM "{}">]><annotation>&b;', "{}"])
def test_no_file_that_an_xml_file_names_is_read(directories, tmp_path, text):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = directories["voc"] / "Annotations/0500.xml"
    path.write_text(text.format(secret) + "</annotation>")
    with pytest.raises(DataError) as error:
        table_of(directories["voc"])
    one_line(error.value, "0500.xml, line 1")


def test_supervision_reads_the_same_boxes(directories):
    """Compares with the loaders of supervision, where it is installed."""
    supervision = pytest.importorskip("supervision")
    yolo, voc = directories["yolo"], directories["voc"]
    loaded = {
        "yolo": supervision.DetectionDataset.from_yolo(
            str(yolo / "images/train"), str(yolo / "labels/train"), str(yolo / "data.yaml")
        ),
        "voc": supervision.DetectionDataset.from_pascal_voc(
            str(voc / "JPEGImages"), str(voc / "Annotations")
        ),
    }
    for form, expected in loaded.items():
        table, categories = table_of(directories[form])
        names = {category.id: category.name for category in categories}
        by_name = {Path(path).name: found for path, found in expected.annotations.items()}
        for index, name in enumerate(table.file_names):
            rows = slice(*table.offsets[index : index + 2])
            boxes = table.bboxes[rows].copy()
            boxes[:, 2:] += boxes[:, :2]
            found = by_name[Path(name).name]
            np.testing.assert_allclose(found.xyxy, boxes, atol=1e-3)
            ours = [names[i] for i in table.category_ids[rows].tolist()]
            assert [expected.classes[i] for i in found.class_id] == ours


# Splits that a directory does not have


def one_split(directory, form, found):
    if form == "coco":
        write_split(directory / "train.json", directory / "train", found)
        return directory
    return (write_yolo if form == "yolo" else write_voc)(directory, {"train": found})


def test_a_part_of_the_training_images_is_evaluated_on(tmp_path):
    """Catches images in both splits, and splits that depend on format, order or seed."""
    divisions = []
    for form in ("coco", "yolo", "voc"):
        directory = one_split(tmp_path / form, form, content(0, 10))
        with pytest.raises(DataError, match=r"evaluate on a fifth .*data\.prepare_split=0\.2"):
            open_dataset(data_config(directory), "validation")
        config = data_config(directory, prepare_split=0.3)
        train, validation = (open_dataset(config, split) for split in ("train", "validation"))
        assert (len(train), len(validation)) == (7, 3)
        names = [[Path(n).name for n in d.annotations.file_names] for d in (train, validation)]
        divisions.append((sorted(names[0]), sorted(names[1])))
        assert not set(names[0]) & set(names[1])
        for dataset in (train, validation):
            for i in range(len(dataset)):
                path = dataset.annotations.file_names[i].rpartition("/")[2]
                (stored,) = [p for p in directory.rglob(path) if "packed" not in p.parts]
                example = dataset.source[i]
                assert example.image == stored.read_bytes()
                assert example.image_id == dataset.image_ids[i]
                assert len(example.boxes) == dataset.annotations.counts[i]
        truth = validation.coco_ground_truth()
        assert len(truth["images"]) == 3
        assert len(truth["annotations"]) == len(validation.annotations.ids)
        splits = check(config)
        assert [len(split.annotations.image_ids) for split in splits] == [7, 3]
        assert not any(split.findings.errors for split in splits)
    assert divisions[0] == divisions[1] == divisions[2]


def test_validation_data_wins_over_a_part_of_the_training_images(directories):
    config = data_config(directories["yolo"], prepare_split=0.4)
    assert [len(open_dataset(config, split)) for split in ("train", "validation")] == [5, 4]


@pytest.mark.parametrize("labels", ["category_ids", "contiguous"])
@pytest.mark.parametrize("has_objects", [False, True])
def test_a_class_that_one_file_names(tmp_path, has_objects, labels):
    """An export of Roboflow has two names for its empty category 0."""
    splits = {"train": content(0, 4), "val": content(1, 3)}
    for name, found in splits.items():
        for annotation in found["annotations"]:
            annotation["category_id"] += 1
        classes = [{"id": c["id"] + 1, "name": c["name"]} for c in CLASSES]
        found["categories"] = [{"id": 0, "name": f"fish-{name}"}, *classes]
    splits["val"]["categories"].append({"id": 4, "name": "whale"})
    if has_objects:
        splits["val"]["annotations"][0]["category_id"] = 4
    for seed, (name, found) in enumerate(splits.items()):
        write_split(tmp_path / f"{name}.json", tmp_path / name, found, seed)
    config = data_config(tmp_path, labels=labels)
    _, validation = check(config)
    datasets = [open_dataset(config, split) for split in ("train", "validation")]
    kind = findings.EMPTY_CLASS_OF_ONE_SPLIT.name
    assert "'fish-train' (0) is in the training file" in str(validation.findings.warnings[kind])
    if has_objects:
        assert findings.CLASS_OF_ONE_SPLIT.name in validation.findings.errors
        with pytest.raises(DataError, match=r"label 0 .*'fish-val'"):
            with_classes_of(*datasets)
        return
    assert not validation.findings.errors
    found = with_classes_of(*datasets)
    assert found.categories == datasets[0].categories
    for i in range(len(found)):
        before = [datasets[1].categories[label] for label in datasets[1].source[i].labels]
        assert [found.categories[label] for label in found.source[i].labels] == before
