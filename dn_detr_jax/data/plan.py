"""The epoch plan: the images, augmentations and canvas of each batch.

A plan is a pure function of the seed, the epoch and the images' sizes. Every process computes
the whole of it and takes its rows, so nothing is communicated, and a step number is all that is
needed to resume. Compiled steps see few shapes: a batch lies on one of the configured canvases
(padding buckets, see `placement`), and its images have final sizes that fit.
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.config import parse_duration
from dn_detr_jax.data.augmentation import after_stop
from dn_detr_jax.data.placement import (
    Canvas,
    assign_canvases,
    canvas_factors,
    check_canvases,
    place,
    scaled,
)
from dn_detr_jax.data.sampling import Sampling, images_per_epoch, list_images
from dn_detr_jax.data.transforms import Geometry, draw_geometry, eval_geometry, largest_sizes
from dn_detr_jax.errors import DataError

# Streams of random numbers that must not depend on each other.
_PLAN_STREAM, _OBJECT_STREAM, _JOIN_STREAM, _IMAGE_STREAM = 0, 1, 2, 3

_TRIES = 64  # augmentations drawn for an image that has to fit a canvas which is not its own


class BatchSpec(NamedTuple):
    """The images of a batch and their augmentation.

    Attributes:
      epoch: number of its epoch.
      canvas: height and width of the batch.
      indices: int64 [B], positions in the data set, -1 for rows that stay empty.
      repeats: int64 [B], how often the image came before in the epoch's list of images.
      geometry: `Geometry` with one leading dimension, B; without meaning in empty rows.
    """

    epoch: int
    canvas: Canvas
    indices: np.ndarray
    repeats: np.ndarray
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The S batches of an epoch, of B images each.

    Attributes:
      epoch: its number.
      canvases: heights and widths.
      canvas: int32 [S], the position in `canvases` of each batch.
      indices: int64 [S, B], positions in the data set, -1 for rows that stay empty.
      repeats: int64 [S, B], see `BatchSpec`.
      geometry: `Geometry` with leading dimensions S, B; without meaning in rows that stay empty.
      redrawn: images whose augmentation was drawn again, so that they fit a joint batch.
      shrunken: images that no draw made fit, and that are smaller than the augmentation allows.
    """

    epoch: int
    canvases: tuple[Canvas, ...]
    canvas: np.ndarray
    indices: np.ndarray
    repeats: np.ndarray
    geometry: Geometry
    redrawn: int = 0
    shrunken: int = 0

    def __len__(self) -> int:
        return len(self.canvas)

    @property
    def padding(self) -> float:
        """Padded pixels as a share of all the pixels of the epoch's batches."""
        real = self.geometry.size.prod(-1, dtype=np.int64)[self.indices >= 0].sum()
        area = np.prod(np.asarray(self.canvases, np.int64)[self.canvas], axis=-1).sum()
        return float(1 - real / (area * self.indices.shape[1]))

    def batch(self, position: int) -> BatchSpec:
        """The batch at a position of the epoch."""
        return BatchSpec(
            epoch=self.epoch,
            canvas=self.canvases[self.canvas[position]],
            indices=self.indices[position],
            repeats=self.repeats[position],
            geometry=self.geometry.at(position),
        )


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch; the images left out differ by epoch.

    Raises:
      DataError: if there is not one full batch.
    """
    if num_images < batch_size:
        raise DataError(
            f"train.batch_size is {batch_size}, but the training split has {num_images} images: "
            f"at most {num_images} are possible"
        )
    return num_images // batch_size


def stop_epoch(config: ConfigDict, steps_per_epoch: int) -> float:
    """Returns the first epoch without what `data.augment.stop_at` ends, infinity if there is none.

    Args:
      config: whole configuration.
      steps_per_epoch: batches of an epoch.

    Raises:
      ConfigError: not a duration.
    """
    number, unit = parse_duration(config.data.augment.stop_at, "data.augment.stop_at")
    if unit == "%":
        if number == 100:
            return math.inf
        share = number / 100
        number, unit = parse_duration(config.train.duration, "train.duration")
        number *= share
    epochs = number / steps_per_epoch if unit == "steps" else number
    return math.ceil(epochs - 1e-9)


def plan_epoch(
    *,
    seed: int,
    epoch: int,
    sizes: np.ndarray,
    augment: ConfigDict,
    canvases: Sequence[Canvas],
    batch_size: int,
    snap: float = 0.0,
    sampling: Sampling | None = None,
) -> EpochPlan:
    """Plans a training epoch of floor(N / batch_size) batches.

    N is the number of images, or that of `sampling`, with repetitions. The images are shuffled, and
    those that don't fill a last batch are left out. Batches are formed of images of the same
    canvas, in that order; what is left, less than a batch for each canvas, is joined (`_join`).
    Then the batches are shuffled. So the whole epoch is the window in which like sizes are looked
    for, which costs nothing: only sizes are looked at.

    Args:
      seed: not negative.
      epoch: not negative.
      sizes: int [N, 2], heights and widths.
      augment: `config.data.augment`.
      canvases: heights and widths; every image must fit one (`check_canvases`).
      batch_size: of all the processes together.
      snap: share by which an image's scale may move so that it touches its canvas; 0 leaves the
        published augmentation as it is (see `canvas_factors`).
      sampling: how often each image comes; None: at most once.

    Returns:
      The plan. Each repetition of an image has an augmentation of its own.
    """
    rng = np.random.default_rng([seed, _PLAN_STREAM, epoch])
    num_steps = steps_per_epoch(images_per_epoch(len(sizes), sampling), batch_size)
    entries, repeats = list_images(len(sizes), sampling, seed, epoch)
    sizes = np.asarray(sizes)[entries]
    geometry = draw_geometry(rng, sizes, augment)
    canvas_of, placed = place(geometry.size, canvases, snap, augment.max_long_side)
    order = rng.permutation(len(sizes))[: num_steps * batch_size]

    batches, batch_canvas, waiting = [], [], []
    for c in range(len(canvases)):
        queue = order[canvas_of[order] == c]
        full = len(queue) // batch_size
        batches.append(queue[: full * batch_size].reshape(full, batch_size))
        batch_canvas += [c] * full
        waiting.append(queue[full * batch_size :])

    left = np.concatenate(waiting)
    joined = _join(
        np.random.default_rng([seed, _JOIN_STREAM, epoch]),
        sizes[left],
        geometry.at(left),
        augment,
        canvases,
        batch_size,
        snap,
    )
    geometry = geometry._replace(size=placed)
    for field, values in zip(geometry, joined.geometry, strict=True):
        field[left] = values

    indices = np.concatenate([*batches, left[joined.rows]])
    canvas = np.concatenate([batch_canvas, joined.canvas]).astype(np.int32)
    shuffle = rng.permutation(num_steps)
    chosen = indices[shuffle].astype(np.int64)
    return EpochPlan(
        epoch=epoch,
        canvases=tuple((int(height), int(width)) for height, width in canvases),
        canvas=canvas[shuffle],
        indices=entries[chosen],
        repeats=repeats[chosen],
        geometry=geometry.at(chosen),
        redrawn=joined.redrawn,
        shrunken=joined.shrunken,
    )


class _Joined(NamedTuple):
    """Batches of images that were left over, of several canvases.

    Attributes:
      rows: int [S, B], positions among the images left over, each once.
      canvas: int [S].
      geometry: of the images left over, in their order.
      redrawn, shrunken: see `EpochPlan`.
    """

    rows: np.ndarray
    canvas: np.ndarray
    geometry: Geometry
    redrawn: int
    shrunken: int


def _join(
    rng: np.random.Generator,
    sizes: np.ndarray,
    geometry: Geometry,
    augment: ConfigDict,
    canvases: Sequence[Canvas],
    batch_size: int,
    snap: float,
) -> _Joined:
    """Forms batches of images that have different canvases.

    While some canvas holds a whole batch of them, the smallest such canvas gets a batch. For the
    last batches there is no such canvas, usually because upright and wide images are left. Then the
    augmentation of the images that do not fit is drawn again until they fit: each size is still a
    published one, but the proportions of sizes change. An image is made smaller only if all the
    draws fail.

    Args:
      rng: of these draws.
      sizes: int [R, 2], original sizes, R a multiple of the batch size.
      geometry: drawn for them, with a leading dimension R.
      augment: `config.data.augment`.
      canvases: heights and widths.
      batch_size: of all the processes together.
      snap: see `canvas_factors`.
    """
    count, area = len(sizes), np.prod(np.asarray(canvases, np.int64), axis=-1)
    drawn = draw_geometry(rng, np.tile(sizes, (_TRIES, 1)), augment)
    tries = Geometry(  # [T, R, ...], the first is the one that was drawn already
        *(
            np.concatenate([first[None], more.reshape(_TRIES, *first.shape)])
            for first, more in zip(geometry, drawn, strict=True)
        )
    )
    factors = canvas_factors(tries.size, canvases, snap, augment.max_long_side)  # [T, R, K]
    fits = factors > 0
    first = np.where(fits.any(0), fits.argmax(0), len(fits))  # [R, K], the try that fits

    chosen = np.empty(count, np.int64)
    rows, batch_canvas, rest = [], [], np.arange(count)
    while len(rest):
        unchanged = (first[rest] == 0).sum(0)
        possible = (first[rest] < len(fits)).sum(0)
        # The last key counts first.
        c = np.lexsort(
            [area, -np.minimum(unchanged, batch_size), -np.minimum(possible, batch_size)]
        )
        full = c[unchanged[c] >= batch_size]
        c = full[area[full].argmin()] if len(full) else c[0]
        taken = rest[np.argsort(first[rest, c], kind="stable")[:batch_size]]
        chosen[taken] = c
        rows.append(taken)
        batch_canvas.append(c)
        rest = np.setdiff1d(rest, taken)

    everything = np.arange(count)
    attempt = first[everything, chosen]
    failed = attempt == len(fits)
    attempt[failed] = 0
    result = tries.at((attempt, everything))
    factor = factors[attempt, everything, chosen]
    canvas_size = np.asarray(canvases)[chosen]
    factor[failed] = (canvas_size / result.size).min(-1)[failed]
    return _Joined(
        rows=np.array(rows, np.int64).reshape(-1, batch_size),
        canvas=np.array(batch_canvas, np.int64),
        geometry=result._replace(size=scaled(result.size, factor[:, None])),
        redrawn=int((attempt > 0).sum()),
        shrunken=int(failed.sum()),
    )


class TrainPlan:
    """The endless stream of training batches: a step number gives its batch.

    Safe for threads; pickled without the plans it keeps.
    """

    def __init__(
        self,
        *,
        seed: int,
        sizes: np.ndarray,
        image_ids: np.ndarray,
        augment: ConfigDict,
        canvases: Sequence[Canvas],
        batch_size: int,
        snap: float = 0.0,
        stop_epoch: float = math.inf,
        sampling: Sampling | None = None,
    ):
        """See `plan_epoch` for the other arguments.

        Args:
          stop_epoch: the first epoch without what `data.augment.stop_at` ends.

        Raises:
          DataError: if an image may fit no canvas, or if there is not one full batch.
        """
        check_canvases(largest_sizes(sizes, augment), canvases, sizes, image_ids)
        self.steps_per_epoch = steps_per_epoch(images_per_epoch(len(sizes), sampling), batch_size)
        self._stop_epoch = stop_epoch
        self._augments = augment, after_stop(augment)
        self._arguments: dict[str, Any] = {
            "seed": seed,
            "sizes": sizes,
            "canvases": canvases,
            "batch_size": batch_size,
            "snap": snap,
            "sampling": sampling,
        }
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._epochs: collections.OrderedDict[int, EpochPlan] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_lock"], state["_epochs"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def batch(self, step: int) -> BatchSpec:
        """The batch of a step, counted from 0 over all the epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch).batch(position)

    def next_canvases(self, start: int, stop: int) -> list[Canvas]:
        """The canvases of the steps from `start` to the end of their epoch, by their first use.

        Args:
          start: steps done.
          stop: steps of the whole training; from there on there are none.
        """
        if start >= stop:
            return []
        number, position = divmod(start, self.steps_per_epoch)
        epoch = self.epoch(number)
        used = dict.fromkeys(epoch.canvas[position : position + stop - start].tolist())
        return [epoch.canvases[canvas] for canvas in used]

    def augment(self, epoch: int) -> ConfigDict:
        """`config.data.augment` of an epoch: `data.augment.stop_at` ends a part of it."""
        return self._augments[epoch >= self._stop_epoch]

    def epoch(self, number: int) -> EpochPlan:
        """The plan of an epoch, counted from 0."""
        with self._lock:
            if number not in self._epochs:
                augment = self.augment(number)
                self._epochs[number] = plan_epoch(epoch=number, augment=augment, **self._arguments)
                if len(self._epochs) > 2:  # prefetching reaches into the next epoch
                    self._epochs.popitem(last=False)
            return self._epochs[number]


