"""Proposes canvases (padding buckets) for a data set.

    python -m dn_detr_jax canvases --config configs/coco_r50.py --config.data.dir=PATH_OF_COCO

A canvas is a compiled shape; the images on it are padded to its size. The command draws the
training augmentation for many images of the data set, reading only their sizes, and searches for
the 1, 2, 4, 8 and 16 canvases (or `--num_canvases`) with the least padding, once with the published
augmentation unchanged and once with the config's `data.snap`. Every training and evaluation image
fits a proposed canvas under every draw. A line to paste into the config is printed for
each proposal, and the number of objects per image, for `data.max_objects`.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags, logging

from dn_detr_jax.commands.command_line import define_config_flag
from dn_detr_jax.config import validate
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    flags.DEFINE_multi_integer(
        "num_canvases", [1, 2, 4, 8, 16], "How many; may be repeated.", lower_bound=1
    )
    flags.DEFINE_integer("images", 20_000, "Augmented images to measure on.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Prints the report."""
    del argv
    stop.end_on_signals("no canvases were proposed", stop.INTERRUPTED)
    config = FLAGS.config
    validate(config)
    from dn_detr_jax.data.canvases import report
    from dn_detr_jax.data.datasets import open_dataset

    logging.set_verbosity(logging.WARNING)  # TFDS logs the folders that it reads
    training = open_dataset(config.data, "train", images="unread").annotations
    validation = training.at(np.array([], np.int64))
    if config.train.eval_every:
        validation = open_dataset(config.data, "validation", images="unread").annotations
    print(report(training, validation, config.data, FLAGS.num_canvases, FLAGS.images))
