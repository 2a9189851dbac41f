"""Compiles the training step for absent TPUs and GPUs; reports its cost.

    python -m dn_detr_jax preflight --config configs/coco_r50.py --topology v5e:4x4 \\
        --batch_per_device 2 --config.model.dtype=bfloat16

No accelerator is needed: jax compiles ahead of time for a topology, with the TPU compiler that
`pip install "jax[tpu]"` brings (libtpu, Linux on x86-64). GPUs, as in `--topology h100:8`, need
jax's plugin for CUDA; the message of the command says which packages are enough. `--topology local`
compiles for the devices of this machine instead. Options of the config apply.

Printed, and written as JSON with `--json FILE`: parameters, bytes per device against the memory
that the compiler may use, operations, bytes accessed, collectives, and the least time of a step on
such chips. If a step does not fit in memory, options that make it fit are compiled and reported
(not with `--nosuggest`), and the exit status is 1.

`--whole_run` reads the training data of `data.dir`, compiles the step for every canvas that the
first epoch uses, and weights them by their steps: the most images per second, and the least hours
that the training takes.
"""

import sys
from collections.abc import Sequence

from absl import flags

from dn_detr_jax.commands.command_line import (
    define_canvas_flag,
    define_config_flag,
    define_path_flag,
)
from dn_detr_jax.errors import PreflightError
from dn_detr_jax.files import write_json_atomically
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    define_config_flag()
    flags.DEFINE_string(
        "topology",
        None,
        "What to compile for: v5e:4x4 (16 chips), v6e:8x8, v4:2x2x4, v5p:4x4x4, h100:8, h200:1, or "
        "local for the devices of this machine.",
        required=True,
    )
    flags.DEFINE_integer(
        "batch_per_device", None, "Images; by default train.batch_size / devices.", lower_bound=1
    )
    define_canvas_flag("the largest of the config")
    flags.DEFINE_bool("whole_run", False, "Compile all canvases; the time of the whole training.")
    define_path_flag("json", "File to write everything to.")
    flags.DEFINE_bool("suggest", True, "If it does not fit, try what would, and report it.")


def main(argv: Sequence[str]) -> None:
    """Prints the report; exit status 1 if the step does not fit."""
    del argv
    stop.end_on_signals("the preflight was not finished", stop.INTERRUPTED)
    if FLAGS.whole_run and FLAGS.canvas:
        raise PreflightError("--canvas: --whole_run compiles all canvases of the config")
    import jax

    from dn_detr_jax.preflight.preflight import run_preflight
    from dn_detr_jax.preflight.report import print_suggestions, run_table, table
    from dn_detr_jax.preflight.whole_run import preflight_run

    if FLAGS.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # leaves a TPU of this machine to others
    if FLAGS.whole_run:
        run = preflight_run(FLAGS.config, FLAGS.topology, FLAGS.batch_per_device)
        result, record, text = run.worst, run.record(), run_table(run)
    else:
        result = run_preflight(FLAGS.config, FLAGS.topology, FLAGS.batch_per_device, FLAGS.canvas)
        record, text = result.record(), table(result)
    print(text, flush=True)
    if not result.fits and FLAGS.suggest:
        record["suggestions"] = [
            {"options": o.proposal.text(), "bytes_needed": o.needed, "fits": o.fits}
            for o in print_suggestions(result)
        ]
    if FLAGS.json:
        write_json_atomically(FLAGS.json, record, indent=2)
    if not result.fits:
        sys.exit(1)
