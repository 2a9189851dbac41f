"""The evaluation of a split, with a detector whose detections are given."""

import dataclasses
import logging

import numpy as np
import pytest

from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.errors import CheckpointError
from dn_detr_jax.evaluation.evaluator import Evaluator
from dn_detr_jax.evaluation.labels import with_labels_of_run
from dn_detr_jax.models.registry import num_matching_queries
from dn_detr_jax.sharding import make_mesh

LAYERS = 3  # a variant need not have a key for their number


def finds_everything(config):
    """A `detect` whose detections are the objects of the batch."""
    queries = num_matching_queries(config.model)

    def detect(params, batch):
        batch = {name: np.asarray(value) for name, value in batch.items()}
        slots = np.arange(batch["valid"].shape[1]) % queries
        found = np.where(batch["valid"], slots, -1).astype(np.int32)
        return {
            "image_id": batch["image_id"],
            "scores": batch["valid"].astype(np.float32),
            "labels": np.where(batch["valid"], batch["labels"], -1),
            "boxes": batch["boxes"],
            "assignment": np.stack([found] * LAYERS, axis=1),
        }

    return detect


class Damaged:
    """A source with some unreadable images."""

    def __init__(self, source, positions):
        self.source, self.positions = source, positions

    def __getitem__(self, index):
        example = self.source[index]
        bad = index in self.positions
        return dataclasses.replace(example, image=b"damaged") if bad else example


@pytest.fixture
def validation(digits_config):
    return open_dataset(digits_config.data, "validation")


def evaluate(dataset, config, times=1):
    evaluator = Evaluator(dataset, config, finds_everything(config), make_mesh(1))
    return [evaluator({}) for _ in range(times)][-1].metrics


def test_finding_everything_is_an_ap_of_one(validation, digits_config):
    metrics = evaluate(validation, digits_config, times=2)
    assert metrics["AP"] == 1.0
    names = ["instability", "instability_layer_1", "instability_layer_2"]
    assert {k: v for k, v in metrics.items() if k.startswith("inst")} == dict.fromkeys(names, 0.0)


def test_labels_of_a_run_are_matched_by_name(validation, digits_config):
    """Catches swapped classes if a run numbers them differently from the data.

    The detections have the labels of the run, not of the data; category ids have gaps.
    """
    order = np.random.default_rng(0).permutation(10)
    run = [Category(7 * i + 1, validation.categories[label].name) for i, label in enumerate(order)]
    relabeled = with_labels_of_run(validation, run, "the run")
    assert [c.name for c in relabeled.categories] == [c.name for c in run]
    for position in range(len(validation)):
        labels = relabeled.source[position].labels
        np.testing.assert_array_equal(order[labels], validation.source[position].labels)
    evaluator = Evaluator(relabeled, digits_config, finds_everything(digits_config), make_mesh(1))
    evaluation = evaluator({})
    assert evaluation.metrics["AP"] == 1.0
    assert set(evaluation.per_class) == {category.name for category in run}
    names = [category["name"] for category in relabeled.coco_ground_truth()["categories"]]
    assert list(evaluation.class_figures) == ["AR", "precision", "recall", "F1", "threshold"]
    for figure, by_class in evaluation.class_figures.items():
        assert list(by_class) == names and set(by_class.values()) == {1.0}, figure
    np.testing.assert_array_equal(np.diagonal(evaluation.confusion)[:-1], evaluation.matches.counts)
    assert evaluation.confusion.sum() == len(validation.annotations.category_ids)
    assert evaluation.table().splitlines()[-1].split()[1:] == ["1.000"] * 6
    assert with_labels_of_run(validation, validation.categories, "the run") is validation


def test_other_classes_than_the_run_are_named(validation):
    run = [*validation.categories[:-1], Category(9, "ten")]
    with pytest.raises(CheckpointError, match=r"only in the run: 'ten'; only in .*: '9'"):
        with_labels_of_run(validation, run, "the run")


def test_an_unreadable_image_counts_as_one_without_detections(validation, digits_config, caplog):
    """Compares with omitted detections; the recall must count the objects of the image."""
    digits_config.data.skip_bad = True
    counts = validation.annotations.counts
    position = int(np.argmax(counts))
    broken = dataclasses.replace(validation, source=Damaged(validation.source, [position]))
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(broken, digits_config, times=2)
    assert "1 images can't be read" in caplog.text
    labels = validation.annotations.category_ids
    lost = np.bincount(labels[validation.annotations.rows == position], minlength=10)
    recall = 1 - lost / np.bincount(labels, minlength=10)
    assert metrics["AR100"] == pytest.approx(recall.mean())
    assert metrics["instability"] == 0.0
