"""Batches for training and evaluation, read and augmented ahead of time by grain.

A batch is a dict of arrays of host memory, with B rows (this process's part), a canvas of H x W
pixels and M slots for objects:

  image     uint8   [B, H, W, 3], RGB, zero right of and below each image
  size      int32   [B, 2], height and width of each image on the canvas
  labels    int32   [B, M]
  boxes     float32 [B, M, 4], center x, center y, width, height as shares of the image's size
  valid     bool    [B, M], whether a slot holds an object; those that do come first
  image_id  int32   [B], -1 for a row without an image, of size (1, 1), which holds no object
  dropped_objects   int, objects of these images that there were no slots for
  bad_images        int, rows whose image could not be read, with `data.skip_bad`
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dn_detr_jax.data import images, transforms
from dn_detr_jax.data.augmentation import augmented, load_hook
from dn_detr_jax.data.datasets import Dataset
from dn_detr_jax.data.mosaic import Scene
from dn_detr_jax.data.plan import (
    BatchSpec,
    EpochPlan,
    TrainPlan,
    choose_objects,
    image_generator,
    plan_eval,
    process_rows,
    steps_per_epoch,
    stop_epoch,
)
from dn_detr_jax.data.records import Example
from dn_detr_jax.data.sampling import images_per_epoch, sampling_of
from dn_detr_jax.errors import DataError

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

# Several threads or processes read images; OpenCV's own threads would slow them down.
cv2.setNumThreads(1)


def train_batches(
    dataset: Dataset,
    config: ConfigDict,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch, None, None]:
    """Yields this process's part of the training batches of some steps.

    Args:
      dataset: the training split.
      config: whole configuration; `seed`, `data` and `train.batch_size` are used.
      start_step: the first step, counted from 0 over all the epochs.
      num_steps: how many batches to yield.
      process_index: which process this is.
      process_count: how many there are; each yields its rows of the same batches.

    Returns:
      A generator; `close()` ends reading ahead, and so does leaving it.

    Raises:
      DataError: at once, for impossible values of the configuration; while iterating, for an
        image that can't be read.
    """
    batch_size = config.train.batch_size
    _check(dataset, config, "train.batch_size", batch_size, process_count)
    plan = train_plan(dataset, config)
    rows = process_rows(batch_size, process_index, process_count)
    maker = _BatchMaker(dataset, plan, rows, config)
    return _prefetched(maker, range(start_step, start_step + num_steps), config.data)


def eval_batches(
    dataset: Dataset,
    config: ConfigDict,
    process_index: int = 0,
    process_count: int = 1,
    subset: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """Yields this process's part of the evaluation batches, equally many in every process.

    Args:
      dataset: the split to evaluate.
      config: whole configuration; `seed`, `data` and `eval.batch_size` are used.
      process_index: which process this is.
      process_count: how many there are.
      subset: int [n], positions in the data set to evaluate; None: all of them.

    Returns:
      A generator, as `train_batches`; without augmentation, each image once.

    Raises:
      DataError: as `train_batches`.
    """
    _check(dataset, config, "eval.batch_size", config.eval.batch_size, process_count)
    plan = eval_plan(dataset, config, subset)
    rows = process_rows(config.eval.batch_size, process_index, process_count)
    maker = _BatchMaker(dataset, plan, rows, config)
    return _prefetched(maker, range(len(plan)), config.data)


def images_in_epoch(dataset: Dataset, config: ConfigDict) -> int:
    """Returns the number of images in an epoch of a training split, repetitions included."""
    sampling = sampling_of(dataset.annotations, dataset.parts, config.data)
    return images_per_epoch(len(dataset), sampling)


def train_plan(dataset: Dataset, config: ConfigDict) -> TrainPlan:
    """Returns the plan that `train_batches` follows.

    Raises:
      DataError: see `TrainPlan`.
      ConfigError: `data.augment.hook` can't be imported.
    """
    load_hook(config.data.augment.hook)
    sampling = sampling_of(dataset.annotations, dataset.parts, config.data)
    num_images = images_per_epoch(len(dataset.sizes), sampling)
    batches = steps_per_epoch(num_images, config.train.batch_size)
    return TrainPlan(
        seed=config.seed,
        sizes=dataset.sizes,
        image_ids=dataset.image_ids,
        augment=config.data.augment,
        canvases=config.data.canvases,
        batch_size=config.train.batch_size,
        snap=config.data.snap,
        stop_epoch=stop_epoch(config, batches),
        sampling=sampling,
    )


def eval_plan(dataset: Dataset, config: ConfigDict, subset: np.ndarray | None = None) -> EpochPlan:
    """The plan that `eval_batches` follows; its length is the number of batches."""
    return plan_eval(
        sizes=dataset.sizes,
        image_ids=dataset.image_ids,
        short_side=config.data.eval_short_side,
        max_long_side=config.data.eval_max_long_side,
        canvases=config.data.canvases,
        batch_size=config.eval.batch_size,
        subset=subset,
    )


def _check(
    dataset: Dataset, config: ConfigDict, key: str, batch_size: int, process_count: int
) -> None:
    """Raises a DataError for the first impossible value."""
    data, augment = config.data, config.data.augment

    def require(good: bool, name: str, value: Any, wanted: str) -> None:
        if not good:
            raise DataError(f"{name} is {value!r}, expected {wanted}")

    require(config.seed >= 0, "seed", config.seed, "a number that is not negative")
    divides = batch_size > 0 and batch_size % process_count == 0
    require(divides, key, batch_size, f"a positive multiple of the {process_count} processes")
    canvases = data.canvases
    good = len(canvases) > 0 and all(len(c) == 2 and min(c) > 0 for c in canvases)
    require(good, "data.canvases", canvases, "pairs of (height, width) in pixels")
    for name in ("max_objects", "threads", "prefetch"):
        require(data[name] > 0, f"data.{name}", data[name], "a positive number")
    require(data.workers >= 0, "data.workers", data.workers, "0 or more processes")
    for name in ("flip", "crop"):
        good = 0.0 <= augment[name] <= 1.0
        require(good, f"data.augment.{name}", augment[name], "a probability from 0 to 1")
    for name in ("short_sides", "crop_resize"):
        good = len(augment[name]) > 0 and min(augment[name]) > 0
        require(good, f"data.augment.{name}", augment[name], "at least one size in pixels")
    low_high = augment.crop_size
    good = len(low_high) == 2 and 0 < low_high[0] <= low_high[1]
    require(good, "data.augment.crop_size", low_high, "the least and the largest side in pixels")
    largest = np.iinfo(np.int32).max
    good = dataset.image_ids.size > 0 and dataset.image_ids.min() >= 0
    good = good and dataset.image_ids.max() <= largest
    require(good, f"image ids of {dataset.name}", dataset.image_ids, f"ids from 0 to {largest}")
    if data.workers > 0:
        _check_shared_memory(data, batch_size // process_count)


def _check_shared_memory(data_config: ConfigDict, rows: int) -> None:
    """Raises a DataError if the batches of the workers would not fit where they are handed over.

    Writing beyond its end kills a worker by a signal, without a message. Containers have 64 MB of
    it unless told otherwise.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # no Linux
        return
    # Of each worker four batches are on their way at most, and one is the caller's.
    batch = rows * 3 * max(height * width for height, width in data_config.canvases)
    needed = (4 * data_config.workers + 1) * batch
    if needed > free:
        raise DataError(
            f"data.workers is {data_config.workers}: their batches need {needed / 1e6:.0f} MB of "
            f"/dev/shm, {free / 1e6:.0f} MB are free; enlarge it (docker run --shm-size), or use "
            f"fewer workers, or 0: threads need none"
        )


