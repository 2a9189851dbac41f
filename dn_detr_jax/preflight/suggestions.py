"""Options and batch sizes that make a step fit into memory."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

REMAT_PARTS = ("backbone", "encoder", "decoder")


def with_batch(config: ConfigDict, batch_per_device: int, mesh: Mesh) -> ConfigDict:
    """Copies a config and sets the images per device of training and evaluation."""
    config = config.copy_and_resolve_references()
    config.train.batch_size = config.eval.batch_size = batch_per_device * mesh.size
    return config


class Proposal(NamedTuple):
    """Options that might make a step fit.

    Attributes:
      options: values by config key.
      batch_per_device: images per device.
    """

    options: dict[str, Any]
    batch_per_device: int

    def text(self) -> str:
        """Returns the flags as written in a shell."""
        overrides = [f"--config.{key}={value}" for key, value in self.options.items()]
        # Tuples need quotes; within double ones their own stay readable.
        quoted = [f'"{o.replace(" ", "")}"' if "(" in o else o for o in overrides]
        return " ".join([f"--batch_per_device={self.batch_per_device}", *quoted])

    def applied(self, config: ConfigDict, mesh: Mesh) -> ConfigDict:
        """Copies a config and applies the proposal."""
        config = with_batch(config, self.batch_per_device, mesh)
        config.update_from_flattened_dict(self.options)
        return config


class Outcome(NamedTuple):
    """The result of a proposal: bytes per device, and whether they fit."""

    proposal: Proposal
    needed: float | None
    fits: bool


def proposals(config: ConfigDict, batch_per_device: int) -> list[Proposal]:
    """Returns options that save much memory at the same batch, the cheapest first."""
    options: list[dict[str, Any]] = []
    if config.model.dtype == "float32":
        options.append({"model.dtype": "bfloat16"})
    if set(config.model.remat) != set(REMAT_PARTS):
        options.append({"model.remat": REMAT_PARTS})
    return [Proposal(option, batch_per_device) for option in options]


def smaller_batch(needed: float, fixed: float, available: float, batch: int, parts: int = 1) -> int:
    """Returns the largest batch that fits if all but the fixed bytes grow in proportion to it.

    Args:
      needed: bytes at `batch`.
      fixed: those of them that do not depend on the batch.
      available: bytes.
      batch: images per device, a multiple of `parts` and more than that.
      parts: `train.accumulate_steps`.

    Returns:
      A multiple of `parts`, at least `parts` and below `batch`.

    Examples:
      >>> smaller_batch(needed=20.0, fixed=2.0, available=16.0, batch=9)
      7
    """
    each = max(needed - fixed, 1) / batch
    fitting = math.floor((available - fixed) / each) // parts * parts
    return min(max(fitting, parts), batch - parts)


def suggest(
    config: ConfigDict,
    batch_per_device: int,
    needed: float | None,
    fixed: float,
    available: float | None,
    attempt: Callable[[Proposal], Outcome],
) -> Iterator[Outcome]:
    """Tries options and smaller batches until a step fits.

    Args:
      config: whole configuration, with which the step does not fit.
      batch_per_device: images per device, with which the step does not fit.
      needed: bytes that the step needs per device, None if unknown.
      fixed: those of them that do not depend on the batch.
      available: bytes of a device, None if unknown.
      attempt: compiles a proposal.

    Yields:
      Outcomes: of each option at the same batch; of all of them together if none is enough alone;
      and of smaller batches until one fits, with the options unless one of them was enough.
    """
    single = []
    for proposal in proposals(config, batch_per_device):
        single.append(attempt(proposal))
        yield single[-1]
    options: dict[str, Any] = {}
    if single and not any(outcome.fits for outcome in single):
        last = single[0]
        for outcome in single:
            options |= outcome.proposal.options
        if len(single) > 1:
            last = attempt(Proposal(options, batch_per_device))
            yield last
            if last.fits:
                options = {}
        needed = needed if last.fits else last.needed
    batch, parts = batch_per_device, config.train.accumulate_steps
    while batch > parts:
        if needed is not None and available is not None:
            batch = smaller_batch(needed, fixed, available, batch, parts)
        else:
            batch = max(batch // 2 // parts, 1) * parts
        outcome = attempt(Proposal(options, batch))
        yield outcome
        if outcome.fits:
            return
        needed = outcome.needed
