"""Finds objects in images and videos: detections as JSON, drawn boxes.

    python -m dn_detr_jax predict --workdir runs/coco_r50 street.jpg photographs/ --out found
    python -m dn_detr_jax predict --workdir runs/coco_r50 street.mp4 camera:0 --out found

Arguments are images, folders, whose images are taken, without those of subfolders, videos and
cameras. `found` then holds

- `detections.json`: a list of {"image_id", "category_id", "bbox": [left, top, width, height],
  "score", "file_name"}, as pycocotools' `loadRes` reads it, boxes in pixels of the upright image;
- `images.json`: a list of {"id", "file_name", "width", "height"};
- `pictures/`: the images with boxes; not with `--nodraw`;
- `videos/`: for each video a file of JSON lines with the detections of a frame each, and an MP4
  file with boxes, which `--nodraw` leaves out;
- `labels/` with `--save_txt`: a text file for each image or frame in YOLO's form, "class x y width
  height score", with the numbers of the classes in `data.yaml`;
- `crops/` with `--save_crops`: each object, in a folder of its class.

With `--annotations FILE` image ids and category ids are those of a COCO annotation file, found by
the names of files and classes, and boxes are in pixels of the annotated image. Without it image ids
are the numbers in the file names if all names are different numbers, such as 000000000139.jpg, or
else 0, 1, 2, ...

With `--tile 800` each image is predicted for in overlapping tiles of 800 pixels, and objects that
several tiles see are merged: for objects that are small beside their image.

The lowest score is that with the best F1 in the evaluation of the checkpoint during its training,
or 0.5 without one; `--threshold` names another.

With `--allow_urls` arguments may be URLs of images, http or https, of at most 20 MiB and 50 million
pixels. An answer may take 30 seconds.

A camera is predicted for until Ctrl-C or SIGTERM. They also end the prediction for a video file,
and what was written is kept.

A file that can't be read is named, the others are predicted for, and the exit status is 1. With
`--threshold=0` all detections are written that `config.eval.num_select` of the run allows: those
that the COCO metrics are computed from.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dn_detr_jax.commands.command_line import (
    define_path_flag,
    define_step_flag,
    local_path,
    log_to_terminal,
)
from dn_detr_jax.errors import DataError
from dn_detr_jax.training import stop

if TYPE_CHECKING:
    from dn_detr_jax.data.images import Exif
    from dn_detr_jax.inference.image_files import ImageFile
    from dn_detr_jax.inference.other_outputs import OtherOutputs
    from dn_detr_jax.inference.predictor import Predictor
    from dn_detr_jax.inference.tiles import TiledPredictor
    from dn_detr_jax.inference.urls import Url
    from dn_detr_jax.inference.videos import Video

    Finder = Predictor | TiledPredictor

FLAGS = flags.FLAGS
ARGUMENTS = ("INPUTS...",)
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
    flags.DEFINE_integer("batch_size", 8, "Images or frames at a time.", lower_bound=1)
    flags.DEFINE_integer("tile", 0, "Side of tiles in pixels; 0: whole images.", lower_bound=0)
    flags.DEFINE_float("overlap", 0.2, "Share of a tile's side.", lower_bound=0.0, upper_bound=0.9)
    flags.DEFINE_bool("allow_urls", False, "Fetch images of http and https.")
    flags.DEFINE_bool("draw", True, "Write images and videos with boxes.")
    flags.DEFINE_bool("save_txt", False, "Write text files in YOLO's form.")
    flags.DEFINE_bool("save_crops", False, "Write each object as an image.")
    define_step_flag("best")


def main(argv: Sequence[str]) -> None:
    """Predicts and writes the results."""
    stop.end_on_signals("the results were not written", stop.INTERRUPTED)
    log_to_terminal()
    from dn_detr_jax.inference import image_files
    from dn_detr_jax.inference.other_outputs import OtherOutputs
    from dn_detr_jax.inference.predictor import predictor_of, read_run
    from dn_detr_jax.inference.tiles import TiledPredictor

    videos, images = _split(argv[1:], FLAGS.allow_urls)
    if videos and FLAGS.annotations is not None:
        raise DataError(f"{videos[0]}: --annotations is for images only")
    paths = image_files.find_images(images)
    run = read_run(FLAGS.workdir, FLAGS.step)
    files: list[ImageFile] = []
    if FLAGS.annotations is not None:
        files, run = image_files.match_annotations(paths, FLAGS.annotations, run)
    elif paths:
        files = image_files.number_images(paths)
    # A batch that is not full takes as long as a full one.
    most = FLAGS.batch_size if FLAGS.tile or videos else min(FLAGS.batch_size, len(files))
    predictor = predictor_of(run, batch_size=most)
    finder = TiledPredictor(predictor, FLAGS.tile, FLAGS.overlap) if FLAGS.tile else predictor
    threshold = run.threshold if FLAGS.threshold is None else FLAGS.threshold
    logger.info("detections with scores from %.3f", threshold)
    others = OtherOutputs(Path(FLAGS.out), finder.categories, FLAGS.save_txt, FLAGS.save_crops)
    failures = []
    if files:
        failures += _predict_images(files, finder, threshold, others, run.config.data.exif)
    if videos:
        failures += _predict_videos(videos, finder, threshold, others)
    if failures:
        total = len(files) + len(videos)
        raise DataError(f"{len(failures)} of {total} files can't be read, named above")


def _split(arguments: Iterable[str], allow_urls: bool) -> tuple[list["Video"], list["Path | Url"]]:
    """Divides the arguments into videos and cameras, each once, and other paths and URLs."""
    from dn_detr_jax.inference.urls import Url, is_url
    from dn_detr_jax.inference.videos import camera_of, video_file

    videos: dict[Video, None] = {}
    others: list[Path | Url] = []
    for argument in arguments:
        if is_url(argument):
            if not allow_urls:
                raise DataError(f"{argument}: a URL is fetched only with --allow_urls")
            others.append(Url(argument))
            continue
        video = camera_of(argument)
        if video is None:
            path = local_path(argument)
            video = video_file(path)
        if video is None:
            others.append(path)
        else:
            videos[video] = None
    return list(videos), others


def _predict_images(
    files: Sequence["ImageFile"],
    finder: "Finder",
    threshold: float,
    others: "OtherOutputs",
    exif: "Exif",
) -> list[str]:
    """Predicts for images and returns a message for each that can't be read."""
    from dn_detr_jax.inference.image_files import predict_files

    failures = predict_files(
        finder,
        files,
        Path(FLAGS.out),
        threshold,
        draw=FLAGS.draw,
        others=others,
        exif=exif,
    )
    _log_failures(failures)
    print(f"Wrote the detections of {len(files) - len(failures)} images to {FLAGS.out}")
    return failures


def _predict_videos(
    videos: Sequence["Video"], finder: "Finder", threshold: float, others: "OtherOutputs"
) -> list[str]:
    """Predicts for videos and returns a message for each that can't be read.

    Raises:
      SystemExit: a signal ended the prediction for a video file.
    """
    from dn_detr_jax.inference.video_files import predict_videos

    first = "ending after this frame; once more to end at once"
    with stop.StopRequest(first=first, lost="the video was not finished") as request:
        done = predict_videos(
            finder,
            videos,
            Path(FLAGS.out),
            threshold,
            draw=FLAGS.draw,
            others=others,
            stopped=lambda: request.received,
        )
    _log_failures(done.failures)
    print(f"Wrote the detections of {done.frames} frames to {FLAGS.out}")
    if done.interrupted:
        sys.exit(stop.INTERRUPTED)
    return done.failures


def _log_failures(failures: Sequence[str]) -> None:
    for failure in failures:
        logger.error("can't be read: %s", failure)