class _BatchMaker:
    """Makes the batch of a position of a plan."""

    def __init__(
        self,
        dataset: Dataset,
        plan: TrainPlan | EpochPlan,
        rows: slice,
        config: ConfigDict,
    ):
        self._source, self._annotations = dataset.source, dataset.annotations
        self._name = f"{dataset.name}, {dataset.split}"
        self._folder = dataset.folder
        self._num_labels = len(dataset.categories)
        self._plan, self._rows = plan, rows
        self._max_objects, self._seed = config.data.max_objects, config.seed
        self._skip_bad = config.data.skip_bad
        self._train_plan = plan if isinstance(plan, TrainPlan) else None  # which augments
        self._exif, self._pixel_range = config.data.exif, config.data.pixel_range
        self._warned: set[int] = set()

    def __call__(self, position: int) -> Batch:
        spec = self._plan.batch(position)
        rows = range(self._rows.start, self._rows.stop)
        batch = _empty_batch(len(rows), spec.canvas, self._max_objects)
        for row, row_of_all in enumerate(rows):
            if spec.indices[row_of_all] >= 0:
                self._fill(batch, row, spec, row_of_all)
        return batch

    def _fill(self, batch: Batch, row: int, spec: BatchSpec, row_of_all: int) -> None:
        """Fills a row with the image that the plan has at a row of the global batch.

        With `data.skip_bad`, an unreadable image is replaced by the next readable image of the
        global batch, so that batches do not depend on the number of processes. In an evaluation
        the row stays empty.
        """
        size = len(spec.indices)
        for step in range(size):
            source_row = (row_of_all + step) % size
            index = int(spec.indices[source_row])
            try:
                example, image = self._read(index)
            except DataError as error:
                if not self._skip_bad:
                    raise
                self._warn(index, error)
                batch["bad_images"] += step == 0
                if self._train_plan is None:
                    return
                continue
            geometry, repeat = spec.geometry.at(source_row), int(spec.repeats[source_row])
            place = spec.epoch, index, repeat
            return self._put(batch, row, place, example, image, geometry)
        raise DataError(f"{self._name}: none of the {size} images of a batch can be read")

    def _read(self, index: int) -> tuple[Example, np.ndarray]:
        """Returns the example at a position and its pixels; a DataError names the image."""
        table = self._annotations
        try:
            example = self._source[index]
            size = tuple(table.sizes[index].tolist())
            image = images.decode(example.image, size, self._exif, self._pixel_range)
            self._check_objects(example)
            return example, image
        except (OSError, ValueError, RuntimeError) as error:  # of the disk, or of a damaged file
            where = "" if self._folder is None else f", read from {self._folder}"
            raise DataError(
                f"image {table.image_ids[index]} of the data set {self._name} "
                f"({table.file_names[index] or f'position {index}'}{where}) can't be read: {error}"
            ) from error

    def _others(self, scene: Scene, rng: np.random.Generator) -> list[Scene]:
        """Reads three random images for a mosaic with `scene`.

        With `data.skip_bad`, `scene` itself replaces unreadable images.
        """
        scenes = []
        for index in rng.integers(len(self._annotations.sizes), size=3).tolist():
            try:
                example, image = self._read(index)
                scenes.append(Scene(image, example.boxes, example.labels))
            except DataError as error:
                if not self._skip_bad:
                    raise
                self._warn(index, error)
                scenes.append(scene)
        return scenes

    def _check_labels(self, labels: np.ndarray, hook: str) -> None:
        """Raises DataError for labels of the hook that are no classes."""
        if hook and len(labels) and not 0 <= labels.min() <= labels.max() < self._num_labels:
            raise DataError(
                f"data.augment.hook {hook} returned labels {labels.tolist()}, expected 0 to "
                f"{self._num_labels - 1}"
            )

    def _check_objects(self, example: Example) -> None:
        """Raises ValueError for boxes and labels that would give a wrong loss without an error."""
        labels = example.labels
        if not np.isfinite(example.boxes).all():
            raise ValueError("it has a box that is not finite")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self._num_labels:
            raise ValueError(f"its labels are {labels.tolist()}, not 0 to {self._num_labels - 1}")

    def _warn(self, index: int, error: DataError) -> None:
        if index not in self._warned:
            self._warned.add(index)
            logger.warning("%s; data.skip_bad: going on without it", error)

    def _put(
        self,
        batch: Batch,
        row: int,
        place: tuple[int, int, int],
        example: Example,
        image: np.ndarray,
        geometry: transforms.Geometry,
    ) -> None:
        """Fills a row; `place` is epoch, position in the data set and repetition of the image."""
        epoch, index, repeat = place
        scene, canvas = Scene(image, example.boxes, example.labels), batch["image"][row]
        if self._train_plan is None:
            image, boxes, labels = transforms.apply(*scene, geometry, canvas)
        else:
            rng = image_generator(self._seed, epoch, index, repeat)
            augment = self._train_plan.augment(epoch)
            others = functools.partial(self._others, scene)
            image, boxes, labels = augmented(rng, scene, geometry, augment, others, canvas)
            self._check_labels(labels, augment.hook)
        kept = choose_objects(self._seed, epoch, index, len(boxes), self._max_objects, repeat)
        batch["dropped_objects"] += len(boxes) - len(kept)
        height, width = image.shape[:2]
        batch["size"][row] = height, width
        batch["labels"][row, : len(kept)] = labels[kept]
        batch["boxes"][row, : len(kept)] = _normalized_cxcywh(boxes[kept], height, width)
        batch["valid"][row, : len(kept)] = True
        batch["image_id"][row] = example.image_id


