"""Costs against a plain loop and assignments against SciPy, for all sizes and values."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from fast_jit import fast_jit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from dn_detr_jax import matching
from dn_detr_jax.losses import SigmoidFocalLoss
from dn_detr_jax.sharding import make_mesh

sanitize = fast_jit(matching.sanitize)
assign = fast_jit(matching.assign)


def check_assignment(cost, valid, assignment):
    """Checks for each image and layer a one-to-one map with SciPy's total cost."""
    cost, assignment = np.asarray(cost, np.float64), np.asarray(assignment)
    batch, layers, queries, objects = cost.shape
    assert assignment.shape == (batch, layers, objects) and assignment.dtype == np.int32
    for image, layer in np.ndindex(batch, layers):
        real = np.flatnonzero(valid[image])
        problem = cost[image, layer][:, real]
        rows, columns = linear_sum_assignment(problem)
        got = assignment[image, layer]
        assert (got[~valid[image]] == -1).all()
        matched = [m for m in real if got[m] >= 0]
        assert len(matched) == min(len(real), queries)
        assert len({got[m] for m in matched}) == len(matched)
        total = sum(cost[image, layer, got[m], m] for m in matched)
        # Ties may be broken either way; the total may not differ.
        assert total == pytest.approx(problem[rows, columns].sum(), rel=1e-9, abs=1e-9)


def problems(values, max_queries=7, max_objects=9):
    """Draws costs [B, L, N, M] with random validity, also with more objects than queries."""
    sizes = st.tuples(
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, max_queries),
        st.integers(1, max_objects),
    )
    return sizes.flatmap(
        lambda s: st.tuples(
            hnp.arrays(np.float32, s, elements=values), hnp.arrays(bool, (s[0], s[3]))
        )
    )


@given(problems(st.floats(-1e4, 1e4, width=32)))
def test_solution_is_scipys(problem):
    """Catches swapped axes, columns of padding that take queries, and mixed-up images."""
    check_assignment(*problem, matching.solve_on_host(*problem))


@given(problems(st.sampled_from([0.0, 1.0, 2.0])))
def test_solution_is_optimal_with_ties(problem):
    check_assignment(*problem, matching.solve_on_host(*problem))


@given(problems(st.floats(-10, 10, width=32), max_queries=4, max_objects=3))
def test_solution_is_the_best_of_all_permutations(problem):
    """Checks SciPy's own answer once by brute force."""
    cost, valid = problem
    got = matching.solve_on_host(cost, valid)
    for image, layer in np.ndindex(cost.shape[:2]):
        real = np.flatnonzero(valid[image])
        table = cost[image, layer].astype(np.float64)[:, real]
        long, short = (table, table.T) if len(table) >= len(real) else (table.T, table)
        best = min(
            sum(long[row, column] for column, row in enumerate(rows))
            for rows in itertools.permutations(range(len(long)), len(short))
        )
        matched = [(got[image, layer, m], i) for i, m in enumerate(real)]
        total = sum(table[q, i] for q, i in matched if q >= 0)
        assert total == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("objects", [0, 1])
def test_images_without_objects_and_with_one(objects):
    rng = np.random.default_rng(objects)
    cost, valid = rng.normal(size=(2, 3, 5, 4)).astype(np.float32), np.zeros((2, 4), bool)
    valid[1, :objects] = True
    got = matching.solve_on_host(cost, valid)
    check_assignment(cost, valid, got)
    assert (got[0] == -1).all()
    if objects:
        np.testing.assert_array_equal(got[1, :, 0], cost[1, :, :, 0].argmin(axis=1))


def test_objects_beyond_the_queries_stay_unmatched():
    """With two queries and five objects, the cheapest two are matched, the others get -1."""
    cost = np.float32([[[[9, 1, 5, 6, 7], [9, 8, 5, 2, 7]]]])
    got = matching.solve_on_host(cost, np.ones((1, 5), bool))
    np.testing.assert_array_equal(got, [[[-1, 0, -1, 1, -1]]])


ANY = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, 1.0, -2.5])
SHAPE = (2, 3, 5, 4)


@given(hnp.arrays(np.float32, SHAPE, elements=ANY), hnp.arrays(bool, (2, 4)))
def test_any_cost_is_sanitized_counted_and_solved(cost, valid):
    """Catches costs on which SciPy raises; an exception in a callback is lost on TPU."""
    clean, count = sanitize(cost, valid)
    clean = np.asarray(clean)
    real = np.broadcast_to(valid[:, None, None, :], SHAPE)
    assert count == sum(
        not np.isfinite(c) and r for c, r in zip(cost.ravel(), real.ravel(), strict=True)
    )
    assert np.isfinite(clean).all() and np.abs(clean).max() <= matching.MAX_COST
    usual = real & (np.abs(cost) < matching.MAX_COST)
    np.testing.assert_array_equal(clean[usual], cost[usual])
    assert (clean[real & ~np.isfinite(cost)] == matching.MAX_COST).all()
    check_assignment(clean, valid, matching.solve_on_host(clean, valid))


