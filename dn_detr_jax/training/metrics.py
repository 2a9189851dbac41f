"""The metrics of training steps, from the device to the next log."""

import time

import flax.struct
import jax
import jax.numpy as jnp


class StepMetrics(flax.struct.PyTreeNode):
    """The metrics of a step in one vector, so that logging is one transfer.

    Attributes:
      values: float32 [K].
      names: of the K metrics, sorted. They are a constant of the compiled step.
    """

    values: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, metrics: dict[str, jax.Array]) -> "StepMetrics":
        """Packs scalars."""
        names = tuple(sorted(metrics))
        return cls(jnp.stack([metrics[name].astype(jnp.float32) for name in names]), names)

    def as_dict(self) -> dict[str, float]:
        """Returns the values by name; waits for the device."""
        return dict(zip(self.names, jax.device_get(self.values).tolist(), strict=True))


class Window:
    """Counts and metrics since the last log.

    Attributes:
      metrics: of the steps that were not read yet.
      count: of steps.
      waiting: seconds that the steps waited for their batches.
      dropped: objects beyond `data.max_objects`.
      bad_images: images that could not be read.
    """

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []
        self.restart()

    def restart(self) -> None:
        """Sets counts and clock to zero; metrics that were not read yet stay."""
        self.count, self.waiting, self.dropped, self.bad_images = 0, 0.0, 0, 0
        self._start = time.monotonic()

    def add(self, metrics: StepMetrics) -> None:
        """Counts a step."""
        self.metrics.append(metrics)
        self.count += 1

    def leave_out(self, seconds: float) -> None:
        """Makes the window shorter by seconds that were spent on something else."""
        self._start += seconds

    def seconds(self) -> float:
        """Returns the length of the window so far."""
        return max(time.monotonic() - self._start, 1e-9)
