"""Trains or evaluates a detector.

    python train.py --config configs/digits.py --workdir runs/digits
    python train.py --config configs/digits.py --workdir runs/digits --eval_only

Any value of the config can be overridden, for example `--config.dn.groups=0`.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dn_detr_jax.command_line import (
    define_step_flag,
    leave_on_sigterm,
    log_to_terminal,
    run_main,
)
from dn_detr_jax.config import ConfigError
from dn_detr_jax.data.errors import DataError
from dn_detr_jax.evaluation.errors import EvaluationError
from dn_detr_jax.training.errors import TrainingError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
flags.DEFINE_string("workdir", None, "For checkpoints, metrics and pictures; continued if it is.")
flags.DEFINE_bool("eval_only", False, "Evaluate a checkpoint of the work directory.")
define_step_flag("best", "With --eval_only: best, latest or a number of steps.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say."""
    del argv
    if not FLAGS.eval_only:
        leave_on_sigterm()  # until the training begins, and when it has ended
    from dn_detr_jax.training import loop, report

    log_to_terminal()
    workdir = Path(FLAGS.workdir)
    if FLAGS.eval_only:
        report.evaluate(FLAGS.config, workdir, FLAGS.step)
    else:
        loop.train(FLAGS.config, workdir)


if __name__ == "__main__":
    run_main(main, (ConfigError, DataError, EvaluationError, TrainingError, OSError))
