"""The common part of training and evaluation: checked config, devices, data, model."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from importlib import metadata

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax.config import check_attention, validate
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import Dataset, open_dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.data.plan import steps_per_epoch
from dn_detr_jax.distributed.consistency import check_agreement
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.evaluation.coco_ap import coco_classes
from dn_detr_jax.evaluation.detect import jit_eval_step
from dn_detr_jax.evaluation.labels import relabeled, with_labels_of_run
from dn_detr_jax.models.registry import build_model, num_matching_queries
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training import schedules
from dn_detr_jax.training.compile_cache import use_compile_cache
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.freed_memory import keep_freed_memory

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything before the compiled programs.

    Attributes:
      config: whole configuration, checked.
      mesh: devices.
      model: detector.
      categories: one per label.
      validation: the split to evaluate on; None: nothing is evaluated.
      detect: the jitted `evaluation.detect.eval_step`.
    """

    config: ConfigDict
    mesh: Mesh
    model: nn.Module
    categories: tuple[Category, ...]
    validation: Dataset | None
    detect: Callable

    @property
    def class_names(self) -> list[str]:
        """By label."""
        return [category.name for category in self.categories]


def set_up(
    config: ConfigDict,
    training: Dataset | None = None,
    run_categories: Sequence[Category] | None = None,
    run_name: str = "the run",
) -> Setup:
    """Checks the config against itself, the devices and the data; compiles nothing.

    Args:
      config: whole configuration, validated; is not changed.
      training: the training split; None: there is only an evaluation, and no key of the training
        has to fit. With a training and without `train.eval_every`, no validation split is opened.
      run_categories: of the run to evaluate, by label; the labels of the validation data become
        those of the run, by class name. None: labels stay as they are.
      run_name: names that run in errors.

    Raises:
      ConfigError, DataError: something does not fit.
      CheckpointError: the validation data has other classes than the run.
    """
    warn_of_several_opencvs()
    coco_classes(config.eval.backend)  # raises for one that is not installed
    use_compile_cache(config.compile.cache_dir)
    keep_freed_memory()
    mesh = make_mesh(config.mesh.data)
    accepted_options(config, mesh.local_devices[0])  # raises for one that is refused
    check_attention(config, mesh.devices.flat[0].platform)
    _check_batch_sizes(config, mesh, trains=training is not None)
    validation = None
    if training is None or config.train.eval_every:
        validation = open_dataset(config.data, "validation")
        if run_categories is not None:
            validation = with_labels_of_run(validation, run_categories, run_name)
        if training is not None:
            validation = with_classes_of(training, validation)
    datasets = [dataset for dataset in (training, validation) if dataset is not None]
    check_same_data(datasets)
    config = resolve(config, datasets[0])
    for dataset in datasets:
        check_classes(config, dataset)
    if validation is not None:
        processes = jax.process_index(), jax.process_count()
        eval_batches(validation, config, *processes).close()  # raises for images that don't fit
    model = build_model(config.model, config.compile.attention)
    detect = jit_eval_step(model=model, config=config, mesh=mesh)
    return Setup(config, mesh, model, datasets[0].categories, validation, detect)


def _check_batch_sizes(config: ConfigDict, mesh: Mesh, trains: bool) -> None:
    """Raises ConfigError unless the devices can share the batches."""
    for key in ("train", "eval") if trains else ("eval",):
        if config[key].batch_size % mesh.size:
            raise ConfigError(
                f"{key}.batch_size", config[key].batch_size, f"a multiple of {mesh.size} devices"
            )
    rows = config.train.batch_size // mesh.size
    if trains and rows % config.train.accumulate_steps:
        raise ConfigError(
            "train.accumulate_steps",
            config.train.accumulate_steps,
            f"a divisor of the {rows} images per device: train.batch_size / {mesh.size} devices",
        )


