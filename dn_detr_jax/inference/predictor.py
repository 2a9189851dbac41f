"""Detections in images of any size, from the work directory of a training or an import.

    import dn_detr_jax

    predictor = dn_detr_jax.load("runs/coco_r50")
    found = predictor.predict("street.jpg")
    for box, score, name in zip(found.boxes, found.scores, found.class_names):
        print(name, score, box)

An image is resized as in the evaluation, by the same code, and padded to the smallest canvas
(padding bucket) of the config that it fits. Its boxes are in its own pixels. Each canvas is
compiled once, when the first image needs it.
"""

import collections
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dn_detr_jax.checkpoints.params import read_params
from dn_detr_jax.checkpoints.run_config import read_run_config
from dn_detr_jax.config import base_config, expand_user
from dn_detr_jax.data import transforms
from dn_detr_jax.data.coco_classes import Category, assumed_categories
from dn_detr_jax.data.images import PixelRange, decode_upright
from dn_detr_jax.data.placement import assign_canvases
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.evaluation.detect import detect
from dn_detr_jax.inference.detections import Detections
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.training.compile_cache import compile_and_log, use_compile_cache
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.freed_memory import keep_freed_memory

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray
_SINGLE = (str, os.PathLike, bytes, Image.Image, np.ndarray)
_Key = TypeVar("_Key")

DEFAULT_THRESHOLD = 0.5  # of runs without an evaluation


@dataclasses.dataclass(frozen=True)
class Run:
    """The part of a work directory that a prediction needs.

    Attributes:
      config: whole configuration of the run, with defaults for keys that it lacks.
      categories: one per label; the name of an unused label is empty.
      params: of the checkpoint, on the first device.
      step: of the checkpoint.
      threshold: lowest score of a detection, if nothing else is asked for: that with the best F1 in
        the evaluation of the checkpoint.
    """

    config: ConfigDict
    categories: tuple[Category, ...]
    params: dict
    step: int
    threshold: float = DEFAULT_THRESHOLD


def read_run(workdir: str | os.PathLike, step: str | int = "best") -> Run:
    """Reads config, classes and the parameters of a checkpoint.

    Args:
      workdir: of a training or an import.
      step: "best" (the latest if none has an AP, as after an import), "latest" or a number.

    Raises:
      CheckpointError: no work directory, no such checkpoint, a damaged one, or a config of
        another version.
      ConfigError: a work directory in a bucket.
    """
    workdir = expand_user(os.fspath(workdir), "--workdir")
    if not (workdir / "config.json").is_file():
        what = "it has no config.json" if workdir.is_dir() else "there is no such directory"
        raise CheckpointError(f"{workdir}: no work directory of a run: {what}")
    config, categories = read_run_config(workdir)
    categories = categories or assumed_categories(config.model.num_classes)
    if len(categories) != config.model.num_classes:
        raise CheckpointError(
            f"{workdir / 'config.json'}: {len(categories)} categories for "
            f"{config.model.num_classes} classes of the model"
        )
    shapes = abstract_params(build_model(config.model))
    found = read_params(workdir, shapes, step)
    threshold = DEFAULT_THRESHOLD if found.threshold is None else found.threshold
    return Run(config, categories, found.params, found.step, threshold)


def load(
    workdir: str | os.PathLike, step: str | int = "best", *, batch_size: int = 1
) -> "Predictor":
    """Makes a predictor from a work directory.

    Args:
      workdir: of a training or an import.
      step: "best" (the latest if none has an AP, as after an import), "latest" or a number.
      batch_size: images per call of the compiled program; a batch that is not full takes as long
        as a full one. Above 1 is for many images on an accelerator.

    Raises:
      CheckpointError: no work directory, no such checkpoint, or a damaged one.
    """
    return predictor_of(read_run(workdir, step), batch_size=batch_size)


def predictor_of(run: Run, *, batch_size: int = 1) -> "Predictor":
    """Makes a predictor from a run, with the compile cache of this machine's user.

    Args:
      run: config, classes and parameters.
      batch_size: as for `load`.
    """
    # Compiled programs are code. The cache directory that the run names is not used: others may
    # have made the run.
    use_compile_cache(base_config().compile.cache_dir if run.config.compile.cache_dir else "")
    keep_freed_memory()
    parts = run.config, run.params, run.categories
    return Predictor(*parts, batch_size=batch_size, threshold=run.threshold)


