"""Text files in YOLO's form against supervision's loader, and objects as images."""

import numpy as np
import pytest
from PIL import Image
from test_detections import some

from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.inference.other_outputs import OtherOutputs


def test_text_files_are_in_the_form_of_yolo(tmp_path):
    """Catches numbers of labels in place of classes, and corners in place of centers."""
    categories = [Category(10, "bed"), Category(20, ""), Category(30, ""), Category(40, "cat")]
    others = OtherOutputs(tmp_path, categories, txt=True, crops=False)
    others.write("a", np.zeros((48, 64, 3), np.uint8), some())
    assert not (tmp_path / "crops").exists()
    lines = (tmp_path / "labels" / "a.txt").read_text().splitlines()
    rows = np.array([[float(value) for value in line.split()] for line in lines])
    np.testing.assert_array_equal(rows[:, 0], [1, 0])
    np.testing.assert_allclose(rows[:, 5], [0.9, 0.1], atol=1e-6)
    center, size = rows[:, 1:3] * [64, 48], rows[:, 3:5] * [64, 48]
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    np.testing.assert_allclose(boxes, some().boxes, atol=1e-3)

    supervision = pytest.importorskip("supervision")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.jpg")
    for file in (tmp_path / "labels").iterdir():  # the loader takes a sixth number for an outline
        file.write_text("\n".join(" ".join(line.split()[:5]) for line in lines))
    folders = [str(tmp_path / name) for name in ("images", "labels", "data.yaml")]
    data = supervision.DetectionDataset.from_yolo(*folders)
    (read,) = data.annotations.values()
    np.testing.assert_allclose(read.xyxy, some().boxes, atol=1e-3)
    assert [data.classes[i] for i in read.class_id] == ["cat", "bed"]


def test_objects_as_images(tmp_path):
    """Catches another order of axes, and a class name that leaves the folder."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    OtherOutputs(tmp_path, [], txt=False, crops=True).write("a", pixels, some())
    with Image.open(tmp_path / "crops" / "cat" / "a_0.jpg") as crop:
        assert crop.size == (29, 38)
    with Image.open(tmp_path / "crops" / "bed" / "a_1.jpg") as crop:
        assert crop.size == (3, 3)
