"""The evaluation of a split, with a detector that finds what it is told to."""

import dataclasses
import logging

import numpy as np
import pytest

from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.evaluation.evaluator import Evaluator
from dn_detr_jax.models.registry import num_matching_queries
from dn_detr_jax.sharding import make_mesh


def finds_everything(config):
    """A `detect` whose detections are the objects of the batch."""
    queries = num_matching_queries(config.model)

    def detect(params, batch):
        batch = {name: np.asarray(value) for name, value in batch.items()}
        return {
            "image_id": batch["image_id"],
            "scores": batch["valid"].astype(np.float32),
            "labels": np.where(batch["valid"], batch["labels"], -1),
            "boxes": batch["boxes"],
            "assignment": np.where(
                batch["valid"], np.arange(batch["valid"].shape[1]) % queries, -1
            ).astype(np.int32),
        }

    return detect


class Damaged:
    """A source of which some pictures can't be read."""

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
    assert metrics["AP"] == 1.0 and metrics["instability"] == 0.0


def test_an_unreadable_picture_counts_as_one_without_detections(validation, digits_config, caplog):
    """Against leaving its detections out; its objects must not be left out of the recall."""
    digits_config.data.skip_bad = True
    counts = validation.annotations.counts
    position = int(np.argmax(counts))
    broken = dataclasses.replace(validation, source=Damaged(validation.source, [position]))
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(broken, digits_config, times=2)
    assert "1 pictures can't be read" in caplog.text
    labels = validation.annotations.category_ids
    lost = np.bincount(labels[validation.annotations.rows == position], minlength=10)
    recall = 1 - lost / np.bincount(labels, minlength=10)
    assert metrics["AR100"] == pytest.approx(recall.mean())
    assert metrics["instability"] == 0.0
