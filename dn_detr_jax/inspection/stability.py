"""How the matching of a run changes from one kept checkpoint to the next, in every decoder layer.

`evaluation.instability` defines the instability (IS). A training records it at every evaluation.
Here the checkpoints that the run still has are applied to the same images.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dn_detr_jax.evaluation.instability import MatchingInstability, match_vectors

# (parameters, batch) -> matching int32 [L, B, M]
Match = Callable[[Any, dict[str, np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stability:
    """The matching of several checkpoints.

    Attributes:
      steps: of the checkpoints, ascending.
      instability: float [steps - 1, L], entries per image that differ from the checkpoint before.
      queries: by image id, int [steps, M]: the query that the last layer's matching gives to each
        object; -1: none.
      images: number of images that the instability is measured on.
    """

    steps: tuple[int, ...]
    instability: np.ndarray
    queries: dict[int, np.ndarray]
    images: int


def measure(
    checkpoints: Iterable[tuple[int, Any]],
    batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    match: Match,
    num_queries: int,
    shown: Sequence[int],
) -> Stability:
    """Applies checkpoints to the same images and compares their matchings.

    Args:
      checkpoints: pairs of a step and its parameters, in ascending order.
      batches: makes the batches of the images anew, with `image_id` int [B], -1 for padding.
      match: (parameters, batch) -> the query matched to each object in every layer, [L, B, M].
      num_queries: N.
      shown: ids of images whose queries are kept; they must be among the batches.
    """
    steps: list[int] = []
    changed: list[np.ndarray] = []
    measured: MatchingInstability | None = None
    queries: dict[int, list[np.ndarray]] = {image_id: [] for image_id in shown}
    ids: list[int] = []
    for step, params in checkpoints:
        found: dict[int, np.ndarray] = {}
        for batch in batches():
            assignment = match(params, batch)
            for row in np.flatnonzero(batch["image_id"] >= 0).tolist():
                found[int(batch["image_id"][row])] = assignment[:, row]
        ids = sorted(found)
        table = np.stack([found[image_id] for image_id in ids])  # [images, L, M]
        measured = measured or MatchingInstability(ids, num_queries)
        measured.update(np.array(ids), match_vectors(table, num_queries))
        changed.append(measured.finish())
        steps.append(step)
        for image_id, of_image in queries.items():
            of_image.append(found[image_id][-1])
    return Stability(
        tuple(steps),
        np.array(changed[1:]).reshape(-1, changed[0].size if changed else 0),
        {image_id: np.stack(of_image) for image_id, of_image in queries.items() if of_image},
        len(ids),
    )
