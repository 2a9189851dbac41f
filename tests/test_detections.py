"""Detections in the forms of other libraries, against those libraries."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import dn_detr_jax
from dn_detr_jax.errors import MissingPackageError
from dn_detr_jax.inference.detections import Detections

_ROOT = Path(__file__).parent.parent


def some(count=2):
    boxes = np.array([[1.5, 2, 30, 40], [5, 6, 7.25, 9]], np.float32)[:count]
    scores = np.array([0.9, 0.1], np.float32)[:count]
    labels, ids = np.array([3, 0], np.int32)[:count], np.array([40, 10])[:count]
    return Detections(boxes, scores, labels, ids, ("cat", "bed")[:count], (48, 64))


@pytest.mark.parametrize("count", [2, 0])
def test_coco_results_are_what_pycocotools_reads(count):
    """Catches corners in place of width and height, and digits that are lost."""
    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "categories": [{"id": 40}, {"id": 10}]}
    truth.dataset["annotations"] = [{"id": 1, "image_id": 7, "category_id": 10, "bbox": [0] * 4}]
    truth.createIndex()
    found = some(count)
    lines = found.to_coco(7)
    if lines:  # loadRes does not take an empty list
        lines = list(truth.loadRes(lines).anns.values())
    bboxes = np.array([line["bbox"] for line in lines], np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(bboxes[:, :2], found.boxes[:, :2])
    np.testing.assert_array_equal(bboxes[:, :2] + bboxes[:, 2:], found.boxes[:, 2:])
    assert [line["category_id"] for line in lines] == [40, 10][:count]
    np.testing.assert_array_equal([np.float32(line["score"]) for line in lines], found.scores)


@pytest.mark.parametrize("count", [2, 0])
def test_supervision_has_all_of_them(count):
    """Catches boxes in another format, and data that supervision can't index."""
    supervision = pytest.importorskip("supervision")
    found = some(count)
    given = found.to_supervision()
    assert isinstance(given, supervision.Detections) and len(given) == count
    np.testing.assert_array_equal(given.xyxy, found.boxes)
    np.testing.assert_array_equal(given.confidence, found.scores)
    assert given.class_id.tolist() == [3, 0][:count]
    certain = given[given.confidence > 0.5]
    assert certain["class_name"].tolist() == ["cat"][:count]
    assert certain["category_id"].tolist() == [40][:count]
    merged = supervision.Detections.merge([given, some().to_supervision()])
    assert len(merged) == count + 2


@pytest.mark.parametrize("count", [2, 0])
def test_pandas_has_a_row_for_each(count):
    """Catches columns in another order than their names."""
    pytest.importorskip("pandas")
    table = some(count).to_pandas()
    expected = {"xmin": [1.5, 5], "ymin": [2, 6], "xmax": [30, 7.25], "ymax": [40, 9]}
    expected |= {"label": [3, 0], "category_id": [40, 10], "class_name": ["cat", "bed"]}
    for name, values in expected.items():
        assert table.pop(name).tolist() == values[:count]
    np.testing.assert_array_equal(table.pop("score"), some(count).scores)
    assert table.columns.empty


@pytest.mark.parametrize("package", ["supervision", "pandas"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"to_{package} needs .*: pip install {package}"):
        getattr(some(), f"to_{package}")()


def test_the_tracking_of_the_documents_runs(predictor, tmp_path, monkeypatch):
    """Runs the example of docs/prediction.md on a still video, where every track keeps its box."""
    supervision = pytest.importorskip("supervision")
    pytest.importorskip("trackers")
    text = (_ROOT / "docs" / "prediction.md").read_text(encoding="utf-8")
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", text[text.index("### Tracking") :], re.M | re.S
    )[:1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dn_detr_jax, "load", lambda workdir: predictor, raising=False)
    writer = cv2.VideoWriter("street.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, (128, 96))
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    for _ in range(4):
        writer.write(image)
    writer.release()
    names: dict = {}
    exec(compile(example, "docs/prediction.md", "exec"), names)
    tracked = names["tracked"]
    assert len(tracked) and len(set(tracked.tracker_id)) == len(tracked)
    assert supervision.VideoInfo.from_video_path("tracked.mp4").total_frames == 4
