"""How often each training image comes in an epoch.

`data.sampling="repeat_factor"` repeats images of rare classes (Gupta et al., LVIS: A Dataset for
Large Vocabulary Instance Segmentation, CVPR 2019). `data.mix` adds data sets with a share of the
images of an epoch. Both give each image a rate, the expected number of times in an epoch. The
number of times in each epoch follows from the rates and the seed alone.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.data.annotations import Annotations

_SAMPLING_STREAM = 4  # of random numbers, beside those of the plan
_STEPS = 2**20  # of the random offset: sums of rates stay exact


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rates of the images.

    Attributes:
      rates: float64 [N], above 0, how often each image comes in an epoch on average.
      parts: int64 [N], the data set of each image, ascending from 0.
    """

    rates: np.ndarray
    parts: np.ndarray

    @property
    def images_per_epoch(self) -> int:
        """The least number of images of an epoch, with repetitions: the sum of the rates."""
        return int(self._total)

    @property
    def _total(self) -> float:
        # Rates such as 1 / 3 must not add up to less than a whole number.
        return round(float(self.rates.sum()), 5)

    def counts(self, seed: int, epoch: int) -> np.ndarray:
        """Draws how often each image comes in an epoch.

        Systematic sampling: the rates are laid end to end, those of each data set in random order,
        and each point of a grid with spacing 1 and a random offset counts for the image that it
        falls on. So the count of an image is its rate, rounded up or down at random, and the rate
        is its mean. The counts of a data set add up to the sum of its rates, rounded up or down.

        Args:
          seed: not negative.
          epoch: not negative.

        Returns:
          int64 [N], at least `images_per_epoch` in all.
        """
        rng = np.random.default_rng([seed, _SAMPLING_STREAM, epoch])
        order = np.lexsort((rng.random(len(self.rates)), self.parts))
        ends = np.minimum(np.cumsum(self.rates[order]), self._total)
        ends[-1] = self._total
        points = np.ceil(ends - rng.integers(_STEPS) / _STEPS).astype(np.int64)
        counts = np.empty(len(order), np.int64)
        counts[order] = np.diff(points, prepend=0)
        return counts


def images_per_epoch(num_images: int, sampling: Sampling | None) -> int:
    """Returns the number of images in an epoch, repetitions included."""
    return num_images if sampling is None else sampling.images_per_epoch


def list_images(
    num_images: int, sampling: Sampling | None, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lists the images of an epoch.

    Args:
      num_images: of the data set.
      sampling: how often each image comes; None: once.
      seed: not negative.
      epoch: not negative.

    Returns:
      Positions in the data set, ascending, and for each how often it came before, both int64 [n].
    """
    if sampling is None:
        return np.arange(num_images), np.zeros(num_images, np.int64)
    counts = sampling.counts(seed, epoch)
    repeats = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(np.arange(num_images), counts), repeats


def sampling_of(
    annotations: Annotations, parts: tuple[int, ...], data_config: ConfigDict
) -> Sampling | None:
    """Returns the rates of the images, None if every image comes once.

    The rates of the first data set are 1 or its repeat factors, whatever is mixed with it. Those of
    the others are scaled so that each has its share of an epoch.

    Args:
      annotations: table of the training split, of all the data sets in their order.
      parts: number of images of each data set.
      data_config: `config.data`; `sampling`, `repeat_threshold` and `mix` are used.
    """
    if data_config.sampling == "uniform" and len(parts) == 1:
        return None
    rates = np.ones(len(annotations.sizes))
    if data_config.sampling == "repeat_factor":
        rates = repeat_factors(annotations, data_config.repeat_threshold)
    part = np.repeat(np.arange(len(parts)), parts)
    shares = np.array([1 - sum(data_config.mix.shares), *data_config.mix.shares])
    sums = np.bincount(part, rates, len(parts))
    if len(parts) > 1:
        rates = rates * (sums[0] * shares / shares[0] / sums)[part]
    return Sampling(rates, part)


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """Returns the repeat factor of each image, after LVIS.

    A class that a share f of the images has gets the factor max(1, sqrt(threshold / f)), an image
    the largest factor of its classes. An image without objects has the factor 1.

    Args:
      annotations: table of the split; its training targets count.
      threshold: share of the images below which a class is repeated.

    Returns:
      float64 [N], at least 1.
    """
    count = len(annotations.sizes)
    targets = np.flatnonzero(annotations.targets)
    _, classes = np.unique(annotations.category_ids[targets], return_inverse=True)
    pairs = np.unique(np.stack([classes, annotations.rows[targets]]), axis=1)  # [class, image]
    share = np.bincount(pairs[0]) / count
    factors = np.maximum(1.0, np.sqrt(threshold / share))
    rates = np.ones(count)
    np.maximum.at(rates, pairs[1], factors[pairs[0]])
    return rates
