"""Steps whose loss, gradients or matching costs are not finite: detected, reported, skipped.

The compiled step and the host apply the same rule: a step is bad if a metric is not finite or a
matching cost had to be replaced. With `config.on_nonfinite` of "skip" the compiled step leaves its
update out. The host reads the metrics of every step before anything is logged, evaluated or saved.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.errors import TrainingError
from dn_detr_jax.training.state import TrainState

COSTS = "nonfinite_costs"  # the metric that counts them; all others must be finite
_MOST_TERMS, _MOST_IMAGES = 6, 64  # named in a message


def unless_nonfinite(
    new: TrainState, old: TrainState, metrics: dict[str, jax.Array]
) -> tuple[TrainState, jax.Array]:
    """Returns the new state if the metrics before the update are finite, else the old one.

    The step number advances in both cases. An update that overflows although the gradients are
    finite is left to the host: a rule that waited for the norm of the update would need a second
    copy of the whole state.

    Args:
      new: after the update.
      old: before it.
      metrics: of the loss and the gradients, with `nonfinite_costs`.

    Returns:
      The state, whose parameters, optimizer state and average are one of the two bit for bit and
      whose step is the new one; and whether the update was skipped, a bool scalar.
    """
    values = jnp.stack([value.astype(jnp.float32) for value in metrics.values()])
    skipped = ~jnp.isfinite(values).all() | (metrics[COSTS] > 0)
    kept = jax.tree.map(lambda n, o: jnp.where(skipped, o, n), new, old)
    return kept.replace(step=new.step), skipped


class NonFiniteGuard:
    """Checks the metrics of every step on the host: reports and counts skipped steps, or raises.

    Attributes:
      skipped: updates of the whole run that were skipped.
    """

    def __init__(
        self,
        config: ConfigDict,
        image_ids: Callable[[int], np.ndarray],
        skipped: int = 0,
    ):
        """Starts to count skipped steps.

        Args:
          config: whole configuration; `max_skipped_steps` is used.
          image_ids: gives the image ids of the whole batch of a step, counted from 1.
          skipped: updates that the run skipped before it was resumed.
        """
        self.skipped = skipped
        self._limit, self._image_ids = config.max_skipped_steps, image_ids

    def means(
        self,
        first_step: int,
        names: Sequence[str],
        rows: np.ndarray,
        show: Callable[[str], None],
    ) -> dict[str, float]:
        """Returns the means of the metrics over the steps that were not skipped.

        Args:
          first_step: step of the first row, counted from 1.
          names: of the K metrics.
          rows: float32 [steps, K].
          show: is called with a line for each update that was skipped.

        Returns:
          Means by name, without `skipped`; nothing if every step was skipped.

        Raises:
          TrainingError: a step was not finite and not skipped, or it was one skipped too many.
        """
        costs = rows[:, list(names).index(COSTS)]
        bad = ~np.isfinite(rows).all(axis=1) | (costs > 0)
        for i in np.flatnonzero(bad).tolist():
            values = dict(zip(names, rows[i].tolist(), strict=True))
            text = self._describe(first_step + i, values)
            if not values.get("skipped"):
                raise TrainingError(text)
            self.skipped += 1
            text += f"; skipped {self.skipped}, config.max_skipped_steps = {self._limit}"
            if self.skipped > self._limit:
                raise TrainingError(text)
            show(text)
        if bad.all():
            return {}
        means = dict(zip(names, map(float, rows[~bad].mean(axis=0)), strict=True))
        means.pop("skipped", None)
        return means

    def _describe(self, step: int, values: dict[str, float]) -> str:
        """Returns one line: the step, the terms that are not finite, the images of its batch."""
        terms = [name for name, value in values.items() if not math.isfinite(value)]
        # The total and the norms follow from the others.
        terms.sort(key=lambda name: name == "loss" or name.endswith("_norm"))
        found = [_first(terms, _MOST_TERMS)] if terms else []
        if math.isfinite(values[COSTS]) and values[COSTS] > 0:
            found.append(f"{int(values[COSTS])} matching costs")
        images = _first(self._image_ids(step).tolist(), _MOST_IMAGES)
        return f"step {step}: not finite: {'; '.join(found)}; batch of images {images}"


def _first(names: Sequence, most: int) -> str:
    """Returns the names in a line, only the first if there are many.

    Examples:
      >>> _first(["a", "b", "c", "d"], 2), _first([7], 2)
      ('a, b and 2 more', '7')
    """
    shown = ", ".join(map(str, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
