"""Video files and cameras, read and written frame by frame with OpenCV."""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dn_detr_jax.errors import DataError

# File name suffixes of videos, in lower case. Other files are taken for images.
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip

_UNKNOWN_RATE = 30.0  # frames per second, where neither file nor camera says it
_CODEC = "mp4v"  # MPEG-4 Part 2: the builds of OpenCV on PyPI have no encoder for H.264


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file, or a camera.

    Attributes:
      source: path of the file, or number of the camera.
    """

    source: Path | int

    @property
    def stem(self) -> str:
        """For names of files about it: the file's name without suffix, or `camera_0`."""
        return f"camera_{self.source}" if isinstance(self.source, int) else self.source.stem

    def __str__(self) -> str:
        return f"camera:{self.source}" if isinstance(self.source, int) else str(self.source)


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
      number: from 0.
      seconds: since the first frame: of a file as the file has it, of a camera by the clock.
      pixels: uint8 [H, W, 3] in RGB, upright.
    """

    number: int
    seconds: float
    pixels: np.ndarray


def camera_of(argument: str) -> Video | None:
    """Returns the camera that an argument of the command line names, None if it names none.

    Examples:
      >>> camera_of("camera:1")
      Video(source=1)
    """
    match = re.fullmatch(r"camera:(\d{1,4})", argument, re.ASCII)
    return Video(int(match[1])) if match else None


def video_file(path: Path) -> Video | None:
    """Returns the video that a path names by its suffix, None if it names another file or a folder.

    Raises:
      DataError: the path names a video, and there is no such file.
    """
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        return None
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    return Video(path)


class VideoReader:
    """Reads the frames of a video, one at a time. It is a context manager, which closes the video.

    Attributes:
      rate: frames per second.
      announced: number of frames according to the file; 0 if it does not say, or of a camera.
      size: height and width of the frames.
    """

    def __init__(self, video: Video):
        """Opens the video and reads its first frame.

        Raises:
          DataError: no such camera, no readable video, or one without frames.
        """
        self._video, self._read = video, 0
        with _without_messages():
            if isinstance(video.source, int):
                self._capture = cv2.VideoCapture(video.source)
            else:
                self._capture = cv2.VideoCapture(os.fspath(video.source))
            readable, self._first = self._capture.read()
        if not readable:
            raise DataError(f"{video}: {self._cause()}")
        self.size: tuple[int, int] = (self._first.shape[0], self._first.shape[1])
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else _UNKNOWN_RATE  # nan is none of them
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        known = isinstance(video.source, Path) and math.isfinite(count)
        self.announced = max(0, int(count)) if known else 0

    def _cause(self) -> str:
        if isinstance(self._video.source, int):
            return "there is no such camera, or another program uses it"
        if self._capture.isOpened():
            return "a video without readable frames"
        return "not a video that OpenCV can read, or a damaged one"

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[Frame]:
        """Yields the frames, once."""
        begin, (readable, frame) = time.monotonic(), (True, self._first)
        del self._first
        while readable:
            if isinstance(self._video.source, int):
                seconds = time.monotonic() - begin
            else:
                seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if self._read and not 0 < seconds < math.inf:  # the file has no times
                    seconds = self._read / self.rate
            yield Frame(self._read, seconds, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            self._read += 1
            readable, frame = self._capture.read()

    def missing(self) -> str:
        """Says what is missing after the last frame that `__iter__` yielded; empty for nothing.

        Containers may estimate their number of frames, so that up to a second may be missing.
        """
        if isinstance(self._video.source, int):
            return f"{self._video}: sends no more frames, after {self._read}"
        if self.announced - self._read > self.rate:
            counts = f"{self._read} of its {self.announced} frames"
            return f"{self._video}: a damaged video: {counts} can be read"
        return ""


@contextlib.contextmanager
def write_video(
    path: Path, size: tuple[int, int], rate: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that appends a frame, uint8 [H, W, 3] in RGB, to an MP4 file.

    The file is complete when the block ends, also by an exception. An odd last row or column of the
    frames is left out, as the codec needs it.

    Args:
      path: of the file, whose suffix is `.mp4`; its folder is made if it is missing.
      size: height and width of the frames.
      rate: frames per second.

    Raises:
      OSError: the file can't be written, or not by OpenCV.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("wb").close()  # its error says why, OpenCV's does not
    code = cv2.VideoWriter.fourcc(*_CODEC)
    with _without_messages():
        writer = cv2.VideoWriter(os.fspath(path), code, rate, size[::-1])
    if not writer.isOpened():
        raise OSError(f"{path}: OpenCV can't write videos ({_CODEC} in MP4), or the disk is full")
    written = 0

    def write(pixels: np.ndarray) -> None:
        nonlocal written
        with _without_messages():
            if not writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)):
                raise OSError(f"{path}: frame {written} can't be written")
        written += 1

    try:
        yield write
    finally:
        with _without_messages():
            writer.release()
    # OpenCV reports no error of the disk.
    with _without_messages():
        found = int(cv2.VideoCapture(os.fspath(path)).get(cv2.CAP_PROP_FRAME_COUNT))
    if written and found != written:
        raise OSError(f"{path}: {found} of {written} frames were written; is the disk full?")


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Keeps OpenCV from writing to stderr."""
    # FFmpeg writes on its own. OpenCV reads this once, when it opens the first video.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
