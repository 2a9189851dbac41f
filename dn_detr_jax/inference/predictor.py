"""Detections in any pictures, from the work directory of a training or an import.

    import dn_detr_jax

    predictor = dn_detr_jax.load("runs/coco_r50")
    found = predictor.predict("street.jpg", threshold=0.5)
    for box, score, name in zip(found.boxes, found.scores, found.class_names):
        print(name, score, box)

A picture is resized as in the evaluation, by the same code, laid on the smallest canvas of the
config that it fits, and its boxes come back in its own pixels. Each canvas is compiled when the
first picture needs it, and once.
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
from dn_detr_jax.config import base_config
from dn_detr_jax.data import transforms
from dn_detr_jax.data.coco_classes import Category, assumed_categories
from dn_detr_jax.data.images import decode_upright
from dn_detr_jax.data.plan import assign_canvases
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.evaluation.detect import detect
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.training.compile_cache import compile_and_log, use_compile_cache
from dn_detr_jax.training.compile_options import accepted_options

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray
_SINGLE = (str, os.PathLike, bytes, Image.Image, np.ndarray)
_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in a picture, the surest first.

    Attributes:
      boxes: float32 [n, 4], left, top, right, bottom in pixels of the upright picture. They may
        reach beyond its edges.
      scores: float32 [n], 0 to 1, descending.
      labels: int32 [n], outputs of the model.
      category_ids: int64 [n], the classes' ids in the data that the model was trained on.
      class_names: n of them.
      size: height and width of the upright picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    category_ids: np.ndarray
    class_names: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a work directory holds for prediction.

    Attributes:
      config: whole configuration of the run; keys that it did not have yet at their defaults.
      categories: one per label; without a name where a label stands for nothing.
      params: of the checkpoint, on the first device.
      step: of the checkpoint.
    """

    config: ConfigDict
    categories: tuple[Category, ...]
    params: dict
    step: int


def read_run(workdir: str | os.PathLike, step: str | int = "best") -> Run:
    """Reads config, classes and the parameters of a checkpoint.

    Args:
      workdir: of a training or an import.
      step: "best" (the latest where none has an AP, as after an import), "latest" or a number.

    Raises:
      CheckpointError: no work directory, no such checkpoint, a damaged one, or a config that is
        not one of this version.
    """
    workdir = Path(os.path.expanduser(workdir))
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
    return Run(config, categories, found.params, found.step)


def load(
    workdir: str | os.PathLike, step: str | int = "best", *, batch_size: int = 1
) -> "Predictor":
    """A predictor from a work directory.

    Args:
      workdir: of a training or an import.
      step: "best" (the latest where none has an AP, as after an import), "latest" or a number.
      batch_size: pictures per call of the compiled program; a batch that is not full takes as
        long as a full one. Above 1 is for many pictures on an accelerator.

    Raises:
      CheckpointError: no work directory, no such checkpoint, or a damaged one.
    """
    run = read_run(workdir, step)
    # Compiled programs are code: none is loaded from where a work directory says, which others may
    # have made, but from where those of this machine's user are.
    use_compile_cache(base_config().compile.cache_dir if run.config.compile.cache_dir else "")
    return Predictor(run.config, run.params, run.categories, batch_size=batch_size)


