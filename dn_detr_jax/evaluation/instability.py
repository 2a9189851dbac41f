"""Instability of the bipartite matching from one epoch to the next (IS).

For an image, V[n] is the object that prediction n of a decoder layer is matched to, -1 for none.
The instability of an epoch is the number of entries of V that differ from the epoch before,
averaged over a fixed set of images. Its unit is entries per image; each decoder layer has its own.
A prediction that exchanges one object for another counts once; an object that moves from one
prediction to another counts twice, once where it left and once where it arrived.

Source: Li et al., DN-DETR, CVPR 2022, the equation of IS under "Stabilize Hungarian Matching".
"""

from collections.abc import Mapping, Sequence

import numpy as np

_NEVER = -2  # not a value of V: this image has no vector yet


def match_vectors(assignment: np.ndarray, num_queries: int) -> np.ndarray:
    """Inverts an assignment: from the query of each object to the object of each query.

    >>> match_vectors(np.array([[[3, 0, -1]]]), num_queries=5)
    array([[[ 1, -1, -1,  0, -1]]], dtype=int32)

    Args:
      assignment: int [B, L, M], the query matched to each object in each decoder layer, -1 for an
        empty object slot.
      num_queries: N.

    Returns:
      int32 [B, L, N], the object matched to each query, -1 for none.

    Raises:
      ValueError: `assignment` is not three-dimensional, or names a query outside 0..N-1.
    """
    assignment = np.asarray(assignment)
    if assignment.ndim != 3:
        raise ValueError(f"expected an assignment [B, L, M], got shape {assignment.shape}")
    if assignment.size and not (assignment.min() >= -1 and assignment.max() < num_queries):
        raise ValueError(
            f"an assignment must lie in -1..{num_queries - 1} for {num_queries} queries, got "
            f"{assignment.min()}..{assignment.max()}"
        )
    vectors = np.full((*assignment.shape[:2], num_queries), -1, np.int32)
    image, layer, slot = np.nonzero(assignment >= 0)
    vectors[image, layer, assignment[image, layer, slot]] = slot
    return vectors


class MatchingInstability:
    """Compares the match vectors of each epoch with those of the epoch before.

    The images must come with the same transforms and the same order of objects in every epoch.
    Between epochs, `state_dict` is the whole state, so that a run resumed from a checkpoint reports
    the values of an uninterrupted one. The number of decoder layers, L, is that of the first
    vectors.

    Args:
      image_ids: ids of the images to measure on, each once.
      num_queries: N, the length of a match vector.

    Raises:
      ValueError: no image, or a duplicate id.
    """

    def __init__(self, image_ids: Sequence[int], num_queries: int) -> None:
        self._ids = np.asarray(image_ids, np.int64).reshape(-1)
        self._row = {image_id: row for row, image_id in enumerate(self._ids.tolist())}
        if not 0 < len(self._row) == len(self._ids):
            raise ValueError(
                f"expected at least one image id and each once, got {len(self._ids)} ids, "
                f"{len(self._row)} of them distinct"
            )
        self._previous = np.full((len(self._ids), 0, num_queries), _NEVER, np.int32)
        self._current = self._previous.copy()

    def update(self, image_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Adds the match vectors of a batch, in any order.

        Args:
          image_ids: int [B]; images outside the measured set, and -1 for padding, are ignored.
          vectors: int32 [B, L, N] from `match_vectors`.

        Raises:
          ValueError: wrong shapes.
        """
        image_ids, vectors = np.asarray(image_ids), np.asarray(vectors)
        if vectors.ndim == 3 and vectors.shape[1] != self._previous.shape[1]:
            self._set_layers(vectors.shape[1])
        expected = (len(image_ids), *self._previous.shape[1:])
        if vectors.shape != expected:
            raise ValueError(f"expected match vectors of shape {expected}, got {vectors.shape}")
        for image_id, vector in zip(image_ids.tolist(), vectors, strict=True):
            row = self._row.get(image_id)
            if row is not None:
                self._current[row] = vector

    def _set_layers(self, layers: int) -> None:
        """Takes over the number of layers; one known layer is the last, as in `load_state_dict`."""
        images, known, queries = self._previous.shape
        if known > 1 or (self._current != _NEVER).any():
            raise ValueError(f"match vectors of {layers} decoder layers after those of {known}")
        previous = np.full((images, layers, queries), _NEVER, np.int32)
        previous[:, layers - known :] = self._previous
        self._previous, self._current = previous, np.full_like(previous, _NEVER)

    def finish(self, absent_unchanged: bool = False) -> np.ndarray:
        """Ends the epoch and returns its instability.

        Args:
          absent_unchanged: images without an update count as unchanged.

        Returns:
          float64 [L], entries per image of each layer; NaN in the first epoch.

        Raises:
          ValueError: an image of the set had no update in this epoch, and may not be absent.
        """
        is_absent = (self._current == _NEVER).all(axis=(1, 2))
        absent = self._ids[is_absent]
        if absent_unchanged:
            self._current[is_absent] = self._previous[is_absent]
        elif absent.size:
            raise ValueError(
                f"{absent.size} of {len(self._ids)} images got no match vector in this epoch, "
                f"the first of them image {absent[0]}"
            )
        first = (self._previous == _NEVER).all(axis=(0, 2))
        changed = np.count_nonzero(self._current != self._previous, axis=(0, 2))
        self._previous = self._current
        self._current = np.full_like(self._previous, _NEVER)
        return np.where(first, np.nan, changed / len(self._ids))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the match vectors that the next epoch is compared with; call it between epochs.

        Returns:
          `image_ids` int32 [I] and `previous` int32 [I, L, N], L of 0 before the first epoch;
          copies.
        """
        return {"image_ids": self._ids.astype(np.int32), "previous": self._previous.copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from a `state_dict`; an unfinished epoch is discarded.

        A state with `previous` [I, N], as of version 0.1, is of the last layer alone.

        Raises:
          ValueError: the state is of other images or of another number of queries.
        """
        image_ids, previous = np.asarray(state["image_ids"]), np.asarray(state["previous"])
        images, _, queries = self._previous.shape
        if previous.ndim == 2:
            previous = previous[:, None]
        if previous.ndim != 3 or (len(previous), previous.shape[2]) != (images, queries):
            raise ValueError(
                f"the stored match vectors have shape {previous.shape}, this run measures "
                f"{images} images and {queries} queries"
            )
        if not np.array_equal(image_ids, self._ids):
            first = int(np.flatnonzero(image_ids != self._ids)[0])
            raise ValueError(
                "the stored match vectors are of other images: the first that differs is image "
                f"{image_ids[first]}, where this run measures image {self._ids[first]}"
            )
        self._previous = previous.astype(np.int32)
        self._current = np.full_like(self._previous, _NEVER)