def warn_of_several_opencvs() -> None:
    """Logs a warning if several packages have installed the module cv2 over each other."""
    names = ("opencv-python", "opencv-contrib-python")
    found = []
    for name in (*names, *(f"{name}-headless" for name in names)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    if len(found) > 1:
        logger.warning(
            "%s are installed, and overwrite each other's files: pip uninstall all of them, then "
            "pip install opencv-python-headless",
            ", ".join(found),
        )


def warn_of_too_many_objects(config: ConfigDict, datasets: Sequence[Dataset | None]) -> None:
    """Logs a warning for each split with images of more objects than the model has queries."""
    queries = num_matching_queries(config.model)
    for dataset in filter(None, datasets):
        counts = dataset.annotations.counts
        if counts.max(initial=0) > queries:
            logger.warning(
                "%s, %s: %d images have more objects than the detector has queries, up to %d for "
                "%d: it can't find all of them, so that recall is bounded; raise model.num_queries",
                dataset.name,
                dataset.split,
                (counts > queries).sum(),
                counts.max(),
                queries,
            )


def warn_of_leak(config: ConfigDict) -> None:
    """Logs a warning if denoising queries show the matching queries the objects."""
    if config.dn.groups and not config.dn.mask:
        logger.warning(
            "dn.mask is False: matching queries attend to noised true boxes, which are missing at "
            "inference; training losses mean little, and AP is low"
        )


def resolve(config: ConfigDict, dataset: Dataset) -> ConfigDict:
    """Returns a copy of the config in which zeros are replaced by the counts of the data."""
    config = copy.deepcopy(config)
    if not config.model.num_classes:
        config.model.num_classes = len(dataset.categories)
    if not config.data.max_objects:
        config.data.max_objects = max(int(dataset.annotations.counts.max(initial=0)), 1)
    validate(config)
    return config


def with_classes_of(training: Dataset, validation: Dataset) -> Dataset:
    """Returns the validation split with the labels of the training split.

    Classes without objects may differ: those of the training split count.

    Raises:
      DataError: a class of one split that has objects is not in the other.
    """
    one, other = (
        {category for category in dataset.categories if category.name}
        for dataset in (training, validation)
    )
    different = one ^ other
    used = {
        category
        for dataset, categories in ((training, one), (validation, other))
        for category in categories & different
        if category.id in dataset.annotations.category_ids
    }
    if not different or used:
        check_same_classes(training, validation)
        return validation
    logger.warning(
        "%s: only one of the splits has %s, without objects: the classes are those of the training",
        training.name,
        ", ".join(sorted(f"{category.name!r} ({category.id})" for category in different)),
    )
    label_of = {category: label for label, category in enumerate(training.categories)}
    labels = [label_of.get(category, 0) for category in validation.categories]
    return relabeled(validation, labels, training.categories)


def check_same_classes(training: Dataset, validation: Dataset) -> None:
    """Raises DataError unless a label means the same in both splits."""
    pairs = itertools.zip_longest(training.categories, validation.categories)
    for label, (one, other) in enumerate(pairs):
        if one != other:
            in_training, in_validation = (
                f"{category.name!r} (id {category.id})" if category else "nothing"
                for category in (one, other)
            )
            raise DataError(
                f"label {label} of {training.name!r} is {in_training} in the training data, "
                f"{in_validation} in the validation data: both annotation files must list the "
                "same categories"
            )


def check_same_data(datasets: Sequence[Dataset]) -> None:
    """Raises DistributedError unless all processes have the same annotations."""
    if jax.process_count() > 1:
        check_agreement({f"the data of {d.name}, {d.split}": _fingerprint(d) for d in datasets})


def _fingerprint(dataset: Dataset) -> str:
    """Returns the number of images and a checksum of their annotations."""
    table = dataset.annotations
    checksum = hashlib.sha256()
    for array in (table.image_ids, table.sizes, table.offsets, table.category_ids, table.bboxes):
        checksum.update(array.tobytes())
    return f"{len(table.image_ids)} images, checksum {checksum.hexdigest()[:12]}"


def check_classes(config: ConfigDict, dataset: Dataset) -> None:
    """Raises ConfigError unless the model has as many classes as the data."""
    if config.model.num_classes != len(dataset.categories):
        raise ConfigError(
            "model.num_classes",
            config.model.num_classes,
            f"{len(dataset.categories)}, the classes of {dataset.name!r}",
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All durations of a run, in steps; `eval_every` and `profile` of 0 are none."""

    per_epoch: int
    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    profile: int = 0

    @classmethod
    def of(cls, config: ConfigDict, num_images: int) -> "Plan":
        """Returns the durations of a config for that many training images in an epoch."""
        per_epoch = steps_per_epoch(num_images, config.train.batch_size)

        def steps(name: str, total: int | None = None) -> int:
            key = f"train.{name}"
            if not config.train[name]:
                return 0
            return max(schedules.steps(config.train[name], per_epoch, total, key=key), 1)

        total = steps("duration")
        return cls(
            per_epoch=per_epoch,
            total=total,
            log_every=steps("log_every", total),
            eval_every=steps("eval_every", total),
            checkpoint_every=steps("checkpoint_every", total),
            profile=steps("profile", total),
        )
