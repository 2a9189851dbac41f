"""Damaged, odd or hostile annotation files, through everything that a training does.

`test_check.py` puts single wrong values into good files. This module damages whole files, varies
encodings, uses numbers at the ends of their ranges, and goes on to the results: the file of the
table, plans of batches, and the evaluation.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import tracemalloc
import unicodedata

import numpy as np
import pytest
from coco_directory import CATEGORIES, document, write_split
from damage import damaged, examples, one_line, within
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dn_detr_jax.config import base_config
from dn_detr_jax.data import images, records, tfrecord
from dn_detr_jax.data.annotations import label_categories, load_table, save_table
from dn_detr_jax.data.check import check_split
from dn_detr_jax.data.check_report import report
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.formats import load_split
from dn_detr_jax.data.layout import find_split
from dn_detr_jax.data.plan import TrainPlan, plan_eval
from dn_detr_jax.data.shards import SPLIT
from dn_detr_jax.errors import DataError
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator

CONTENT = document(4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_split(folder / "train.json", folder / "train", CONTENT)
    return folder


def data_config(directory):
    config = base_config().data
    config.dir = str(directory)
    return config


def used(directory, content: bytes) -> bool:
    """Puts the numbers of a file through all their uses; returns whether the file is accepted."""
    (directory / "train.json").write_bytes(content)
    config = data_config(directory)
    with within(20):
        split = check_split(directory, "train", config.train)
        report([split]).encode()
        files = find_split(directory, "train", config.train)
        try:
            table, categories = load_split(files)
        except DataError as error:
            one_line(error, "train.json")
            assert split.findings.errors
            return False
        # Errors of image files, and of a training split alone, are not covered here.
        others = {"image that can't be used", "no object to learn from"}
        assert set(split.findings.errors) <= others
        _use(directory, table, categories)
    return True


def _use(directory, table, categories):
    save_table(directory / "table.npz", table, categories)
    assert_same_table(load_table(directory / "table.npz"), (table, categories))
    for labels in ("contiguous", "category_ids"):
        with allowed():
            assert 0 < len(label_categories(categories, labels)) <= 10_000
    sizes = {"sizes": table.sizes, "image_ids": table.image_ids, "batch_size": 2}
    augment = base_config().data.augment
    canvases = ((800, 1344), (1344, 800))
    with allowed():
        plan = TrainPlan(seed=0, augment=augment, canvases=canvases, **sizes)
        assert_within(plan.epoch(0))
    with allowed():
        assert_within(plan_eval(short_side=800, max_long_side=1333, canvases=canvases, **sizes))
    for i in range(len(table.image_ids)):
        assert np.isfinite(table.targets_of(i).boxes).all()
    evaluator = CocoEvaluator(json.loads(json.dumps(table.coco_json(categories, ""))))
    ids = table.image_ids[:1]
    evaluator.add(ids, np.ones((1, 1)), np.zeros((1, 1), int), np.full((1, 1, 4), 0.5))
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        values = [*evaluator.metrics().values(), *evaluator.per_class().values()]
    assert all(math.isnan(value) or 0 <= value <= 1 for value in values)


@contextlib.contextmanager
def allowed():
    try:
        yield
    except DataError as error:
        one_line(error)


def assert_within(plan):
    sizes = plan.geometry.size
    canvases = np.array(plan.canvases)[plan.canvas][:, None]
    assert ((sizes >= 1) & (sizes <= canvases))[plan.indices >= 0].all()
    assert (plan.geometry.crop[..., :2] >= 0).all() and (plan.geometry.crop[..., 2:] >= 1).all()


def assert_same_table(found, expected):
    assert found[1] == expected[1] and found[0].file_names == expected[0].file_names
    for name in ("image_ids", "sizes", "offsets", "ids", "bboxes", "category_ids", "areas"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(expected[0], name))


NUMBERS = st.one_of(
    st.integers(-1, 64),
    st.sampled_from([2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 10**400, -(2**63)]),
    st.sampled_from([1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-9, 64.0]),
    st.floats(),
)
NAMES = st.one_of(
    st.text(max_size=4),
    st.sampled_from([" ", "a ", "  a", "a (3)", "\u00a0", "\u200b", "é", "e\u0301", "\U0001f41f"]),
    st.sampled_from(["/", ".", "..", "~", "a" * 300, "a" * 5000, "-", "0500.jpg/x", "\ud800"]),
)
DEEP = st.integers(1, 1200).map(lambda depth: json.loads("[" * depth + "]" * depth))


@settings(max_examples=examples(60))
@given(data=st.data())
def test_numbers_and_names_at_the_ends_of_their_ranges(directory, data):
    """Catches overflow in tables, plans and evaluation, and names that a format can't hold."""
    content = copy.deepcopy(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        entry = data.draw(st.sampled_from(content[part]))
        key = data.draw(st.sampled_from(sorted(entry)))
        value = st.one_of(NAMES if isinstance(entry[key], str) else NUMBERS, DEEP)
        if key == "bbox":
            value = st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), DEEP)
        entry[key] = data.draw(value)
    used(directory, json.dumps(content).encode())


