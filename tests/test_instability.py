"""Instability of matching against its definition, written out in plain Python."""

import itertools

import numpy as np
import pytest

from dn_detr_jax.evaluation.instability import MatchingInstability, match_vectors

IDS = [40, 7, 23, 5, 99]
L, N, M = 2, 12, 6


def random_assignments(seed):
    """Draws for each epoch {image id: query of each object in each layer}, -1 for padding."""
    rng = np.random.default_rng(seed)
    counts = {image_id: int(rng.integers(0, M + 1)) for image_id in IDS}
    epochs = []
    for _ in range(6):
        epoch = {}
        for image_id, count in counts.items():
            epoch[image_id] = np.full((L, M), -1, np.int32)
            for layer in range(L):
                epoch[image_id][layer, :count] = rng.permutation(N)[:count]
        epochs.append(epoch)
    return epochs


def slow_instability(before, now):
    totals = [0] * L
    for image_id, layer in itertools.product(IDS, range(L)):
        vectors = []
        for assignment in (before[image_id][layer], now[image_id][layer]):
            vector = []
            for query in range(N):
                holders = [m for m in range(M) if assignment[m] == query]
                vector.append(holders[0] if holders else -1)
            vectors.append(vector)
        totals[layer] += sum(a != b for a, b in zip(*vectors, strict=True))
    return [total / len(IDS) for total in totals]


def run_epoch(measure, epoch, batch=2, order=IDS):
    """Yields batches as in the evaluation; the last one is padded with image id -1."""
    for start in range(0, len(order), batch):
        ids = list(order[start : start + batch])
        assignment = np.stack([epoch[i] for i in ids] + [epoch[ids[0]]] * (batch - len(ids)))
        ids += [-1] * (batch - len(ids))
        measure.update(np.array(ids, np.int32), match_vectors(assignment, N))
    return measure.finish().tolist()


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(seed):
    epochs = random_assignments(seed)
    measure = MatchingInstability(IDS, N)
    measured = [run_epoch(measure, epoch) for epoch in epochs]
    assert np.isnan(measured[0]).all()
    assert measured[1:] == [slow_instability(*pair) for pair in itertools.pairwise(epochs)]
    assert np.min(measured[1:]) > 0


def test_a_moved_object_counts_twice_and_an_exchange_twice():
    measure = MatchingInstability([1, 2], num_queries=4)
    for epoch, expected in (
        ([[0, 1], [2, -1]], np.nan),
        ([[0, 1], [2, -1]], 0.0),
        ([[0, 3], [2, -1]], 1.0),  # one of two images: query 1 lost it, query 3 took it
        ([[3, 0], [2, -1]], 1.0),  # two queries exchanged their objects
    ):
        measure.update([1, 2], match_vectors(np.array(epoch)[:, None], 4))
        np.testing.assert_equal(measure.finish(), [expected])


def test_order_and_batches_do_not_matter():
    epochs = random_assignments(9)
    measures = [MatchingInstability(IDS, N) for _ in range(2)]
    for number, epoch in enumerate(epochs):
        order = np.random.default_rng(number).permutation(IDS).tolist()
        results = run_epoch(measures[0], epoch), run_epoch(measures[1], epoch, 3, order)
        np.testing.assert_equal(*results)


@pytest.mark.parametrize("done", range(6))
def test_resuming_changes_nothing(done):
    epochs = random_assignments(3)
    whole = MatchingInstability(IDS, N)
    expected = [run_epoch(whole, epoch) for epoch in epochs]
    first = MatchingInstability(IDS, N)
    before = [run_epoch(first, epoch) for epoch in epochs[:done]]
    state = {key: value.copy() for key, value in first.state_dict().items()}
    if done < len(epochs):  # an interrupted epoch has no effect
        first.update(IDS[:1], match_vectors(epochs[done][IDS[0]][None], N))
    if done:
        np.testing.assert_equal(first.state_dict(), state)
    second = MatchingInstability(IDS, N)
    second.load_state_dict(state)
    after = [run_epoch(second, epoch) for epoch in epochs[done:]]
    np.testing.assert_equal(before + after, expected)