class Predictor:
    """Finds objects in pictures of any size. Threads may share one."""

    def __init__(
        self,
        config: ConfigDict,
        params: dict,
        categories: Sequence[Category],
        *,
        batch_size: int = 1,
    ):
        """Prepares predictions on the first device; compiles nothing yet.

        Args:
          config: whole configuration, of which `model`, the canvases, the sizes of the evaluation
            and `eval.num_select` are read.
          params: of the model.
          categories: one per label; detections of labels without a name are left out.
          batch_size: pictures per call of the compiled program.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.categories = tuple(categories)
        self.canvases = tuple((int(h), int(w)) for h, w in config.data.canvases)
        self.batch_size = batch_size
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
    def predict(self, pictures: Picture, threshold: float = 0.5) -> Detections: ...

    @overload
    def predict(self, pictures: Sequence[Picture], threshold: float = 0.5) -> list[Detections]: ...

    def predict(self, pictures, threshold=0.5):
        """Finds the objects in a picture, or in several.

        Args:
          pictures: a picture or a sequence of them, of any sizes. A picture is the path of a file,
            the bytes of one, a Pillow image or a uint8 array [H, W, 3] in RGB. Those that have an
            EXIF orientation are turned upright, as viewers show them.
          threshold: least score, 0 to 1; 0 gives all that `config.eval.num_select` allows.

        Returns:
          `Detections`, or a list of them for a sequence.

        Raises:
          DataError: something that is no picture, or a threshold out of range.
          OSError: a file that can't be read.
        """
        if isinstance(pictures, _SINGLE):
            return next(found for _, found in self.stream([(None, pictures)], threshold))
        results: list[Detections | None] = [None] * len(pictures)
        for index, found in self.stream(enumerate(pictures), threshold):
            results[index] = found
        return results

    def stream(
        self, pictures: Iterable[tuple[_Key, Picture]], threshold: float = 0.5
    ) -> Iterator[tuple[_Key, Detections]]:
        """Finds the objects in any number of pictures, reading them one by one.

        Args:
          pictures: pairs of anything and a picture, see `predict`.
          threshold: least score.

        Yields:
          The first of each pair with the `Detections`, in the order in which batches fill up.

        Raises:
          DataError, OSError: as `predict`.
        """
        if not 0 <= threshold <= 1:
            raise DataError(f"threshold is {threshold!r}, expected a score from 0 to 1")
        waiting: dict[int, list] = collections.defaultdict(list)
        pending = None  # the device works on a batch while the host prepares the next
        for key, picture in pictures:
            image = read_picture(picture)
            canvas, size = self._place(image.shape[:2])
            waiting[canvas].append((key, image.shape[:2], self._resized(image, size)))
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

    def _place(self, size: tuple[int, int]) -> tuple[int, np.ndarray]:
        return place(size, self.canvases, self._config.data)

    def _resized(self, image: np.ndarray, size: np.ndarray) -> np.ndarray:
        geometry = transforms.eval_geometry(np.array([image.shape[:2]]), 1, 1).at(0)
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
        return transforms.apply(image, *none, geometry._replace(size=size))[0]

    def _start(self, canvas: int, rows: list) -> tuple[list, dict[str, jax.Array]]:
        """Sends a batch to the device, and does not wait for it."""
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
                # Not those of the run: another version of XLA may not know them.
                options = accepted_options(base_config(), self._device)
                name = "prediction for {} x {}".format(*canvas)
                self._programs[canvas] = compile_and_log(lowered, name, options)
            return self._programs[canvas]

    @property
    def _sharding(self) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self._device)

    def _finish(self, rows: list, found: dict[str, jax.Array], threshold: float) -> Iterator[tuple]:
        """Waits for a batch, and yields what was found in each of its pictures."""
        found = jax.device_get(found)
        for row, (key, size) in enumerate(rows):
            scores, labels = found["scores"][row], found["labels"][row]
            kept = (scores >= threshold) & self._named[labels]
            labels = labels[kept]
            yield (
                key,
                Detections(
                    boxes=_in_pixels(found["boxes"][row, kept], size),
                    scores=scores[kept],
                    labels=labels,
                    category_ids=self._ids[labels],
                    class_names=tuple(self.categories[label].name for label in labels),
                    size=size,
                ),
            )


def place(
    size: tuple[int, int], canvases: Sequence[tuple[int, int]], data_config: ConfigDict
) -> tuple[int, np.ndarray]:
    """Where a picture goes, as in the evaluation; one that fits nowhere is made smaller.

    Args:
      size: its height and width.
      canvases: heights and widths.
      data_config: `config.data`, of which the sizes of the evaluation are read.

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
    """Normalised cxcywh [n, 4] as float32 xyxy in pixels of a picture of `size`."""
    scale = np.array([size[1], size[0]], np.float64)
    centre, half = boxes[:, :2] * scale, boxes[:, 2:] * scale / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def read_picture(picture: Picture) -> np.ndarray:
    """A picture as uint8 [H, W, 3] in RGB, upright.

    Args:
      picture: path of a file, bytes of one, a Pillow image, or such an array, which is returned.

    Raises:
      DataError: something else, or a file that is no readable picture.
      OSError: a file that can't be read.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f"an array {picture.dtype}{list(picture.shape)} as a picture, expected "
                "uint8 [height, width, 3], RGB from 0 to 255"
            )
        if not picture.size:
            raise DataError(f"an array {list(picture.shape)} as a picture: it has no pixels")
        return picture
    if isinstance(picture, Image.Image | bytes):
        return decode_upright(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return decode_upright(Path(picture).read_bytes())
        except DataError as error:
            raise DataError(f"{os.fspath(picture)}: {error}") from error
    raise DataError(
        f"{type(picture).__name__} as a picture, expected a path, the bytes of a file, a Pillow "
        "image or a uint8 array [height, width, 3]"
    )
