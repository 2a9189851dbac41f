"""AP against pycocotools itself, run on json files as its own documentation does."""

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr_jax.errors import ConfigError, EvaluationError
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator, coco_classes, format_table

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
CATEGORY_IDS = (7, 3, 90, 12)  # with holes, not sorted


def make_ground_truth(seed=0, num_images=25, crowd=0.0, empty=0.2):
    """Makes images of varied size with objects from tiny to large, some without objects."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in rng.permutation(1000)[:num_images].tolist():
        height, width = rng.integers(120, 400, 2).tolist()
        images.append({"id": image_id, "height": height, "width": width})
        for _ in range(0 if rng.random() < empty else rng.integers(1, 7)):
            w, h = (rng.uniform(0.03, 0.9, 2) * (width, height)).tolist()
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS[:3])),  # the fourth has no object
                    "bbox": [x, y, w, h],
                    "area": w * h * rng.uniform(0.5, 1.0),  # of the mask, as COCO has it
                    "iscrowd": int(rng.random() < crowd),
                }
            )
    categories = [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}


def predictions(ground_truth, kind, seed=1, K=30):
    """Returns arrays for `add`, float32 as from a network; empty slots have label -1."""
    rng = np.random.default_rng(seed)
    images = ground_truth["images"]
    B = len(images)
    scores = rng.random((B, K)).astype(np.float32)
    labels = np.full((B, K), -1, np.int32)
    boxes = np.full((B, K, 4), 0.5, np.float32)
    if kind == "random":
        labels = rng.integers(0, 4, (B, K)).astype(np.int32)
        boxes = rng.uniform(0.05, 0.95, (B, K, 4)).astype(np.float32)
        scores = np.round(scores, 1)  # many ties
    if kind == "empty":
        return scores, labels, boxes
    for b, image in enumerate(images):
        size = np.array([image["width"], image["height"]])
        mine = [a for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        for k, annotation in enumerate(mine):
            x, y, w, h = annotation["bbox"]
            if kind == "shifted":
                x, y = x + 0.13 * w, y - 0.07 * h
            elif kind == "random":
                x, y, w, h = np.array([x, y, w, h]) * rng.uniform(0.8, 1.2, 4)
            labels[b, k] = CATEGORY_IDS.index(annotation["category_id"])
            boxes[b, k] = [*((x + w / 2, y + h / 2) / size), *((w, h) / size)]
    return scores, labels, boxes


def reference(tmp_path, ground_truth, scores, labels, boxes):
    """Returns the twelve numbers and AP per category id of pycocotools on files."""
    results = []
    for b, image in enumerate(ground_truth["images"]):
        for score, label, box in zip(scores[b], labels[b], boxes[b].astype(float), strict=True):
            if label >= 0:
                cx, cy, w, h = box * np.tile([image["width"], image["height"]], 2)
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": CATEGORY_IDS[label],
                        "bbox": [cx - w / 2, cy - h / 2, w, h],
                        "score": float(score),
                    }
                )
    (tmp_path / "annotations.json").write_text(json.dumps(ground_truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "annotations.json"))
        if results:
            found = truth.loadRes(str(tmp_path / "results.json"))
        else:  # loadRes refuses an empty file
            found = COCO()
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, k, 0, 2]
        precision = precision[precision > -1]
        per_class[category_id] = precision.mean() if precision.size else -1.0
    return evaluation.stats, per_class


def evaluate(ground_truth, scores, labels, boxes, batch=4, order=None):
    """Returns the result of `add` in batches, the last one padded."""
    evaluator = CocoEvaluator(ground_truth)
    image_ids = np.array([image["id"] for image in ground_truth["images"]])
    order = np.arange(len(image_ids)) if order is None else order
    for start in range(0, len(order), batch):
        at = order[start : start + batch]
        pad = np.resize(at, batch)  # repeats real images, so that counted padding is noticed
        ids = np.where(np.arange(batch) < len(at), image_ids[pad], -1)
        evaluator.add(ids.astype(np.int32), scores[pad], labels[pad], boxes[pad])
    return evaluator


@pytest.mark.parametrize("crowd", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["perfect", "shifted", "empty", "random"])
def test_equals_pycocotools_to_the_last_digit(tmp_path, kind, crowd):
    ground_truth = make_ground_truth(crowd=crowd)
    arrays = predictions(ground_truth, kind)
    stats, per_class = reference(tmp_path, ground_truth, *arrays)
    evaluator = evaluate(ground_truth, *arrays)
    metrics = evaluator.metrics()
    assert list(metrics) == KEYS
    assert [-1.0 if math.isnan(v) else v for v in metrics.values()] == stats.tolist()
    got = evaluator.per_class()
    assert list(got) == [f"class {i}" for i in CATEGORY_IDS]
    assert {
        i: -1.0 if math.isnan(v) else v for i, v in zip(CATEGORY_IDS, got.values(), strict=True)
    } == per_class
    if kind == "perfect" and not crowd:
        assert metrics["AP"] == pytest.approx(1.0)
    if kind == "random":
        assert 0.02 < metrics["AP"] < 0.98  # a trivial value would compare nothing


@pytest.mark.parametrize("crowd", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["perfect", "shifted", "random", "empty"])
def test_the_faster_backend_equals_pycocotools(kind, crowd):
    """Covers crowd regions, images and classes without objects, and no detections."""
    pytest.importorskip("faster_coco_eval")
    ground_truth = make_ground_truth(crowd=crowd)
    ids = np.array([image["id"] for image in ground_truth["images"]])
    found = {}
    for backend in ("pycocotools", "faster-coco-eval"):
        evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS, backend)
        evaluator.add(ids, *predictions(ground_truth, kind))
        found[backend] = evaluator.metrics() | evaluator.per_class()
    expected = pytest.approx(found["pycocotools"], abs=1e-12, rel=0, nan_ok=True)
    assert found["faster-coco-eval"] == expected


def test_a_backend_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"eval\.backend = 'faster.*pip install faster-coco-eval"):
        coco_classes("faster-coco-eval")


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_on_ties_and_more_detections_than_count(tmp_path, seed):
    """Covers overlapping objects, crowds, equal scores, and over 100 boxes of a class."""
    rng = np.random.default_rng(seed)
    ground_truth = make_ground_truth(seed, num_images=6, crowd=0.3)
    annotations = ground_truth["annotations"]
    for annotation in list(annotations):
        other = {"id": len(annotations) + 1, "iscrowd": int(rng.random() < 0.3)}
        annotations.append(
            {**annotation, **other, "area": annotation["area"] * rng.uniform(0.1, 4)}
        )
    found, noise = (predictions(ground_truth, kind, K=600) for kind in ("perfect", "random"))
    scores, labels, boxes = (
        np.concatenate([*pair, pair[0]], 1) for pair in zip(found, noise, strict=True)
    )
    scores = rng.integers(0, 20, scores.shape).astype(np.float32) / 20
    stats, _ = reference(tmp_path, ground_truth, scores, labels, boxes)
    metrics = evaluate(ground_truth, scores, labels, boxes).metrics()
    assert [-1.0 if math.isnan(v) else v for v in metrics.values()] == stats.tolist()
    assert np.bincount(labels[0][labels[0] >= 0]).min() > 100


def test_an_overlap_equal_to_the_threshold_counts(tmp_path):
    """Catches a strict threshold: the IoU is exactly 0.5, in exact floats."""
    ground_truth = {
        "images": [{"id": 1, "height": 64, "width": 64}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 7,
                "bbox": [8, 16, 16, 32],
                "area": 512,
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS],
    }
    half = np.array([[[12 / 64, 32 / 64, 8 / 64, 32 / 64]]], np.float32)
    arrays = np.array([[0.9]], np.float32), np.array([[0]]), half
    metrics = evaluate(ground_truth, *arrays, batch=1).metrics()
    stats, _ = reference(tmp_path, ground_truth, *arrays)
    assert metrics["AP50"] == stats[1] == pytest.approx(1.0)
    assert metrics["AP"] == stats[0] == pytest.approx(0.1)


def test_no_object_anywhere_is_nan_not_a_number():
    ground_truth = {**make_ground_truth(), "annotations": []}
    evaluator = evaluate(ground_truth, *predictions(make_ground_truth(), "random"))
    assert all(math.isnan(value) for value in evaluator.metrics().values())
    assert all(math.isnan(value) for value in evaluator.per_class().values())


def test_order_of_images_and_repeated_images_change_nothing():
    ground_truth = make_ground_truth()
    arrays = predictions(ground_truth, "random")
    straight = evaluate(ground_truth, *arrays).metrics()
    order = np.random.default_rng(5).permutation(len(ground_truth["images"]))
    again = evaluate(ground_truth, *arrays, batch=7, order=np.concatenate([order, order[:9]]))
    np.testing.assert_equal(again.metrics(), straight)


def test_label_that_is_no_category_is_dropped():
    """Covers class ids as labels, as in the official checkpoints; label 0 of 91 is no category."""
    ground_truth = make_ground_truth()
    scores, labels, boxes = predictions(ground_truth, "shifted")
    expected = evaluate(ground_truth, scores, labels, boxes).metrics()
    as_ids = np.where(labels >= 0, np.asarray(CATEGORY_IDS)[labels], 0)
    evaluator = CocoEvaluator(ground_truth, label_to_category=range(91))
    image_ids = [image["id"] for image in ground_truth["images"]]
    evaluator.add(np.array(image_ids), scores, as_ids, boxes)
    np.testing.assert_equal(evaluator.metrics(), expected)


def test_an_annotation_with_id_zero_counts(tmp_path):
    """Catches annotation id 0 counted as no match, as in pycocotools; data may start at 0."""
    ground_truth = make_ground_truth(num_images=3, empty=0.0)
    arrays = predictions(ground_truth, "perfect")
    for annotation in ground_truth["annotations"]:
        annotation["id"] -= 1
        del annotation["iscrowd"], annotation["area"]
    before = json.dumps(ground_truth)
    assert evaluate(ground_truth, *arrays).metrics()["AP"] == pytest.approx(1.0)
    assert json.dumps(ground_truth) == before
    stats, _ = reference(tmp_path, make_ground_truth(num_images=3, empty=0.0), *arrays)
    assert evaluate(ground_truth, *arrays).metrics()["AR100"] == stats[8]


def test_missing_counts_images_without_detections():
    ground_truth = make_ground_truth()
    arrays = predictions(ground_truth, "empty")
    assert CocoEvaluator(ground_truth).missing() == 25
    assert evaluate(ground_truth, *arrays, order=np.arange(7)).missing() == 18
    assert evaluate(ground_truth, *arrays).missing() == 0


def test_detections_added_after_metrics_count():
    ground_truth = make_ground_truth()
    scores, labels, boxes = predictions(ground_truth, "perfect")
    evaluator = evaluate(ground_truth, scores, labels, boxes, order=np.arange(12))
    half = evaluator.metrics()["AP"]
    rest = [image["id"] for image in ground_truth["images"][12:]]
    evaluator.add(np.array(rest), scores[12:], labels[12:], boxes[12:])
    assert half < 0.9 < evaluator.metrics()["AP"]


def test_errors_name_what_is_wrong():
    ground_truth = make_ground_truth()
    scores, labels, boxes = (a[:1] for a in predictions(ground_truth, "perfect"))
    evaluator = CocoEvaluator(ground_truth)
    known = np.array([ground_truth["images"][0]["id"]])
    with pytest.raises(ValueError, match="image 123456 is not among the 25 images"):
        evaluator.add(np.array([123456]), scores, labels, boxes)
    with pytest.raises(ValueError, match=r"\(1, 30, 3\)"):
        evaluator.add(known, scores, labels, boxes[..., :3])
    with pytest.raises(EvaluationError, match=f"image {known[0]} is not finite"):
        evaluator.add(known, scores, np.zeros_like(labels), boxes * np.nan)
    with pytest.raises(ValueError, match="has no categories"):
        CocoEvaluator({"images": [], "annotations": []})
    with pytest.raises(ValueError, match=f"image {known[0]} comes twice"):
        CocoEvaluator({**ground_truth, "images": ground_truth["images"][:1] * 2})


def test_nothing_is_printed(capsys):
    evaluate(make_ground_truth(), *predictions(make_ground_truth(), "random")).metrics()
    assert capsys.readouterr() == ("", "")


def test_table_is_aligned_and_complete():
    metrics = dict.fromkeys(KEYS, 0.25) | {"AP": 0.4126, "APl": math.nan}
    metrics |= {"threshold": 0.5, "precision": 0.75, "recall": 0.6, "F1": 2 / 3}
    names = [*(f"kind {'x' * (i % 5)}{i}" for i in range(11)), "rare"]
    ap = {name: i / 20 for i, name in enumerate(names)} | {"rare": math.nan}
    lines = format_table(metrics, {"AP": ap, "precision": ap}).split("\n")
    assert "AP    @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.413" in lines[0]
    assert lines[5].endswith("=   -  ")
    assert len({len(line) for line in lines[:12]}) == 1
    assert lines[13].endswith("scores from 0.500: precision 0.750, recall 0.600, F1 0.667")
    header, *rows = lines[15:]
    assert header.split() == ["class", "AP", "precision"] and len(rows) == 12
    assert len({len(line.rstrip()) for line in (header, *rows[:-1])}) == 1
    assert [row.rsplit(maxsplit=2)[0] for row in rows] == names
    assert rows[3].split()[-2:] == ["0.150", "0.150"] and rows[-1].split()[-2:] == ["-", "-"]
    assert format_table(metrics).count("\n") == 11
    empty = metrics | dict.fromkeys(("threshold", "precision"), math.nan)
    assert "no detection finds an object" in format_table(empty, {"AP": ap})
    same_name = make_ground_truth()
    for category in same_name["categories"][:2]:
        category["name"] = "thing"
    names = list(CocoEvaluator(same_name).per_class())
    assert names == ["thing (7)", "thing (3)", "class 90", "class 12"]
