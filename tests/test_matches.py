"""Precision, recall, F1 and the confusion matrix against COCOeval and direct counts."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_ap import CATEGORY_IDS, evaluate, make_ground_truth, predictions

from dn_detr_jax.evaluation.coco_ap import CocoEvaluator
from dn_detr_jax.evaluation.operating_points import (
    CLASS_FIGURES,
    Curve,
    class_figures,
    operating_point,
)

C = len(CATEGORY_IDS)


def random_case(seed, crowd=0.2, num_images=25):
    """A split and detections, right, wrong and of wrong classes, with all scores different."""
    ground_truth = make_ground_truth(seed, crowd=crowd, num_images=num_images)
    scores, labels, boxes = predictions(ground_truth, "random", seed + 1)
    rng = np.random.default_rng(seed)
    scores = rng.permutation(np.linspace(0.01, 0.99, scores.size)).reshape(scores.shape)
    mistaken = rng.random(labels.shape) < 0.25
    labels = np.where(mistaken, rng.integers(0, C, labels.shape), labels)
    return ground_truth, scores.astype(np.float32), labels, boxes


def coco_eval(evaluator):
    """A COCOeval of its own over the same annotations and detections."""
    every = (d for of_image in evaluator._detections.values() for d in of_image)
    sides = evaluator._ground_truth, [{**d, "id": n} for n, d in enumerate(every, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = []
        for annotations in sides:
            coco.append(COCO())
            coco[-1].dataset = {**evaluator._header, "annotations": annotations}
            coco[-1].createIndex()
        result = COCOeval(*coco, "bbox")
        result.evaluate()
        result.accumulate()
    return result


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_are_those_of_cocoeval(seed):
    """Catches another matching, crowds that count as wrong, and objects that count twice.

    COCOeval keeps the precision at 101 recalls, each the best at that recall or a higher one.
    """
    evaluator = evaluate(*random_case(seed))
    matches, result = evaluator.matches(), coco_eval(evaluator)
    for label in range(C):
        position = result.params.catIds.index(CATEGORY_IDS[label])
        precision = result.eval["precision"][0, :, position, 0, -1]
        curve = Curve.of(matches, label)
        if curve.objects == 0:
            assert (precision == -1).all() and math.isnan(curve.at(0.5)["recall"])
            continue
        best = np.maximum.accumulate(curve.precision[::-1])[::-1]
        at = np.searchsorted(curve.recall, result.params.recThrs)
        reached = at < len(best)
        np.testing.assert_allclose(best[at[reached]], precision[reached], rtol=1e-12)
        assert (precision[~reached] == 0).all() and 5 < reached.sum() < 101
        scores = result.eval["scores"][0, reached, position, 0, -1]
        # At a recall of 0 COCOeval has the first detection, which may be an ignored one.
        np.testing.assert_array_equal(curve.thresholds[at[reached]][1:], scores[1:])
        assert curve.recall[-1] == result.eval["recall"][0, position, 0, -1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("crowd", [0.0, 0.3])
def test_counts_are_those_of_cocoeval_for_equal_scores_too(seed, crowd):
    """Counts from the matches that COCOeval keeps of each image, with many ties."""
    ground_truth = make_ground_truth(seed, crowd=crowd)
    evaluator = evaluate(ground_truth, *predictions(ground_truth, "random", seed))
    matches, result = evaluator.matches(), coco_eval(evaluator)
    areas, images = len(result.params.areaRng), len(result.params.imgIds)
    for label in range(C):
        first = result.params.catIds.index(CATEGORY_IDS[label]) * areas * images
        found = [image for image in result.evalImgs[first : first + images] if image]
        scores = np.concatenate([image["dtScores"] for image in found])
        right = np.concatenate([image["dtMatches"][0] > 0 for image in found])
        ignored = np.concatenate([image["dtIgnore"][0] > 0 for image in found])
        curve = Curve.of(matches, label)
        for number, threshold in enumerate(curve.thresholds):
            counted = (scores >= threshold) & ~ignored
            assert curve.right[number] == (counted & right).sum()
            assert curve.wrong[number] == (counted & ~right).sum()
        assert curve.objects == sum((image["gtIgnore"] == 0).sum() for image in found)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_beats_every_other(seed):
    """Counts F1 directly for every score that a detection has."""
    matches = evaluate(*random_case(seed)).matches()
    point = operating_point(matches)
    counted, objects = ~matches.ignored, matches.counts.sum()

    def f1(threshold):
        shown = counted & (matches.scores >= threshold)
        return 2 * (shown & matches.correct).sum() / (shown.sum() + objects)

    every = {threshold: f1(threshold) for threshold in matches.scores}
    assert every[point["threshold"]] == max(every.values()) == pytest.approx(point["F1"])
    precision, recall = point["precision"], point["recall"]
    assert point["F1"] == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
def test_totals_of_the_confusion_matrix_are_objects_and_detections(seed, threshold):
    """Catches objects and detections that are counted twice, or lost, or crowds that count."""
    matches = evaluate(*random_case(seed, crowd=0.3)).matches()
    confusion = matches.confusion(threshold)
    assert confusion.shape == (C + 1, C + 1) and confusion[-1, -1] == 0
    np.testing.assert_array_equal(confusion[:-1].sum(axis=1), matches.counts)
    shown = (matches.scores >= threshold) & ~matches.ignored
    detections = np.bincount(matches.labels[shown], minlength=C)
    np.testing.assert_array_equal(confusion[:, :-1].sum(axis=0), detections)
    # The diagonal is what precision and recall count.
    figures = dict(zip(CLASS_FIGURES, class_figures(matches, threshold, [0.0] * C).T, strict=True))
    diagonal = np.diagonal(confusion)[:-1]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(figures["recall"], diagonal / matches.counts)
        np.testing.assert_allclose(figures["precision"], diagonal / detections)
    assert threshold > 0.5 or confusion[:-1, :-1].sum() > diagonal.sum()


def test_a_confusion_by_hand():
    """One image, five objects: right, of another class, doubled, missed, beside the object."""
    boxes = [[10, 10, 20, 20], [50, 10, 20, 20], [10, 50, 20, 20], [50, 50, 20, 20]]
    labels = [0, 1, 2, 3]
    ground_truth = {
        "images": [{"id": 5, "height": 100, "width": 100}],
        "annotations": [
            {"image_id": 5, "category_id": CATEGORY_IDS[label], "bbox": box}
            for label, box in zip(labels, boxes, strict=True)
        ],
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
    }
    found = [  # label, score, box; class 1 is seen as 0, class 2 twice, class 3 beside its box
        (0, 0.9, boxes[0]),
        (0, 0.8, boxes[1]),
        (2, 0.7, boxes[2]),
        (2, 0.6, boxes[2]),
        (3, 0.5, [70, 70, 20, 20]),
        (3, 0.1, boxes[3]),
    ]
    evaluator = CocoEvaluator(ground_truth)
    corners = np.array([box for *_, box in found]) / 100
    centers = np.concatenate([corners[:, :2] + corners[:, 2:] / 2, corners[:, 2:]], axis=1)
    evaluator.add(
        np.array([5]),
        np.array([[score for _, score, _ in found]]),
        np.array([[label for label, *_ in found]]),
        centers[None],
    )
    matches = evaluator.matches()
    expected = np.zeros((5, 5), int)
    expected[0, 0] = expected[1, 0] = expected[2, 2] = 1
    expected[3, 4] = 1  # missed
    expected[4, 2] = expected[4, 3] = 1  # of nothing
    np.testing.assert_array_equal(matches.confusion(0.3), expected)
    lower = matches.confusion(0.0)
    assert lower[3, 3] == 1 and lower[3, 4] == 0
    assert evaluator.recall_per_class() == {"7": 1.0, "3": 0.0, "90": 1.0, "12": 1.0}


def test_nothing_found_and_nothing_to_find():
    """Catches a division by zero in an early evaluation, and in a split without objects."""
    ground_truth = make_ground_truth()
    arrays = predictions(ground_truth, "empty")
    point = operating_point(evaluate(ground_truth, *arrays).matches())
    assert math.isnan(point["threshold"]) and math.isnan(point["precision"])
    assert point["recall"] == point["F1"] == 0.0
    matches = evaluate(ground_truth, *arrays).matches()
    confusion = matches.confusion(point["threshold"])
    np.testing.assert_array_equal(confusion[:-1, -1], matches.counts)
    assert confusion.sum() == matches.counts.sum() > 0
    ground_truth["annotations"] = []
    nothing = evaluate(ground_truth, *predictions(make_ground_truth(), "shifted"))
    assert all(math.isnan(operating_point(nothing.matches())[n]) for n in ("threshold", "F1"))
    assert all(math.isnan(value) for value in nothing.recall_per_class().values())