class Predictor:
    """Finds objects in images of any size. Threads may share a predictor."""

    def __init__(
        self,
        config: ConfigDict,
        params: dict,
        categories: Sequence[Category],
        *,
        batch_size: int = 1,
        threshold: float = DEFAULT_THRESHOLD,
    ):
        """Prepares predictions on the first device; compiles nothing yet.

        Args:
          config: whole configuration; `model`, the canvases, the sizes of the evaluation and
            `eval.num_select` are used.
          params: of the model.
          categories: one per label; detections of labels without a name are left out.
          batch_size: images per call of the compiled program.
          threshold: lowest score of a detection, where a call names none.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.categories = tuple(categories)
        self.canvases = tuple((int(h), int(w)) for h, w in config.data.canvases)
        self.batch_size, self.threshold = batch_size, threshold
        self.pixel_range: PixelRange = config.data.pixel_range
        self._config = config
        self._device = jax.local_devices()[0]
        self._params = jax.device_put(params, self._device)
        self._named = np.array([bool(category.name) for category in self.categories])
        self._ids = np.array([category.id for category in self.categories], np.int64)
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._lock = threading.Lock()
        model = build_model(config.model)

        def program(params, images, sizes):
            return detect(params, images, sizes, model=model, config=config)

        self._program = jax.jit(program)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, images: ImageLike, threshold: float | None = None
    ) -> Detections: ...

    @overload
    def predict(
        self, images: Sequence[ImageLike], threshold: float | None = None
    ) -> list[Detections]: ...

    def predict(
        self, images: ImageLike | Sequence[ImageLike], threshold: float | None = None
    ) -> Detections | list[Detections]:
        """Finds the objects in an image, or in several.

        Args:
          images: an image or a sequence of images, of any sizes. An image is the path of a file,
            the bytes of a file, a Pillow image or a uint8 array [H, W, 3] in RGB. Files and Pillow
            images are turned upright by their EXIF orientation, as viewers show them.
          threshold: lowest score, 0 to 1; 0 gives all that `config.eval.num_select` allows. None:
            `self.threshold`, for a run that was evaluated the threshold with the best F1.

        Returns:
          `Detections`, or a list of them for a sequence.

        Raises:
          DataError: something that is no image, or a threshold out of range.
          OSError: a file that can't be read.
        """
        if isinstance(images, _SINGLE):
            return next(found for _, found in self.stream([(None, images)], threshold))
        results = dict(self.stream(enumerate(images), threshold))
        return [results[index] for index in range(len(images))]

    def stream(
        self, images: Iterable[tuple[_Key, ImageLike]], threshold: float | None = None
    ) -> Iterator[tuple[_Key, Detections]]:
        """Finds the objects in any number of images, reading them one by one.

        Args:
          images: pairs of any key and an image, see `predict`.
          threshold: lowest score, as for `predict`.

        Yields:
          Each key with its `Detections`, in the order in which batches fill up.

        Raises:
          DataError, OSError: as `predict`.
        """
        threshold = self.threshold if threshold is None else threshold
        if not 0 <= threshold <= 1:
            raise DataError(f"threshold is {threshold!r}, expected a score from 0 to 1")
        waiting: dict[int, list] = collections.defaultdict(list)
        pending = None  # the device works on a batch while the host prepares the next
        for key, image in images:
            pixels = read_image(image, self.pixel_range)
            canvas, size = choose_canvas(pixels.shape[:2], self.canvases, self._config.data)
            waiting[canvas].append((key, pixels.shape[:2], self._resized(pixels, size)))
            if len(waiting[canvas]) == self.batch_size:
                started = self._start(canvas, waiting.pop(canvas))
                if pending is not None:
                    yield from self._finish(*pending, threshold)
                pending = started
        for canvas, rows in waiting.items():
            started = self._start(canvas, rows)
            if pending is not None:
                yield from self._finish(*pending, threshold)
            pending = started
        if pending is not None:
            yield from self._finish(*pending, threshold)

    def _resized(self, image: np.ndarray, size: np.ndarray) -> np.ndarray:
        geometry = transforms.eval_geometry(np.array([image.shape[:2]]), 1, 1).at(0)
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
        return transforms.apply(image, *none, geometry._replace(size=size))[0]

    def _start(self, canvas: int, rows: list) -> tuple[list, dict[str, jax.Array]]:
        """Sends a batch to the device without waiting for it."""
        height, width = self.canvases[canvas]
        images = np.zeros((self.batch_size, height, width, 3), np.uint8)
        sizes = np.ones((self.batch_size, 2), np.int32)
        for row, (_, _, image) in enumerate(rows):
            sizes[row] = image.shape[:2]
            images[row, : sizes[row, 0], : sizes[row, 1]] = image
        program = self._compiled((height, width))
        batch = jax.device_put((images, sizes), self._device)
        return [row[:2] for row in rows], program(self._params, *batch)

    def _compiled(self, canvas: tuple[int, int]) -> jax.stages.Compiled:
        with self._lock:
            if canvas not in self._programs:
                shape = (self.batch_size, *canvas, 3)
                lowered = self._program.lower(
                    self._params,
                    jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self._sharding),
                    jax.ShapeDtypeStruct((self.batch_size, 2), jnp.int32, sharding=self._sharding),
                )
                # Not the options of the run: another version of XLA may not know them.
                options = accepted_options(base_config(), self._device)
                name = "prediction for {} x {}".format(*canvas)
                self._programs[canvas] = compile_and_log(lowered, name, options)
            return self._programs[canvas]

    @property
    def _sharding(self) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self._device)

    def _finish(self, rows: list, found: dict[str, jax.Array], threshold: float) -> Iterator[tuple]:
        """Waits for a batch, and yields the detections of each of its images."""
        arrays: dict[str, np.ndarray] = jax.device_get(found)
        for row, (key, size) in enumerate(rows):
            scores, labels = arrays["scores"][row], arrays["labels"][row]
            kept = (scores >= threshold) & self._named[labels]
            labels = labels[kept]
            yield (
                key,
                Detections(
                    boxes=_in_pixels(arrays["boxes"][row, kept], size),
                    scores=scores[kept],
                    labels=labels,
                    category_ids=self._ids[labels],
                    class_names=tuple(self.categories[label].name for label in labels),
                    size=size,
                ),
            )


def choose_canvas(
    size: tuple[int, int], canvases: Sequence[tuple[int, int]], data_config: ConfigDict
) -> tuple[int, np.ndarray]:
    """Chooses canvas and size of an image as the evaluation does.

    An image that fits no canvas is reduced.

    Args:
      size: height and width of the image.
      canvases: heights and widths.
      data_config: `config.data`; the sizes of the evaluation are used.

    Returns:
      The position of its canvas, and its height and width there, int32 [2].
    """
    sides = data_config.eval_short_side, data_config.eval_max_long_side
    resized = transforms.resized_sizes(np.array(size), *sides)
    canvas = int(assign_canvases(resized, canvases))
    if canvas >= 0:
        return canvas, resized
    factors = (np.asarray(canvases) / resized).min(-1)
    canvas = int(factors.argmax())
    shrunken = np.floor(resized * factors[canvas] + 1e-6).astype(np.int32)
    return canvas, np.clip(shrunken, 1, canvases[canvas])


def _in_pixels(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Converts normalized cxcywh [n, 4] to float32 xyxy in pixels of an image of `size`."""
    scale = np.array([size[1], size[0]], np.float64)
    center, half = boxes[:, :2] * scale, boxes[:, 2:] * scale / 2
    return np.concatenate([center - half, center + half], axis=1).astype(np.float32)


def read_image(image: ImageLike, pixel_range: PixelRange = ()) -> np.ndarray:
    """Reads an image as uint8 [H, W, 3] in RGB, upright.

    Args:
      image: path of a file, its bytes, a Pillow image, or such an array, which is returned.
      pixel_range: `config.data.pixel_range`.

    Raises:
      DataError: something else, or a file that is no readable image.
      OSError: a file that can't be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"an array {image.dtype}{list(image.shape)} as an image, expected "
                "uint8 [height, width, 3], RGB from 0 to 255"
            )
        if not image.size:
            raise DataError(f"an array {list(image.shape)} as an image: it has no pixels")
        return image
    if isinstance(image, Image.Image | bytes):
        return decode_upright(image, pixel_range)
    if isinstance(image, str | os.PathLike):
        try:
            return decode_upright(Path(image).read_bytes(), pixel_range)
        except DataError as error:
            raise DataError(f"{os.fspath(image)}: {error}") from error
    raise DataError(
        f"{type(image).__name__} as an image, expected a path, the bytes of a file, a Pillow "
        "image or a uint8 array [height, width, 3]"
    )
