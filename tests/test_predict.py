"""Prediction against the evaluation on the same images, Pillow and pycocotools."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import fast_jit
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from test_videos import write_frames

import dn_detr_jax
from dn_detr_jax.checkpoints.manager import (
    Checkpoints,
)
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator
from dn_detr_jax.evaluation.detect import jit_eval_step
from dn_detr_jax.files import read_json_lines
from dn_detr_jax.inference import image_files
from dn_detr_jax.inference.predictor import choose_canvas, read_image, read_run
from dn_detr_jax.inference.tiles import TiledPredictor
from dn_detr_jax.models.registry import build_model
from dn_detr_jax.sharding import make_mesh, put_batch

_ROOT = Path(__file__).parent.parent
NAMELESS = 6  # a label of digits_run


@pytest.fixture(scope="module")
def validation(digits_run):
    return open_dataset(read_run(digits_run).config.data, "validation")


@pytest.fixture(scope="module")
def images():
    """Makes noise images: landscape, portrait, square, small, and longer than any canvas."""
    rng = np.random.default_rng(0)
    sizes = [(90, 120), (200, 150), (64, 64), (30, 40), (400, 20), (100, 130)]
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def assert_same(found, expected):
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3 * max(expected.size))


def test_a_split_gives_what_its_evaluation_sees(digits_run, predictor, validation):
    """Catches another resize, canvas, channel order, number of detections or scale of boxes."""
    run = read_run(digits_run)
    mesh = make_mesh(1)
    detect = jit_eval_step(model=build_model(run.config.model), config=run.config, mesh=mesh)
    categories = [{"id": c.id, "name": c.name} for c in predictor.categories if c.name]
    truth = validation.coco_ground_truth() | {"annotations": [], "categories": categories}
    evaluator = CocoEvaluator(truth, [c.id for c in predictor.categories])
    wide = validation.sizes[:, 0] < validation.sizes[:, 1]
    subset = np.flatnonzero(wide)[:4]
    program = None
    for batch in eval_batches(validation, run.config, subset=subset):
        arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
        arrays = put_batch(arrays, mesh)
        program = program or detect.lower(run.params, arrays).compile(fast_jit.OPTIONS)
        found = program(run.params, arrays)
        evaluator.add(*(found[name] for name in ("image_id", "scores", "labels", "boxes")))
    files = [validation.source[i].image for i in subset]
    for i, found in zip(subset, predictor.predict(files, threshold=0.0), strict=True):
        image_id = int(validation.image_ids[i])
        expected = evaluator._detections[image_id]
        assert 0 < len(found) == len(expected) <= run.config.eval.num_select
        assert found.size == tuple(validation.sizes[i])
        for ours, theirs in zip(found.to_coco(image_id), expected, strict=True):
            assert ours["category_id"] == theirs["category_id"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=0.05)


def test_images_of_all_sizes_and_kinds_in_one_call(predictor, images):
    """Catches results in the order of the batches, and images that depend on their neighbors."""
    png = io.BytesIO()
    Image.fromarray(images[1]).save(png, "PNG")
    mixed = [images[0], png.getvalue(), Image.fromarray(images[2]), *images[3:]]
    together = predictor.predict(mixed, threshold=0.3)
    assert [found.size for found in together] == [p.shape[:2] for p in images]
    for image, found in zip(images, together, strict=True):
        assert_same(found, predictor.predict(image, threshold=0.3))
    assert predictor.predict([]) == []


def test_threshold_order_and_classes(digits_run, predictor, images):
    everything = predictor.predict(images[0], threshold=0.0)
    num_select = read_run(digits_run).config.eval.num_select
    assert NAMELESS not in everything.labels and 0 < len(everything) < num_select
    assert (np.diff(everything.scores) <= 0).all()
    assert (everything.category_ids == 10 * (everything.labels + 1)).all()
    names = [predictor.categories[label].name for label in everything.labels]
    assert list(everything.class_names) == names
    middle = float(everything.scores[len(everything) // 2])
    some = predictor.predict(images[0], threshold=middle)
    assert 0 < len(some) == np.sum(everything.scores >= middle) < len(everything)
    for name in ("boxes", "scores", "labels", "category_ids"):
        value = getattr(some, name)
        np.testing.assert_array_equal(value, getattr(everything, name)[: len(some)])
    assert [some.boxes.dtype, some.scores.dtype, some.labels.dtype] == ["f4", "f4", "i4"]
    assert len(predictor.predict(images[0], threshold=1.0)) == 0


class _Blind(nn.Module):
    """A detector that compiles instantly and has no detections."""

    def __call__(self, images, sizes):
        shape = (1, len(images), 9)
        return {"pred_logits": jnp.zeros((*shape, 10)), "pred_boxes": jnp.zeros((*shape, 4))}


def test_each_canvas_is_compiled_once_and_when_needed(digits_run, images, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dn_detr_jax")
    run = read_run(digits_run)
    monkeypatch.setattr("dn_detr_jax.inference.predictor.build_model", lambda config: _Blind())
    fresh = dn_detr_jax.Predictor(run.config, run.params, run.categories)
    counts = []
    for image in (images[0], images[0], images[5], images[1], images[4]):
        fresh.predict(image)
        counts.append(sum("compiled prediction" in r.getMessage() for r in caplog.records))
    assert counts == [1, 1, 1, 2, 2]


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.lists(st.tuples(st.integers(16, 200), st.integers(16, 200)), min_size=1, max_size=3),
)
def test_any_image_fits_a_canvas(size, canvases):
    """Catches sizes beyond the canvas or of no pixels, and images shrunk without need."""
    config = ConfigDict({"eval_short_side": 80, "eval_max_long_side": 120})
    canvas, placed = choose_canvas(size, canvases, config)
    assert (placed >= 1).all() and (placed <= canvases[canvas]).all()
    wide, wanted = choose_canvas(size, [(120, 120)], config)
    assert wide == 0
    if any((wanted <= c).all() for c in canvases):
        np.testing.assert_array_equal(placed, wanted)
    else:
        assert (placed >= np.array(canvases[canvas]) - 1).any()  # at its largest size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])  # Pillow turns TIFF while it reads
def test_exif_orientation_is_applied_as_pillow_does(tmp_path, orientation, suffix):
    """Catches a wrong turn of any of the eight."""
    stored = Image.fromarray(
        np.random.default_rng(orientation).integers(0, 256, (5, 8, 3), np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)
    with Image.open(path) as reopened:
        expected = np.asarray(ImageOps.exif_transpose(reopened).convert("RGB"))
        assert (expected.shape[0] == 8) == (orientation >= 5)
        np.testing.assert_array_equal(read_image(reopened), expected)
    for image in (path, str(path), path.read_bytes(), expected):
        np.testing.assert_array_equal(read_image(image), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            np.zeros((4, 5, 3), np.float32),
            r"float32\[4, 5, 3\] as an image.*expected uint8 \[height",
        ),
        (np.zeros((2, 4, 5, 3), np.uint8), r"uint8\[2, 4, 5, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (b"no image", "8 bytes that are no readable image"),
        (5, "int as an image, expected a path"),
    ],
)
def test_what_is_no_image_is_named(predictor, image, words):
    with pytest.raises(DataError, match=words):
        predictor.predict([image])


def test_unreadable_files_are_named(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(DataError, match=r"text\.jpg: 4 bytes"):
        predictor.predict(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        predictor.predict(tmp_path / "none.jpg")
    with pytest.raises(DataError, match=r"threshold is 50"):
        predictor.predict(tmp_path / "none.jpg", threshold=50)


# Work directories


def test_a_missing_work_directory_or_step_is_one_line(digits_run, tmp_path):
    for path, words in ((tmp_path, "no config.json"), (tmp_path / "x", "no such directory")):
        with pytest.raises(CheckpointError, match=words) as error:
            dn_detr_jax.load(path)
        assert str(path) in str(error.value)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; steps: 4"):
        dn_detr_jax.load(digits_run, step=5)
    assert read_run(digits_run).step == 4  # the latest, as none has an AP


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"AP": 0.4, "threshold": 0.31}, 0.31),
        ({"AP": 0.4, "threshold": float("nan")}, 0.5),  # no detection was right
        ({"AP": 0.4}, 0.5),  # of a version without
        (None, 0.5),  # no evaluation at this step
    ],
)
def test_the_threshold_is_that_of_the_checkpoint(digits_run, tmp_path, caplog, metrics, expected):
    """Catches a threshold of another checkpoint."""
    run = read_run(digits_run)
    with Checkpoints(tmp_path, run.config, categories=run.categories) as checkpoints:
        checkpoints.save(1, {"params": run.params}, metrics={"AP": 0.1, "threshold": 0.9})
        checkpoints.save(2, {"params": run.params}, metrics=metrics)
    assert read_run(tmp_path, 2).threshold == expected
    file = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    file.write_text('{"AP": 0.1, "threshold": 0.8}')  # not what was written
    assert read_run(tmp_path, 1).threshold == 0.5
    assert "metrics: can't be read" in caplog.text


def test_a_call_without_a_threshold_takes_that_of_the_run(digits_run, predictor, images):
    """The tiles too; an explicit threshold wins, 0 included."""
    everything = predictor.predict(images[0], threshold=0)
    assert predictor.threshold == 0.5
    middle = float(everything.scores[len(everything) // 2])
    predictor.threshold = middle
    try:
        for finder in (predictor, TiledPredictor(predictor, 500)):
            assert_same(finder.predict(images[0]), predictor.predict(images[0], middle))
            assert len(finder.predict(images[0], 0)) == len(everything)
    finally:
        predictor.threshold = 0.5


def test_classes_of_a_directory_without_any(digits_run, tmp_path):
    """Catches unusable runs of the first format and imports."""
    run = read_run(digits_run)
    with Checkpoints(tmp_path, run.config) as checkpoints:
        checkpoints.save(0, {"params": run.params})
    document = json.loads((tmp_path / "config.json").read_text())
    del document["config"]["data"]["snap"]  # a key that was added later
    document["config"]["data"]["window"] = 3  # a removed key
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_run(tmp_path).categories[9].name == "class 9"
    document["config"]["model"]["window"] = 3  # another model
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"model\.window = 3: unknown to this"):
        read_run(tmp_path)
    del document["config"]["model"]["window"]
    document["categories"] = [{"id": 1, "name": "one"}]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="1 categories for 10 classes"):
        read_run(tmp_path)


# The command


def test_images_are_found_in_folders(tmp_path, caplog):
    """Covers all suffixes in upper and lower case; ignored files are named."""
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "c.Jp2", "d.pgm", "e.GIF", "notes.txt", "._a.jpg", "sub/f.jpg"):
        (tmp_path / name).write_bytes(b"")
    inside = [tmp_path / name for name in ("a.jpg", "b.PNG", "c.Jp2", "d.pgm", "e.GIF")]
    assert image_files.find_images([tmp_path, tmp_path / "a.jpg"]) == inside
    assert caplog.messages == [f"{tmp_path}: not predicted for: notes.txt, sub/"]
    assert image_files.find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    with pytest.raises(DataError, match=r"none: there is no such file"):
        image_files.find_images([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: a folder without images"):
        image_files.find_images([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("paths", "names", "expected"),
    [
        (["x/train/1.jpg"], ["1.jpg"], [(0,)]),
        (["x/1.jpg"], ["train/1.jpg"], [(0,)]),  # copied into one folder
        (["a/1.jpg", "b/1.jpg"], ["b/1.jpg", "a/1.jpg"], [(1,), (0,)]),
        (["b/1.jpg"], ["1.jpg", "b/1.jpg", "b/b/1.jpg"], [(1,)]),
        (["c/1.jpg"], ["a/1.jpg", "b/1.jpg"], [(0, 1)]),
        (["1.jpg"], ["a/1.jpg", "a/1.jpg"], [(0, 1)]),
        (["a/1.jpg"], ["a\\1.jpg"], [(0,)]),
        (["caf\u00e9.jpg"], ["cafe\u0301.jpg"], [(0,)]),
        (["11.jpg", "1.jpeg", "x"], ["1.jpg", ""], [(), (), ()]),
    ],
)
def test_files_are_found_in_an_annotation_file_by_name(paths, names, expected):
    """Catches a file matched with one of the same name in another folder."""
    assert image_files.match_file_names(paths, names) == expected


def test_invented_ids_are_said_to_be_invented(caplog):
    image_files.number_images([Path("7.jpg")])
    image_files.number_images([Path("a.jpg")])
    numbers, positions = caplog.messages
    assert "the numbers in the file names" in numbers and "positions" in positions
    assert all("invented" in line and "--annotations" in line for line in caplog.messages)


def test_images_of_the_same_name_do_not_overwrite_each_other():
    paths = [Path("a/x.jpg"), Path("b/x.jpg"), Path("x_1.jpg")]
    names = image_files._output_names(image_files.number_images(paths))
    assert len(set(names)) == 3
    assert image_files._output_names([image_files.ImageFile(Path("a/7.png"), 7)]) == ["7.jpg"]


def test_command_writes_results_and_goes_on_after_a_broken_file(
    digits_run, predictor, validation, tmp_path
):
    """Compares the output of the real command, as pycocotools reads it, with the predictor.

    The images fit into one tile, and so have the detections of a prediction without tiles.
    """
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i + 5:012}.png").write_bytes(validation.source[i].image)
    (folder / "000000000001.jpg").write_bytes(b"broken")
    street = write_frames(tmp_path / "street.avi", 3)
    command = [
        sys.executable,
        "-m",
        "dn_detr_jax",
        "predict",
        f"--workdir={digits_run}",
        str(folder),
        str(street),
    ]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'found'}", "--threshold=0.4", "--tile=2000"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == "error: 1 of 5 files can't be read, named above"
    assert any("000000000001.jpg" in line for line in lines) and "Traceback" not in done.stderr

    assert done.stdout.splitlines() == [
        f"Wrote the detections of 3 images to {tmp_path / 'found'}",
        f"Wrote the detections of 3 frames to {tmp_path / 'found'}",
    ]
    assert len(read_json_lines(tmp_path / "found" / "videos" / "street.jsonl")) == 3
    images = json.loads((tmp_path / "found" / "images.json").read_text())
    assert [image["id"] for image in images] == [5, 6, 7]
    assert images[0]["file_name"] == str(folder / "000000000005.png")
    truth = COCO()
    categories = [{"id": c.id, "name": c.name} for c in predictor.categories]
    truth.dataset = {"images": images, "annotations": [], "categories": categories}
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "found" / "detections.json"))
    for i, image in enumerate(images):
        assert (image["height"], image["width"]) == tuple(validation.sizes[i])
        expected = predictor.predict(validation.source[i].image, threshold=0.4)
        got = results.loadAnns(results.getAnnIds(imgIds=[image["id"]]))
        assert len(expected) == len(got) > 0
        np.testing.assert_allclose([d["score"] for d in got], expected.scores, atol=1e-4)
        np.testing.assert_array_equal([d["category_id"] for d in got], expected.category_ids)
        bboxes = np.array([d["bbox"] for d in got])
        np.testing.assert_allclose(bboxes[:, :2], expected.boxes[:, :2], atol=0.05)
        np.testing.assert_allclose(bboxes[:, :2] + bboxes[:, 2:], expected.boxes[:, 2:], atol=0.05)
        with Image.open(tmp_path / "found" / "pictures" / f"{i + 5:012}.jpg") as drawn:
            assert drawn.size == (image["width"], image["height"])
            stored = Image.open(io.BytesIO(validation.source[i].image)).convert("RGB")
            assert np.any(np.abs(np.asarray(drawn, int) - np.asarray(stored, int)) > 100)