def plan_eval(
    *,
    sizes: np.ndarray,
    image_ids: np.ndarray,
    short_side: int,
    max_long_side: int,
    canvases: Sequence[Canvas],
    batch_size: int,
    subset: np.ndarray | None = None,
) -> EpochPlan:
    """Plans an evaluation: every image once, in order within each canvas.

    Args:
      sizes: int [N, 2], heights and widths.
      image_ids: int [N], for messages.
      short_side: to which images are resized.
      max_long_side: the short side becomes smaller where the long side would exceed this.
      canvases: heights and widths.
      batch_size: of all the processes together.
      subset: int [n], positions to evaluate; None: all of them.

    Returns:
      The plan, of epoch 0; the last batch of each canvas is filled up with -1.

    Raises:
      DataError: if an image fits no canvas.
    """
    geometry = eval_geometry(sizes, short_side, max_long_side)
    check_canvases(geometry.size[:, None], canvases, sizes, image_ids)
    chosen = np.arange(len(sizes)) if subset is None else np.asarray(subset)
    canvas_of = assign_canvases(geometry.size[chosen], canvases)
    batches, batch_canvas = [np.empty((0, batch_size), np.int64)], []
    for c in range(len(canvases)):
        members = chosen[canvas_of == c]
        count = -(-len(members) // batch_size)
        rows = np.full(count * batch_size, -1, np.int64)
        rows[: len(members)] = members
        batches.append(rows.reshape(count, batch_size))
        batch_canvas += [c] * count
    indices = np.concatenate(batches)
    return EpochPlan(
        epoch=0,
        canvases=tuple((int(height), int(width)) for height, width in canvases),
        canvas=np.array(batch_canvas, np.int32),
        indices=indices,
        repeats=np.zeros_like(indices),
        geometry=geometry.at(np.maximum(indices, 0)),
    )


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of a batch that a process reads; the batch divides evenly."""
    return slice(
        process_index * batch_size // process_count,
        (process_index + 1) * batch_size // process_count,
    )


def image_generator(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """Returns the generator of an image in an epoch, for `augmentation.augmented`.

    Args:
      seed: not negative.
      epoch: of the plan.
      index: of the image in the data set.
      repeat: how often the image came before in the epoch.
    """
    return np.random.default_rng([seed, _IMAGE_STREAM, epoch, index, *_nonzero(repeat)])


def choose_objects(
    seed: int, epoch: int, index: int, count: int, limit: int, repeat: int = 0
) -> np.ndarray:
    """Chooses the objects to keep of an image that has more objects than slots.

    Args:
      seed: not negative.
      epoch: of the plan.
      index: of the image in the data set.
      count: objects it has.
      limit: objects to keep at most.
      repeat: how often the image came before in the epoch.

    Returns:
      int64 [min(count, limit)], ascending; all of them if they fit, else a random choice that
      depends on the arguments only.
    """
    if count <= limit:
        return np.arange(count)
    rng = np.random.default_rng([seed, _OBJECT_STREAM, epoch, index, *_nonzero(repeat)])
    return np.sort(rng.choice(count, limit, replace=False))


def _nonzero(number: int) -> tuple[int, ...]:
    """Returns (number,), () for 0: images that come once keep the random numbers that they had."""
    return (number,) if number else ()
