"""Detections against a full sort."""

import numpy as np
import oracle
import pytest
from fast_jit import fast_jit

from dn_detr_jax.evaluation.postprocess import select_detections

select = fast_jit(select_detections, static_argnums=2)


@pytest.mark.parametrize("num_select", [1, 7, 30])
def test_detections_are_the_best_pairs_of_query_and_class(num_select):
    """Catches pairs taken apart wrongly, boxes of another image, and one class per query only."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 6, 5)).astype(np.float32)
    boxes = oracle.random_boxes(rng, 2, 6)
    got = select(logits, boxes, num_select)
    for image in range(2):
        order = np.argsort(-logits[image].ravel())[:num_select]
        query, label = order // 5, order % 5
        scores = 1 / (1 + np.exp(-logits[image, query, label].astype(np.float64)))
        np.testing.assert_allclose(got["scores"][image], scores, rtol=1e-6)
        np.testing.assert_array_equal(got["labels"][image], label)
        np.testing.assert_array_equal(got["boxes"][image], boxes[image, query])


def test_a_query_can_give_several_detections():
    """Catches an argmax over classes before the selection, which lowers AP."""
    logits = np.full((1, 3, 4), -5, np.float32)
    logits[0, 1] = [2, 1, 3, 0]
    got = select(logits, oracle.random_boxes(np.random.default_rng(0), 1, 3), 4)
    np.testing.assert_array_equal(got["labels"][0], [2, 0, 1, 3])
    assert len(np.unique(got["boxes"][0], axis=0)) == 1
