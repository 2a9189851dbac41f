"""Predictions for videos and cameras: detections of every frame as JSON lines, annotated videos."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.detections import Detections
from dn_detr_jax.inference.other_outputs import OtherOutputs
from dn_detr_jax.inference.predictor import Predictor
from dn_detr_jax.inference.tiles import TiledPredictor
from dn_detr_jax.inference.videos import Frame, Video, VideoReader, write_video
from dn_detr_jax.visualize.boxes import draw_detections


class Done(NamedTuple):
    """What `predict_videos` has done.

    Attributes:
      frames: number of those that were written.
      failures: a message for each video that can't be read, or not to its end.
      interrupted: whether something was left when it was stopped. A camera has no other end.
    """

    frames: int
    failures: list[str]
    interrupted: bool


def predict_videos(
    predictor: Predictor | TiledPredictor,
    videos: Sequence[Video],
    out: Path,
    threshold: float,
    *,
    draw: bool = True,
    others: OtherOutputs | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Done:
    """Predicts for the frames of videos and writes `videos/NAME.jsonl` and `videos/NAME.mp4`.

    Frames are read as batches need them, and written as their detections are there. A camera is
    predicted for until `stopped`.

    Args:
      predictor: finds the objects.
      videos: files and cameras.
      out: folder for the results; files of the same names are replaced.
      threshold: lowest score.
      draw: whether to write the annotated videos.
      others: writes what else is wanted of each frame.
      stopped: whether to end after the frame that was written last.

    Raises:
      DataError: a video in the place of its own results.
      OSError: `out` can't be written.
    """
    stems = _stems(videos)
    for video, stem in zip(videos, stems, strict=True):
        _check_place(video, out / "videos" / f"{stem}.mp4")
    failures: list[str] = []
    total, interrupted = 0, False
    for video, stem in zip(videos, stems, strict=True):
        if stopped():
            interrupted = True
            break
        try:
            reader = VideoReader(video)
        except DataError as error:
            failures.append(str(error))
            continue
        with reader, _outputs(reader, video, out / "videos" / stem, draw) as write:
            frames = _frames_with_progress(reader, video)
            # Frames have one size, so that batches fill up in the order of the frames.
            for frame, found in predictor.stream(frames, threshold):
                write(frame, found)
                if others is not None:
                    others.write(f"{stem}_{frame.number:06}", frame.pixels, found)
                total += 1
                if stopped():
                    interrupted = isinstance(video.source, Path)
                    break
            else:
                failures += filter(None, [reader.missing()])
    return Done(total, failures, interrupted)


def _frames_with_progress(reader: VideoReader, video: Video) -> Iterator[tuple[Frame, np.ndarray]]:
    total = reader.announced or None
    for frame in tqdm(reader, desc=str(video), total=total, unit=" frames", disable=None):
        yield frame, frame.pixels


@contextlib.contextmanager
def _outputs(
    reader: VideoReader, video: Video, base: Path, draw: bool
) -> Iterator[Callable[[Frame, Detections], None]]:
    """Gives a function that appends a frame to the records, and with `draw` to the MP4 file.

    Args:
      reader: has size and rate of the frames.
      video: for the records.
      base: path of the files without suffix.
      draw: whether to write the MP4 file.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(base.with_name(f"{base.name}.jsonl").open("w"))
        append = None
        if draw:
            target = base.with_name(f"{base.name}.mp4")
            append = stack.enter_context(write_video(target, reader.size, reader.rate))

        def write(frame: Frame, found: Detections) -> None:
            lines.write(json.dumps(_record(video, frame, found)) + "\n")
            lines.flush()
            if append is not None:
                parts = found.boxes, found.labels, found.scores, found.class_names
                append(draw_detections(frame.pixels, *parts))

        yield write


def _record(video: Video, frame: Frame, found: Detections) -> dict:
    """The line of a frame; its detections are as in the answers of the server."""
    height, width = found.size
    detections = [
        {"class": name} | {key: line[key] for key in ("category_id", "score", "bbox")}
        for name, line in zip(found.class_names, found.to_coco(0), strict=True)
    ]
    return {
        "file_name": str(video),
        "frame": frame.number,
        "seconds": round(frame.seconds, 6),
        "width": width,
        "height": height,
        "detections": detections,
    }


def _stems(videos: Sequence[Video]) -> list[str]:
    """A name for the results of each video, with its position if two have the same name."""
    stems = [video.stem for video in videos]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}_{position}" for position, stem in enumerate(stems)]
    return stems


def _check_place(video: Video, target: Path) -> None:
    same = isinstance(video.source, Path) and target.exists() and target.samefile(video.source)
    if same:
        raise DataError(f"{video}: its results would replace it; choose another folder than --out")
