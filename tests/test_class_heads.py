"""Class heads for other classes or another order."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from dn_detr_jax.interop.class_heads import objectness_head, reorder_heads, reset_heads

HEADS = ("class_head_5", "class_head_6")  # of the last decoder layer and of the proposals


def heads(classes, seed):
    rng = np.random.default_rng(seed)
    biases = {f"{head}/bias": rng.normal(size=classes) for head in HEADS}
    return biases | {f"{head}/kernel": rng.normal(size=(4, classes)) for head in HEADS}


@pytest.mark.parametrize("classes", [(5, 5), (5, 3), (3, 5)])
@pytest.mark.parametrize("score", ["class", "objectness"])
def test_objectness_is_no_class(classes, score):
    """Catches logit 0 of the proposals, any object, that is reset or moved like that of a class."""
    theirs, ours = classes
    trained, fresh = heads(theirs, 0), heads(ours, 1)
    head = objectness_head(ConfigDict({"decoder_layers": 6, "proposal_score": score}))
    order = [(label + 1) % theirs if label < theirs else None for label in range(ours)]
    reset = reset_heads(trained, fresh, classes, head)
    moved = reorder_heads(trained, fresh, classes, order, head)
    for name in ("bias", "kernel"):
        for result, usual in ((reset, fresh), (moved, trained)):
            row = 1 if result is moved else 0
            layer, proposals = (f"{head}/{name}" for head in HEADS)
            np.testing.assert_array_equal(result[layer][..., 0], usual[layer][..., row])
            usual, row = (trained, 0) if score == "objectness" else (usual, row)
            np.testing.assert_array_equal(result[proposals][..., 0], usual[proposals][..., row])


def test_models_without_proposals_have_no_objectness():
    assert objectness_head(ConfigDict({"decoder_layers": 6})) is None
