"""Writes a detector into one file that runs with jax alone.

    python -m dn_detr_jax export --workdir runs/coco_r50 --out detector.zip \\
        [--platforms cpu,cuda,tpu] [--canvas 800x1344] [--batch_size 1] [--step best]

The program is exported by `jax.export` for all platforms at once, on any machine, for one canvas
(padding bucket, the config's first by default) and one batch size.
`dn_detr_jax/inference/exported.py` reads the file; its docstring says how images are prepared.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dn_detr_jax.commands.command_line import (
    define_canvas_flag,
    define_path_flag,
    define_step_flag,
)

FLAGS = flags.FLAGS
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def define_flags() -> None:
    """Defines the flags of this command."""
    define_path_flag("workdir", "Of a training or an import.", required=True)
    define_path_flag("out", "File to write.", required=True)
    flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], f"Of {', '.join(PLATFORMS)}.")
    flags.register_validator(
        "platforms",
        lambda names: bool(names) and set(names) <= set(PLATFORMS),
        f"expected some of {', '.join(PLATFORMS)}",
    )
    define_canvas_flag("the config's first")
    flags.DEFINE_integer("batch_size", 1, "Images per call.", lower_bound=1)
    define_step_flag("best")


def main(argv: Sequence[str]) -> None:
    """Writes the file."""
    del argv
    from dn_detr_jax.inference.export import export
    from dn_detr_jax.inference.predictor import read_run

    run = read_run(FLAGS.workdir, FLAGS.step)
    canvas = FLAGS.canvas or tuple(run.config.data.canvases[0])
    platforms, batch_size = FLAGS.platforms, FLAGS.batch_size
    export(run, FLAGS.out, platforms=platforms, canvas=canvas, batch_size=batch_size)
    size = Path(FLAGS.out).stat().st_size / 1e6
    print(
        f"Wrote {FLAGS.out}, {size:.1f} MB: step {run.step}, {batch_size} x {canvas[0]} x "
        f"{canvas[1]}, for {', '.join(platforms)}"
    )