def test_the_state_of_version_0_1_is_that_of_the_last_layer():
    """Catches a run that is refused after an update, and changes counted from nothing."""
    first, second, third, *_ = random_assignments(3)
    measure = MatchingInstability(IDS, N)
    run_epoch(measure, first)
    state = measure.state_dict()
    resumed = MatchingInstability(IDS, N)
    resumed.load_state_dict(state | {"previous": state["previous"][:, -1]})
    expected = [np.nan, slow_instability(first, second)[-1]]
    np.testing.assert_equal(run_epoch(resumed, second), expected)
    assert run_epoch(resumed, third) == slow_instability(second, third)
    with pytest.raises(ValueError, match=r"shape \(5, 1, 8\).* 5 images and 12 queries"):
        resumed.load_state_dict(state | {"previous": np.zeros((5, 8), np.int32)})


def test_a_missing_image_is_an_error():
    measure = MatchingInstability(IDS, N)
    for epoch in random_assignments(0)[:2]:
        assignment = np.stack([epoch[i] for i in IDS if i != 23])
        measure.update([i for i in IDS if i != 23], match_vectors(assignment, N))
        with pytest.raises(ValueError, match=r"1 of 5 images .* image 23"):
            measure.finish()
        measure.update([23], match_vectors(epoch[23][None], N))
        measure.finish()


def test_absent_images_count_as_unchanged_where_they_may():
    """Covers a first image that is absent from the start, and a last one that disappears."""
    first, second, third, *_ = random_assignments(3)
    measure = MatchingInstability(IDS, N)

    def run(epoch, absent):
        for image_id in IDS:
            if image_id not in absent:
                measure.update([image_id], match_vectors(epoch[image_id][None], N))
        return measure.finish(absent_unchanged=True).tolist()

    assert np.isnan(run(first, IDS[:1])).all()
    constant = second | {IDS[0]: first[IDS[0]]}
    assert run(second, IDS[:1]) == slow_instability(first, constant)
    middle = {i: third[i] if i in IDS[1:-1] else constant[i] for i in IDS}
    assert run(third, [IDS[0], IDS[-1]]) == slow_instability(constant, middle)


def test_images_outside_the_set_are_ignored():
    epochs = random_assignments(1)
    measure = MatchingInstability(IDS, N)
    for number, epoch in enumerate(epochs[:2]):
        measure.update([1000, -1], np.full((2, L, N), number, np.int32))
        result = run_epoch(measure, epoch)
    assert result == slow_instability(*epochs[:2])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"-1\.\.4 for 5 queries, got 0\.\.5"):
        match_vectors(np.array([[[0, 5]]]), 5)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        match_vectors(np.zeros((2, 3), int), 5)
    with pytest.raises(ValueError, match="3 ids, 2 of them distinct"):
        MatchingInstability([1, 2, 1], N)
    measure = MatchingInstability(IDS, N)
    with pytest.raises(ValueError, match=r"\(1, 2, 12\), got \(1, 2, 5\)"):
        measure.update([7], np.zeros((1, L, 5), np.int32))
    other = MatchingInstability(IDS, 8)
    other.update(IDS, np.zeros((5, L, 8), np.int32))
    other.finish()
    with pytest.raises(ValueError, match=r"shape \(5, 2, 8\).* 5 images and 12 queries"):
        measure.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="1 decoder layers after those of 2"):
        other.update(IDS, np.zeros((5, 1, 8), np.int32))
    with pytest.raises(ValueError, match="image 41, where this run measures image 40"):
        measure.load_state_dict(MatchingInstability([41, *IDS[1:]], N).state_dict())


def test_no_objects_at_all():
    vectors = match_vectors(np.full((2, L, 0), -1), 3)
    np.testing.assert_array_equal(vectors, np.full((2, L, 3), -1))
    assert vectors.dtype == np.int32