def test_a_query_of_nonfinite_cost_is_the_last_choice():
    """Catches a sanitized entry that attracts, such as 0 or -MAX_COST."""
    cost = np.float32([[[[np.nan, 1], [-np.inf, 300], [200, 2]]]])
    clean, count = sanitize(cost, np.ones((1, 2), bool))
    assert count == 2
    np.testing.assert_array_equal(matching.solve_on_host(clean, np.ones((1, 2), bool)), [[[2, 0]]])


@pytest.mark.smoke
@pytest.mark.parametrize("with_mesh", [False, True])
def test_assignment_under_jit(with_mesh):
    """Covers the callback without a mesh and inside `shard_map`, in several calls."""
    mesh = make_mesh(1)
    compiled = fast_jit(lambda c, v: matching.assign(c, v, mesh)) if with_mesh else assign
    rng = np.random.default_rng(0)
    matching.host_timer.take()
    for share in (0.0, 0.3, 1.0):
        cost = rng.normal(size=SHAPE).astype(np.float32)
        valid = rng.random((2, 4)) < share
        check_assignment(cost, valid, compiled(cost, valid))
    assert 0 < matching.host_timer.take() < 60
    assert matching.host_timer.take() == 0


def test_cost_equals_a_plain_loop():
    """Checks focal class cost, L1 and GIoU with their weights, on axes [B, L, N, M]."""
    rng = np.random.default_rng(0)
    layers, batch, queries, classes, objects = 2, 3, 4, 5, 2
    logits = rng.normal(0, 4, (layers, batch, queries, classes)).astype(np.float32)
    predicted = oracle.random_boxes(rng, layers, batch, queries)
    labels = rng.integers(0, classes, (batch, objects))
    boxes = oracle.random_boxes(rng, batch, objects)
    focal = SigmoidFocalLoss(alpha=0.3, gamma=1.5)
    weights = {"cost_class": 3.0, "cost_bbox": 0.7, "cost_giou": 1.9}
    cost = fast_jit(lambda *args: matching.matching_cost(*args, **weights, class_loss=focal))
    got = cost(logits, predicted, labels, boxes)
    assert got.shape == (batch, layers, queries, objects)
    for b, layer, n, m in np.ndindex(got.shape):
        logit = logits[layer, b, n, labels[b, m]]
        want = 3.0 * (oracle.focal(logit, True, 0.3, 1.5) - oracle.focal(logit, False, 0.3, 1.5))
        want += 0.7 * np.abs(predicted[layer, b, n].astype(np.float64) - boxes[b, m]).sum()
        want -= 1.9 * oracle.giou(predicted[layer, b, n], boxes[b, m])
        assert got[b, layer, n, m] == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_bound_is_far_above_real_costs():
    """Catches a valid cost at the bound that marks broken costs."""
    logits = np.full((1, 1, 1, 2), -200, np.float32)
    cost = matching.matching_cost(
        logits, np.ones((1, 1, 1, 4), np.float32), np.zeros((1, 1), int), np.zeros((1, 1, 4))
    )
    assert np.isfinite(cost).all() and np.abs(cost).max() < matching.MAX_COST / 1000


# The first program is still running when the matching is called, as in a training. Arrays of
# different sizes in between move the costs in memory: only some places are copied by a thread.
ONE_CORE = """
import faulthandler, os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
faulthandler.dump_traceback_later(60, exit=True)
import jax, jax.numpy as jnp, numpy as np
from dn_detr_jax import matching
from dn_detr_jax.sharding import make_mesh
slow = jax.jit(lambda a, cost: cost + 0 * (a @ a @ a).sum())
rng = np.random.default_rng(0)
a, cost = jnp.ones((400, 400)), rng.random((6, 3, 100, 49), np.float32)
valid, kept = np.ones((6, 49), bool), []
want = matching.solve_on_host(cost, valid)
for devices in (1, 2):
    match = jax.jit(lambda c, v: matching.assign(c, v, make_mesh(devices)))
    for _ in range(10):
        kept.append(np.empty(rng.integers(1, 10**6), np.uint8))
        np.testing.assert_array_equal(match(slow(a, cost), valid), want)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_matching_on_one_core_ends():
    """Catches a callback that waits for a copy which only its own thread could make."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