@settings(max_examples=examples(80))
@given(data=st.data())
def test_a_damaged_file_is_named(directory, data):
    used(directory, data.draw(damaged(json.dumps(CONTENT).encode())))


@settings(max_examples=examples(20))
@given(st.binary(max_size=60))
@example(b"")
@example(b"\xef\xbb\xbf")
@example(b"\0" * 50)
@example(b'{"images": [], "images": [], "annotations": [], "categories": [{}]}')
def test_bytes_of_any_kind_are_named(directory, data):
    assert not used(directory, data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_encodings_of_json_are_read(directory, encoding):
    content = copy.deepcopy(CONTENT)
    content["categories"][0]["name"] = "pêche"
    assert used(directory, json.dumps(content, ensure_ascii=False).encode(encoding))


def test_another_encoding_is_named(directory):
    content = copy.deepcopy(CONTENT)
    content["categories"][0]["name"] = "pêche"
    assert not used(directory, json.dumps(content, ensure_ascii=False).encode("latin-1"))


def test_the_last_of_keys_that_come_twice_counts(directory):
    """Catches duplicate keys that are merged; the last one counts, as in readers of JSON."""
    text = json.dumps(CONTENT)
    assert used(directory, text.replace('"images":', '"images": 3, "images":').encode())
    assert not used(directory, (text[:-1] + ', "images": 3}').encode())


def test_deep_outlines_are_left_out_or_named(directory):
    """Catches an overflow of Python's stack, at any place in the file."""
    for depth in (100, 900, 990, 995, 1000, 5000, 100_000):
        for place in ('"segmentation": ', '"score": ', '"id": '):
            nested = place + "[" * depth + "]" * depth + ", "
            text = json.dumps(CONTENT).replace('"bbox"', nested + '"bbox"', 1)
            used(directory, text.encode())


def test_sizes_that_a_file_claims_take_no_memory(directory):
    """Catches memory allocated for a claimed size; (2**31 - 1)**2 pixels are 10 exabytes."""
    content = copy.deepcopy(CONTENT)
    for image in content["images"]:
        image["height"] = image["width"] = 2**31 - 1
    tracemalloc.start()
    try:
        used(directory, json.dumps(content).encode())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    (directory / "train.json").write_text(json.dumps(content))
    dataset = open_dataset(data_config(directory), "train")
    with pytest.raises(DataError, match="but annotated as 2147483647 x 2147483647"):
        images.decode(dataset.source[0].image, tuple(dataset.sizes[0].tolist()))


@settings(max_examples=examples(12))
@given(names=st.lists(NAMES, min_size=len(CATEGORIES), max_size=len(CATEGORIES)))
@example([" ", "  ", "a"])
@example(["a", "a ", "a"])
@example(["a", "a (3)", "a"])
def test_names_of_classes_come_back_from_what_is_packed(directory, names):
    """Catches names that do not fit the text file of the records, which has a line for each."""
    content = copy.deepcopy(CONTENT)
    for entry, name in zip(content["categories"], names, strict=True):
        entry["name"] = name
    (directory / "train.json").write_text(json.dumps(content))
    config = data_config(directory)
    config.labels = "contiguous"
    try:
        dataset = open_dataset(config, "train")
    except DataError as error:
        one_line(error)
        kinds = [set(map(unicodedata.category, name)) for name in names]
        assert any(not found or {"Cc", "Cs"} & found for found in kinds)
        return
    by_id = {category.id: category.name for category in dataset.categories}
    assert by_id == {entry["id"]: name for entry, name in zip(CATEGORIES, names, strict=True)}
    assert len(dataset.source[0].labels) == dataset.annotations.counts[0]


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "../../../../../../dev/urandom", "."])
def test_a_file_without_an_end_is_no_image(directory, name):
    """Catches packing that reads forever, or until the memory is full."""
    pipe = directory / "train" / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    content = copy.deepcopy(CONTENT)
    content["images"][0]["file_name"] = name
    with within(20):
        assert not used(directory, json.dumps(content).encode())
        with pytest.raises(DataError, match="image that is not on disk"):
            open_dataset(data_config(directory), "train")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Returns a packed directory, and the files of its packed folder by name."""
    directory = tmp_path_factory.mktemp("packed")
    write_split(directory / "train.json", directory / "train", CONTENT)
    open_dataset(data_config(directory), "train")
    (folder,) = (path for path in (directory / "packed").iterdir() if path.is_dir())
    return directory, {path: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=examples(25))
@given(data=st.data())
def test_damaged_records_are_named(packed, data):
    """Catches the errors of TFDS, protocol buffers and NumPy, which name no file."""
    directory, contents = packed
    path = data.draw(st.sampled_from(sorted(contents)), label="file")
    path.write_bytes(data.draw(damaged(contents[path])))
    try:
        with within(20):
            dataset = open_dataset(data_config(directory), "train")
            for i in range(len(dataset)):
                example = dataset.source[i]
                images.decode(example.image, tuple(dataset.sizes[i].tolist()))
    except DataError as error:
        one_line(error)
    except OSError as error:
        assert str(directory) in str(error.filename)
    finally:
        path.write_bytes(contents[path])


def test_no_code_beside_records_is_imported(packed, monkeypatch):
    """Catches code of a folder that TFDS runs: it imports the module of any named feature."""
    directory, contents = packed
    (path,) = (path for path in contents if path.name == "features.json")
    marker = directory / "marker"
    (path.parent / "hostile_features.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(path.parent))
    nested = json.dumps({"type": "hostile_features.Image", "content": {}})
    image = "tensorflow_datasets.core.features.image_feature.Image"
    good = contents[path].decode()
    named = good.replace(image, "hostile_features.Image")
    assert named != good
    legacy = json.dumps({"type": "hostile_features.Image", "content": {}})
    inner = json.dumps({"pythonClassName": image, "jsonFeature": {"json": nested}})
    try:
        for text in (named, named.replace("pythonClassName", "python_class_name"), legacy, inner):
            path.write_text(text)
            with pytest.raises(DataError, match=r"hostile_features.* no feature of TFDS"):
                records.open_records(path.parent, SPLIT)
            assert not marker.exists()
        path.write_bytes(contents[path])
        monkeypatch.setattr(records, "_check_features", lambda path: None)
        path.write_text(named)
        with pytest.raises(DataError):
            records.open_records(path.parent, SPLIT)
        assert marker.exists()  # what the check is for
    finally:
        path.write_bytes(contents[path])


@pytest.mark.parametrize("name", ["annotations.npz", "source.json", "features.json"])
def test_no_pickle_beside_records_is_read(packed, name):
    directory, contents = packed
    (path,) = (path for path in contents if path.name == name)
    marker = directory / "marker of a pickle"
    hostile = Touch(str(marker))
    try:
        for write in (
            lambda: np.savez(path.open("wb"), **{"categories.id": np.array([hostile], object)}),
            lambda: np.save(path.open("wb"), np.array([hostile], object), allow_pickle=True),
            lambda: path.write_bytes(pickle.dumps(hostile)),
        ):
            write()
            if name == "features.json":  # which TFDS reads, and this project's folders do without
                with pytest.raises(DataError):
                    records.open_records(path.parent, SPLIT)
            elif name == "source.json":  # which is for people
                open_dataset(data_config(directory), "train")
            else:
                with pytest.raises(DataError):
                    open_dataset(data_config(directory), "train")
        index = directory / "index.npy"
        np.save(index, np.array([hostile], object), allow_pickle=True)
        assert tfrecord._saved_index(index, [], []) is None
        assert not marker.exists()
        pickle.loads(pickle.dumps(hostile))
        assert marker.exists()
        marker.rmdir()
    finally:
        path.write_bytes(contents[path])


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
