"""Early stopping: when it ends a training, and that it counts on after a restart."""

import json
import math

import pytest

from dn_detr_jax.training.patience import Patience


@pytest.mark.parametrize(
    ("stop_after", "history", "ends_at"),
    [
        (0, [0.3] * 9, None),
        (2, [0.1, 0.2, 0.2, 0.3, 0.2, 0.3, 0.9], 6),
        (1, [0.1, 0.2, 0.1], 3),
        (2, [math.nan, math.nan, 0.5], 2),
        (2, [math.nan, 0.0, 0.0, 0.0], 4),
        (3, [0.5, math.nan, 0.4, 0.5], 4),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_higher_ap(stop_after, history, ends_at):
    """Catches ties that count as improvements, and a count that a restart begins anew."""
    straight, restarted = Patience(stop_after), Patience(stop_after)
    for number, ap in enumerate(history, start=1):
        straight.update(ap)
        restarted = Patience(stop_after, json.loads(json.dumps(restarted.state_dict())))
        restarted.update(ap)
        assert straight.is_over == restarted.is_over == (number == ends_at)
        if straight.is_over:
            return
    assert ends_at is None


def test_a_larger_number_continues():
    patience = Patience(2)
    for ap in 0.5, 0.4, 0.4:
        patience.update(ap)
    assert patience.is_over and str(patience) == "2 evaluations without an AP above 0.500"
    assert not Patience(3, patience.state_dict()).is_over
    assert not Patience(0, patience.state_dict()).is_over
    assert not Patience(2, None).is_over
