"""The scenes of handwritten digits and their data set."""

import io
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data import images
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.digit_scenes.builder import DigitScenes, DigitScenesConfig
from dn_detr_jax.data.digit_scenes.scenes import (
    MAX_DIGITS,
    SPLITS,
    _draw_digit,
    digits_of_split,
    draw_scene,
)


@pytest.fixture(scope="module")
def scenes():
    return {split: [draw_scene(0, split, i) for i in range(100)] for split in SPLITS}


def data_config(directory, name="digits_tiny"):
    config = base_config().data
    config.name, config.dir = name, str(directory)
    return config


def test_every_scene_can_be_drawn_alone_with_the_same_result(scenes):
    for i in (93, 3, 77):
        again = draw_scene(0, "train", i)
        for field, expected in zip(again, scenes["train"][i], strict=True):
            np.testing.assert_array_equal(field, expected)
    assert not np.array_equal(draw_scene(1, "train", 3).image, scenes["train"][3].image)
    assert not np.array_equal(scenes["validation"][3].image, scenes["train"][3].image)


def test_validation_shows_no_digit_of_training(scenes):
    of_split = {split: np.concatenate(digits_of_split(split)) for split in SPLITS}
    assert len(of_split["train"]) + len(of_split["validation"]) == 1797
    assert not set(of_split["train"]) & set(of_split["validation"])
    for split in SPLITS:
        used = np.concatenate([scene.digits for scene in scenes[split]])
        assert set(used) <= set(of_split[split])


def test_labels_are_those_of_the_samples(scenes):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for scene in scenes["train"]:
        np.testing.assert_array_equal(scene.labels, target[scene.digits])


def test_images_are_varied(scenes):
    everything = scenes["train"] + scenes["validation"]
    sizes = np.array([scene.image.shape[:2] for scene in everything])
    assert sizes.min() >= 80 and sizes.max() <= 128 and sizes.min(1).max() <= 96
    heights, widths = sizes.T
    assert (heights < widths).any() and (heights > widths).any() and (heights == widths).any()
    counts = np.bincount([len(scene.labels) for scene in everything], minlength=MAX_DIGITS + 1)
    assert len(counts) == MAX_DIGITS + 1 and counts.min() > 0
    assert 0.01 < counts[0] / len(everything) < 0.08
    boxes = np.concatenate([scene.boxes for scene in everything])
    digit_heights = boxes[:, 3] - boxes[:, 1]
    assert digit_heights.min() >= 12 and digit_heights.max() <= 56
    assert 20 < np.median(digit_heights) < 36


def test_boxes_are_within_the_image_and_around_ink(scenes):
    for scene in scenes["train"]:
        height, width = scene.image.shape[:2]
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, 2:] <= (width, height)).all()
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()


def test_boxes_are_tight():
    """An image with and without its only digit differs in the box, up to each of its sides."""
    from dn_detr_jax.data.digit_scenes import scenes as module

    checked = 0
    for index in range(150):
        scene = draw_scene(3, "train", index)
        if len(scene.labels) != 1:
            continue
        rng = np.random.default_rng([3, 0, index])
        height, width = module._draw_size(rng)
        background = module._draw_background(rng, height, width)
        change = np.abs(scene.image - background).max(-1)
        left, top, right, bottom = scene.boxes[0]
        inside = change[top:bottom, left:right]
        outside = change.copy()
        outside[top:bottom, left:right] = 0
        assert outside.max() < 16  # grain
        for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert side.max() > 16
        checked += 1
    assert checked > 5


def test_digits_are_not_hidden(scenes):
    for scene in scenes["train"]:
        for i, a in enumerate(scene.boxes):
            for b in scene.boxes[:i]:
                size = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
                smaller = min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())
                assert np.maximum(size, 0).prod() <= 0.3 * smaller


def test_opacity_reaches_the_sides_of_the_crop():
    rng = np.random.default_rng(0)
    for sample in range(20):
        alpha = _draw_digit(rng, sample)
        assert alpha.min() >= 0.0 and alpha.max() <= 1.0
        for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert side.max() >= 0.3