def _empty_batch(rows: int, canvas: tuple[int, int], max_objects: int) -> Batch:
    return {
        "image": np.zeros((rows, *canvas, 3), np.uint8),
        "size": np.ones((rows, 2), np.int32),
        "labels": np.zeros((rows, max_objects), np.int32),
        "boxes": np.zeros((rows, max_objects, 4), np.float32),
        "valid": np.zeros((rows, max_objects), np.bool_),
        "image_id": np.full(rows, -1, np.int32),
        "dropped_objects": 0,
        "bad_images": 0,
    }


def _normalized_cxcywh(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Converts corners in pixels [n, 4] to centers and sizes as shares of the image."""
    corners = boxes / np.array([width, height, width, height], np.float32)
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def _prefetched(
    maker: Callable[[int], Batch], positions: range, data_config: ConfigDict
) -> Generator[Batch, None, None]:
    """Yields the batches of positions in order, made ahead by threads or processes."""
    threads, prefetch = data_config.threads, data_config.prefetch
    batches = grain.MapDataset.range(positions.start, positions.stop).map(maker)
    batches = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    )
    if data_config.workers > 0:
        if not flags.FLAGS.is_parsed():  # grain reads flags, also in programs that have none
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=data_config.workers)
        batches = batches.mp_prefetch(options, worker_init_fn=_live_with_parent)
    with contextlib.closing(iter(batches)) as iterator:
        yield from iterator


def _live_with_parent(*_: int) -> None:
    """Makes a worker process end with its parent, and not before.

    A killed parent can't end its workers: without this they and their shared memory would stay.
    SIGTERM and Ctrl-C reach all processes of a job at once; the parent needs its workers to finish.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
