"""Trains a detector, or resumes its training.

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

from dn_detr_jax.commands.command_line import (
    define_config_flag,
    define_path_flag,
    define_step_flag,
    log_to_terminal,
)
from dn_detr_jax.config import validate
from dn_detr_jax.distributed import launch
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    define_path_flag(
        "workdir",
        "Checkpoints, metrics and drawn images; a training that is there is resumed.",
        required=True,
    )
    flags.DEFINE_bool("eval_only", False, "Evaluate a checkpoint of the work directory.")
    define_step_flag("best", "With --eval_only: best, best_raw, latest or a number of steps.")
    launch.define_flags()


def main(argv: Sequence[str]) -> None:
    """Trains, or evaluates with --eval_only."""
    del argv
    run(evaluates=FLAGS.eval_only)


def run(evaluates: bool) -> None:
    """Joins the other processes, if there are any, and trains or evaluates.

    Args:
      evaluates: whether to evaluate the checkpoint of --step.
    """
    if evaluates:
        stop.end_on_signals("the evaluation was not finished", stop.INTERRUPTED)
    else:
        stop.end_on_signals()
    validate(FLAGS.config)
    process = launch.find_process_info(
        FLAGS.distributed,
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        FLAGS.start_timeout,
    )
    if process is None or process.index == 0:
        log_to_terminal()
    else:
        log_to_terminal(f"process {process.index}: ", logging.WARNING)
    with launch.process_group(process, FLAGS.start_timeout, FLAGS.heartbeat_timeout):
        from dn_detr_jax.distributed.consistency import check_agreement
        from dn_detr_jax.training import loop, report

        check_agreement({"--eval_only": evaluates, "--step": FLAGS.step})
        workdir = Path(FLAGS.workdir)
        if evaluates:
            report.evaluate(FLAGS.config, workdir, FLAGS.step)
        else:
            loop.train(FLAGS.config, workdir)