def test_dataset_gives_back_the_scenes_exactly(digits_dir):
    for split, count in (("train", 96), ("validation", 40)):
        dataset = open_dataset(data_config(digits_dir), split)
        assert len(dataset) == len(dataset.source) == count
        assert dataset.image_ids.tolist() == list(range(count))
        for i in (0, 17, count - 1):
            scene, example = draw_scene(0, split, i), dataset.source[i]
            np.testing.assert_array_equal(images.decode(example.image), scene.image)
            np.testing.assert_array_equal(example.boxes, scene.boxes)
            np.testing.assert_array_equal(example.labels, scene.labels)
            assert example.boxes.dtype == np.float32 and example.labels.dtype == np.int32
            assert dataset.sizes[i].tolist() == list(scene.image.shape[:2])
            with Image.open(io.BytesIO(example.image)) as image:
                assert image.format == "PNG" and image.mode == "RGB"


def test_ground_truth_works_with_pycocotools(digits_dir, capsys):
    from pycocotools.coco import COCO

    dataset = open_dataset(data_config(digits_dir), "validation")
    coco = COCO()
    coco.dataset = dataset.coco_ground_truth()
    coco.createIndex()
    capsys.readouterr()
    assert sorted(coco.getImgIds()) == list(range(40))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [str(d) for d in range(10)]
    assert min(coco.anns) == 1  # 0 would mean "unmatched" to the tools
    for i in range(40):
        scene = draw_scene(0, "validation", i)
        found = coco.loadAnns(coco.getAnnIds(imgIds=[i]))
        boxes = scene.boxes.astype(float)
        boxes[:, 2:] -= boxes[:, :2]
        assert [a["bbox"] for a in found] == boxes.tolist()
        assert [a["category_id"] for a in found] == scene.labels.tolist()
        assert [a["area"] for a in found] == (boxes[:, 2] * boxes[:, 3]).tolist()


def test_another_process_draws_the_same_and_nothing_imports_tensorflow(digits_dir):
    code = (
        "import sys, zlib; from dn_detr_jax.config import base_config;"
        "from dn_detr_jax.data.datasets import open_dataset;"
        "from dn_detr_jax.data.digit_scenes.scenes import draw_scene; c = base_config().data;"
        f"c.name, c.dir = 'digits_tiny', {str(digits_dir)!r};"
        "print(len(open_dataset(c, 'validation').source[3].image) > 0);"
        "print(zlib.crc32(draw_scene(7, 'train', 5).image.tobytes()));"
        "print('tensorflow' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    drawn = zlib.crc32(draw_scene(7, "train", 5).image.tobytes())
    assert run.stdout.split() == ["True", str(drawn), "False"]
    assert "tensorflow" not in sys.modules  # and this process prepared the data set


def test_preparing_prints_one_line_and_opening_none(tmp_path, capfd):
    open_dataset(data_config(tmp_path), "validation")
    first = capfd.readouterr().out
    assert first.count("\n") == 1 and "96 + 40 scenes" in first and str(tmp_path) in first
    open_dataset(data_config(tmp_path), "train")
    assert capfd.readouterr().out == ""


def test_a_killed_preparation_leaves_nothing_half_used(tmp_path):
    code = (
        "from dn_detr_jax.config import base_config;"
        "from dn_detr_jax.data.datasets import open_dataset; c = base_config().data;"
        f"c.name, c.dir = 'digits', {str(tmp_path)!r}; open_dataset(c, 'train')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        started = time.monotonic()
        while not list(tmp_path.glob("digit_scenes/full/incomplete*")):
            assert process.poll() is None and time.monotonic() - started < 60
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    # The same folder, now for the small set, renamed so that it takes the killed one's place.
    parent = tmp_path / "digit_scenes" / "full"
    assert not (parent / "1.0.0").exists()
    parent.rename(tmp_path / "digit_scenes" / "tiny")
    dataset = open_dataset(data_config(tmp_path), "train")
    assert len(dataset) == 96 and len(dataset.source[95].image) > 0
    assert not list(tmp_path.glob("digit_scenes/tiny/incomplete*"))


def test_the_number_of_scenes_is_configurable(tmp_path):
    config = DigitScenesConfig(name="three", train=3, validation=2, seed=5)
    builder = DigitScenes(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_dir=tmp_path)
    assert builder.info.splits["train"].num_examples == 3
    assert builder.info.splits["validation"].num_examples == 2


def test_errors_name_the_value(tmp_path):
    with pytest.raises(ValueError, match=r"'mnist', expected one of: coco, digits, digits_tiny"):
        open_dataset(data_config(tmp_path, "mnist"), "train")
    with pytest.raises(ValueError, match="'test', expected"):
        open_dataset(data_config(tmp_path), "test")
    with pytest.raises(ValueError, match=r"data\.dir is empty"):
        open_dataset(data_config(""), "train")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"data\.dir='.*file/deeper'"):
        open_dataset(data_config(tmp_path / "file" / "deeper"), "train")
