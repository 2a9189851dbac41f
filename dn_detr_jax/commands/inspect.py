"""Writes a report on a run as one HTML file, or compares two.

    python -m dn_detr_jax inspect --workdir runs/digits
    python -m dn_detr_jax inspect --compare runs/digits runs/plain --out comparison.html

It evaluates a checkpoint on the validation split of the run and shows curves, figures of every
class, the confusion matrix, thresholds, calibration and the images with the most errors; for some
images what every decoder layer predicts and where it looks, and the denoising queries; and which
query takes which object in the checkpoints that the run has kept. The file needs no network and
no other file. Nothing in the work directory changes but the report, `report.html` there without
`--out`.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dn_detr_jax.commands.command_line import (
    define_path_flag,
    define_step_flag,
    local_path,
    log_to_terminal,
)
from dn_detr_jax.errors import DataError
from dn_detr_jax.training import stop

FLAGS = flags.FLAGS
ARGUMENTS = ("[WORKDIR]",)


def define_flags() -> None:
    """Defines the flags of this command."""
    define_path_flag("workdir", "Of a training or an import.")
    define_path_flag("compare", "Of a run to compare with that of the argument WORKDIR.")
    define_path_flag("out", "HTML file, by default report.html or comparison.html of the run.")
    define_path_flag("data_dir", "Of the data, if it is not where the run's config says.")
    define_step_flag("best", "best, latest or a number of steps.")
    flags.DEFINE_list("images", [], "Ids of images whose decoding is shown; by default two.")
    flags.DEFINE_integer("hardest", 8, "Images with the most errors.", lower_bound=1)
    flags.DEFINE_integer(
        "stability_images", 100, "Images to compare kept checkpoints on.", lower_bound=1
    )


def main(argv: Sequence[str]) -> None:
    """Writes the report."""
    workdirs, image_ids = _workdirs(argv[1:]), _image_ids()
    stop.end_on_signals("the report was not written", stop.INTERRUPTED)
    log_to_terminal()
    from dn_detr_jax.inspection.report import Options, write_report

    default = "report.html" if len(workdirs) == 1 else "comparison.html"
    out = Path(FLAGS.out) if FLAGS.out else workdirs[0] / default
    options = Options(FLAGS.step, FLAGS.hardest, image_ids, FLAGS.stability_images, FLAGS.data_dir)
    write_report(workdirs, out, options)
    print(f"report      {out}")


def _workdirs(arguments: Sequence[str]) -> list[Path]:
    """The run of --workdir, or the two of --compare."""
    if (FLAGS.workdir is None) == (FLAGS.compare is None):
        raise DataError("expected --workdir DIR, or --compare DIR WORKDIR for two runs")
    if FLAGS.compare is None:
        if arguments:
            raise DataError(f"unexpected argument {arguments[0]!r}: --compare takes two runs")
        return [Path(FLAGS.workdir)]
    if not arguments:
        raise DataError("--compare: the second run is missing: --compare DIR WORKDIR")
    return [Path(FLAGS.compare), local_path(arguments[0])]


def _image_ids() -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in FLAGS.images)
    except ValueError:
        raise DataError(
            f"--images={','.join(FLAGS.images)}: expected ids, such as 85,417"
        ) from None
