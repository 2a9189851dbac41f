"""Finds the objects in images: detections as JSON, drawn boxes.

    python -m dn_detr_jax predict --workdir runs/coco_r50 street.jpg photographs/ --out found

Arguments are images and folders, whose images are taken, without those of subfolders. `found` then
holds

- `detections.json`: a list of {"image_id", "category_id", "bbox": [left, top, width, height],
  "score", "file_name"}, as pycocotools' `loadRes` reads it, boxes in pixels of the upright image;
- `images.json`: a list of {"id", "file_name", "width", "height"};
- `pictures/`: the images with boxes; not with `--nodraw`;
- `labels/` with `--save_txt`: a text file for each image in YOLO's form, "class x y width height
  score", with the numbers of the classes in `data.yaml`;
- `crops/` with `--save_crops`: each object, in a folder of its class.

With `--annotations FILE` image ids and category ids are those of a COCO annotation file, found by
the names of files and classes, and boxes are in pixels of the annotated image. Without it image ids
are the numbers in the file names if all names are different numbers, such as 000000000139.jpg, or
else 0, 1, 2, ...

With `--tile 800` each image is predicted for in overlapping tiles of 800 pixels, and objects that
several tiles see are merged: for objects that are small beside their image.

The lowest score is that with the best F1 in the evaluation of the checkpoint during its training,
or 0.5 without one; `--threshold` names another.

A file that can't be read is named, the others are predicted for, and the exit status is 1. With
`--threshold=0` all detections are written that `config.eval.num_select` of the run allows: those
that the COCO metrics are computed from.
"""

import logging
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
ARGUMENTS = ("IMAGES...",)
logger = logging.getLogger(__name__)


def define_flags() -> None:
    """Defines the flags of this command."""
    define_path_flag("workdir", "Of a training or an import.", required=True)
    define_path_flag(
        "out", "Folder for the results; files of the same names are replaced.", required=True
    )
    define_path_flag("annotations", "COCO file with the ids of images and classes.")
    flags.DEFINE_float(
        "threshold",
        None,
        "Lowest score; by default that with the best F1 in the evaluation of the checkpoint, 0.5 "
        "without one.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer("batch_size", 8, "Images at a time.", lower_bound=1)
    flags.DEFINE_integer("tile", 0, "Side of tiles in pixels; 0: whole images.", lower_bound=0)
    flags.DEFINE_float("overlap", 0.2, "Share of a tile's side.", lower_bound=0.0, upper_bound=0.9)
    flags.DEFINE_bool("draw", True, "Write images with boxes.")
    flags.DEFINE_bool("save_txt", False, "Write text files in YOLO's form.")
    flags.DEFINE_bool("save_crops", False, "Write each object as an image.")
    define_step_flag("best")


def main(argv: Sequence[str]) -> None:
    """Predicts and writes the results."""
    stop.end_on_signals("the results were not written", stop.INTERRUPTED)
    log_to_terminal()
    from dn_detr_jax.inference import image_files
    from dn_detr_jax.inference.predictor import predictor_of, read_run
    from dn_detr_jax.inference.tiles import TiledPredictor

    paths = image_files.find_images(map(local_path, argv[1:]))
    run = read_run(FLAGS.workdir, FLAGS.step)
    if FLAGS.annotations is None:
        files = image_files.number_images(paths)
    else:
        files, run = image_files.match_annotations(paths, FLAGS.annotations, run)
    # A batch that is not full takes as long as a full one.
    most = FLAGS.batch_size if FLAGS.tile else min(FLAGS.batch_size, len(files))
    predictor = predictor_of(run, batch_size=most)
    threshold = run.threshold if FLAGS.threshold is None else FLAGS.threshold
    logger.info("detections with scores from %.3f", threshold)
    failures = image_files.predict_files(
        TiledPredictor(predictor, FLAGS.tile, FLAGS.overlap) if FLAGS.tile else predictor,
        files,
        Path(FLAGS.out),
        threshold,
        draw=FLAGS.draw,
        save_txt=FLAGS.save_txt,
        save_crops=FLAGS.save_crops,
        exif=run.config.data.exif,
    )
    for failure in failures:
        logger.error("can't be read: %s", failure)
    print(f"Wrote the detections of {len(files) - len(failures)} images to {FLAGS.out}")
    if failures:
        raise DataError(f"{len(failures)} of {len(files)} files can't be read, named above")
