"""Writes a detector into one file that runs with jax alone, or as ONNX.

    python -m dn_detr_jax export --workdir runs/coco_r50 --out detector.zip \\
        [--platforms cpu,cuda,tpu] [--canvas 800x1344] [--batch_size 1] [--step best]
    python -m dn_detr_jax export --workdir runs/coco_r50 --out detector.onnx --format onnx

The program is exported by `jax.export` for all platforms at once, on any machine, for one canvas
(padding bucket, the config's first by default) and one batch size, or any with `--dynamic`.
`dn_detr_jax/inference/exported.py` reads the file; its docstring says how images are prepared.
`--weights` stores the kernels in bfloat16 or int8. An ONNX file is run by onnxruntime and compared
with the detector before it is kept.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dn_detr_jax.commands.command_line import (
    define_canvas_flag,
    define_path_flag,
    define_step_flag,
)
from dn_detr_jax.errors import ExportError

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
    flags.DEFINE_bool("dynamic", False, "Any number of images per call; not with --batch_size.")
    flags.DEFINE_enum("weights", "float32", ["float32", "bfloat16", "int8"], "Kernels in the file.")
    flags.DEFINE_enum("format", "jax", ["jax", "onnx"], "Of the file.")
    define_step_flag("best")


def main(argv: Sequence[str]) -> None:
    """Writes the file."""
    del argv
    _check_flags()
    from dn_detr_jax.inference.predictor import read_run

    if FLAGS.format == "onnx":
        from dn_detr_jax.inference.export_onnx import export_onnx, require_packages

        require_packages()
    run = read_run(FLAGS.workdir, FLAGS.step)
    canvas = FLAGS.canvas or tuple(run.config.data.canvases[0])
    batch_size = None if FLAGS.dynamic else FLAGS.batch_size
    if FLAGS.format == "onnx":
        difference = export_onnx(run, FLAGS.out, canvas=canvas, batch_size=batch_size)
        details = f"detections differ by {difference:.1e} in onnxruntime"
    else:
        from dn_detr_jax.inference.export import export

        platforms, weights = FLAGS.platforms, FLAGS.weights
        settings = {"canvas": canvas, "batch_size": batch_size, "weights": weights}
        export(run, FLAGS.out, platforms=platforms, **settings)
        details = f"{weights}, for {', '.join(platforms)}"
    size = Path(FLAGS.out).stat().st_size / 1e6
    images = batch_size or "any number"
    print(
        f"Wrote {FLAGS.out}, {size:.1f} MB: step {run.step}, {images} x {canvas[0]} x {canvas[1]}, "
        f"threshold {run.threshold:.3f}, {details}"
    )


def _check_flags() -> None:
    """Raises for flags that exclude each other."""
    if FLAGS.dynamic and FLAGS["batch_size"].present:
        raise ExportError(f"--batch_size={FLAGS.batch_size}: not with --dynamic")
    for name in ("platforms", "weights"):
        if FLAGS.format == "onnx" and FLAGS[name].present:
            raise ExportError(f"--{name}: of --format=jax alone; ONNX files have float32 weights")
