"""The shapes in signatures are checked while tests run: in functions, structs and linen modules."""

import jax
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dn_detr_jax import boxes, criterion, denoising, losses, matching
from dn_detr_jax.evaluation import detect, postprocess
from dn_detr_jax.models.attention import attention
from dn_detr_jax.models.heads import SharedHeads


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


MATCHED = (zeros(2, 1, 6, 5), zeros(2, 1, 6, 4), {}, None, None)
TERMS = {"pred_logits": MATCHED[0], "pred_boxes": MATCHED[1], "valid": zeros(1, 3, dtype=bool)}
TARGETS = {"labels": zeros(1, 3, dtype=np.int32), "boxes": zeros(1, 3, 4)}

# What catches a module that `typecheck.py` does not list, or that was imported before it.
WRONG = {
    "corners without a side": lambda: boxes.generalized_iou(zeros(2, 3), zeros(2, 3)),
    "boxes that do not broadcast": lambda: losses.box_losses(zeros(2, 4), zeros(3, 4)),
    "logits of other queries than boxes": lambda: matching.matching_cost(
        zeros(2, 1, 7, 5), MATCHED[1], **TARGETS
    ),
    "objects of another batch": lambda: denoising.limit_objects(
        zeros(2, 3, dtype=bool), zeros(1, 3), 1
    ),
    "an assignment of floats": lambda: losses.set_criterion(
        **TERMS, **TARGETS, assignment=zeros(1, 2, 3)
    ),
    "detections of all layers": lambda: postprocess.select_detections(*MATCHED[:2], 4),
    "images of floats": lambda: detect.detect(
        {}, zeros(1, 8, 8, 3), zeros(1, 2, dtype=np.int32), model=None, config=None
    ),
    "a mask of other keys": lambda: attention(
        zeros(1, 2, 8), zeros(1, 3, 8), zeros(1, 3, 8), zeros(1, 1, 2, dtype=bool), 2
    ),
    "a field of a dataclass": lambda: criterion.MatchedPart(zeros(1, 6, 5), *MATCHED[1:]),
    "states and boxes of other layers": lambda: jax.eval_shape(
        SharedHeads(5, 8).init, jax.random.key(0), zeros(2, 1, 6, 8), zeros(1, 1, 6, 4)
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_an_error_in_tests(call):
    with pytest.raises(TypeCheckError):
        call()
