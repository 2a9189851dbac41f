"""Evaluates a checkpoint: COCO table, images with detections.

    python -m dn_detr_jax eval --config configs/digits.py --workdir runs/digits [--step latest]

`python train.py --eval_only` is the same.
"""

from collections.abc import Sequence

from dn_detr_jax.commands import train
from dn_detr_jax.commands.command_line import (
    define_config_flag,
    define_path_flag,
    define_step_flag,
)
from dn_detr_jax.distributed import launch


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    define_path_flag("workdir", "Of a training or an import.", required=True)
    define_step_flag("best")
    launch.define_flags()


def main(argv: Sequence[str]) -> None:
    """Runs the evaluation."""
    del argv
    train.run(evaluates=True)
