"""The least time of a whole training, from the plan of its batches and the cost of each canvas."""

import dataclasses
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.config import validate
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import images_in_epoch, train_plan
from dn_detr_jax.preflight.preflight import Preflight, configured_mesh, run_preflight
from dn_detr_jax.training.setup import Plan, check_classes, resolve

HOUR = 3600


@dataclasses.dataclass(frozen=True)
class WholeRun:
    """What a training costs at least, canvas by canvas.

    Attributes:
      plan: durations, in steps.
      canvases: the preflight of each canvas that the first epoch uses, the most frequent first.
      steps: of the first epoch, on each of these canvases.
    """

    plan: Plan
    canvases: list[Preflight]
    steps: list[int]

    @property
    def fits(self) -> bool:
        """Whether every canvas does."""
        return all(result.fits for result in self.canvases)

    @property
    def worst(self) -> Preflight:
        """The canvas that needs the most memory; one that does not fit comes first."""
        return max(self.canvases, key=lambda result: (not result.fits, result.needed or 0))

    @property
    def step_seconds(self) -> float | None:
        """Least seconds of a step, the mean over an epoch; None if those of a canvas are unknown.

        They are unknown for devices without peak figures, and where a step does not fit.
        """
        seconds = []
        for result in self.canvases:
            if result.cost is None or result.chip is None:
                return None
            seconds.append(result.cost.roofline(result.chip).seconds)
        return float(np.average(seconds, weights=self.steps))

    @property
    def images_per_second(self) -> float | None:
        """Images on all devices, at most."""
        seconds = self.step_seconds
        return self.canvases[0].config.train.batch_size / seconds if seconds else None

    @property
    def hours(self) -> float | None:
        """The steps of the whole training, at least."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * self.plan.total / HOUR

    def record(self) -> dict[str, Any]:
        """Returns everything in a form for JSON."""
        return {
            "fits": self.fits,
            "steps": self.plan.total,
            "steps_per_epoch": self.plan.per_epoch,
            "images_per_second_at_most": self.images_per_second,
            "hours_at_least": self.hours,
            "canvases": [
                {"steps_of_first_epoch": steps} | result.record()
                for steps, result in zip(self.steps, self.canvases, strict=True)
            ],
        }


def preflight_run(
    config: ConfigDict, topology: str, batch_per_device: int | None = None
) -> WholeRun:
    """Compiles the training step for every canvas that a training uses.

    The training data is read for the sizes of its images, its classes and its objects.

    Args:
      config: whole configuration; stays unchanged.
      topology: see `topology_devices`.
      batch_per_device: images per device; None: `train.batch_size` over all devices.

    Raises:
      PreflightError, ConfigError, DataError: a wrong topology, config, batch or data set.
    """
    validate(config)
    config = configured_mesh(config, topology, batch_per_device)[0]
    dataset = open_dataset(config.data, "train", images="unread")
    config = resolve(config, dataset)
    check_classes(config, dataset)
    plan = Plan.of(config, images_in_epoch(dataset, config))
    epoch = train_plan(dataset, config).epoch(0)
    counts = np.bincount(epoch.canvas, minlength=len(epoch.canvases))
    results, steps = [], []
    for index in np.argsort(-counts, kind="stable"):
        if not counts[index]:
            continue
        canvas = epoch.canvases[index]
        height, width = canvas
        print(f"compiling for {height} x {width} ...", file=sys.stderr, flush=True)
        results.append(run_preflight(config, topology, None, canvas))
        steps.append(int(counts[index]))
    return WholeRun(plan, results, steps)
