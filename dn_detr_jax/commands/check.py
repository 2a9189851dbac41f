"""Checks a data set in the format of COCO, YOLO or Pascal VOC.

    python -m dn_detr_jax check DIR
    python -m dn_detr_jax check DIR --config configs/finetune.py
    python -m dn_detr_jax check DIR --config.data.train.annotations=a.json

An error would stop a training; the exit status is then 1. After a warning a training goes on.
docs/own_data.md has the table of everything that is looked for. Only the headers of the images are
read, of those of 16 bits the pixels; `--decode` reads the pixels of all.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from dn_detr_jax.commands.command_line import define_config_flag, local_path
from dn_detr_jax.config import base_config, validate
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS
ARGUMENTS = ("DIR",)
DEFAULT_CONFIG = __file__  # its get_config


def get_config() -> ConfigDict:
    """Returns the config that applies without `--config`."""
    config = base_config()
    config.data.name = "coco"
    return config


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    flags.DEFINE_bool("decode", False, "Decode every image, which finds damaged ones.")


def main(argv: Sequence[str]) -> None:
    """Checks the directory and prints the report."""
    stop.end_on_signals("the check was not finished", stop.INTERRUPTED)
    config = FLAGS.config
    validate(config)
    if config.data.name != "coco":
        raise ConfigError("data.name", config.data.name, "'coco', the only kind that is checked")
    config.data.dir = os.fspath(local_path(argv[1]))
    from dn_detr_jax.data.check import check
    from dn_detr_jax.data.check_report import report
    from dn_detr_jax.models.registry import num_matching_queries

    num_queries = num_matching_queries(config.model)
    splits = check(config.data, FLAGS.decode, num_queries, bool(config.train.eval_every))
    print(report(splits))
    sys.exit(1 if any(split.findings.errors for split in splits) else 0)
