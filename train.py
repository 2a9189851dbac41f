"""Trains or evaluates a detector.

    python train.py --config configs/digits.py --workdir runs/digits
    python train.py --config configs/digits.py --workdir runs/digits --eval_only

Any value of the config can be overridden, for example `--config.dn.groups=0`.

On several machines, or with several processes on one, every process runs the same command. Under
`srun` and `mpirun`, on TPU pods and in Kubernetes jobs nothing is added to it:

    srun --ntasks=16 --ntasks-per-node=8 python train.py --config ... --workdir ...
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd ... && python train.py ..."

Elsewhere, for example in two shells, each says which process it is:

    python train.py ... --coordinator_address=localhost:8476 --num_processes=2 --process_id=0
    python train.py ... --coordinator_address=localhost:8476 --num_processes=2 --process_id=1

docs/clusters.md has the details.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dn_detr_jax.commands.command_line import (
    define_step_flag,
    leave_on_sigterm,
    log_to_terminal,
    run_main,
)
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.distributed import launch

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
flags.DEFINE_string("workdir", None, "For checkpoints, metrics and pictures; continued if it is.")
flags.DEFINE_bool("eval_only", False, "Evaluate a checkpoint of the work directory.")
define_step_flag("best", "With --eval_only: best, latest or a number of steps.")
flags.mark_flags_as_required(["config", "workdir"])
launch.define_flags()


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say."""
    del argv
    if not FLAGS.eval_only:
        leave_on_sigterm()  # until the training begins, and when it has ended
    validate(FLAGS.config)
    membership = launch.find_membership(
        FLAGS.distributed,
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        FLAGS.start_timeout,
    )
    if membership is None or membership.index == 0:
        log_to_terminal()
    else:
        log_to_terminal(f"process {membership.index}: ", logging.WARNING)
    with launch.working_together(membership, FLAGS.start_timeout, FLAGS.heartbeat_timeout):
        from dn_detr_jax.distributed.consistency import check_agreement
        from dn_detr_jax.training import loop, report

        check_agreement({"--eval_only": FLAGS.eval_only, "--step": FLAGS.step})
        workdir = Path(FLAGS.workdir)
        if FLAGS.eval_only:
            report.evaluate(FLAGS.config, workdir, FLAGS.step)
        else:
            loop.train(FLAGS.config, workdir)


if __name__ == "__main__":
    run_main(main)
