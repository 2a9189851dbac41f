"""TensorBoard's files of a run, in the folder `tensorboard/` of its work directory."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from dn_detr_jax.files import named

_FLUSH_SECONDS = 30.0  # between writes to the disk


class TensorBoard:
    """Writes scalars, images and texts into a file of its own.

    tensorboardX's `SummaryWriter` writes in a thread, which a full disk ends; adding to its queue
    then blocks for ever. Here the caller writes, so that the error reaches the caller.
    """

    _count = itertools.count()

    def __init__(self, workdir: Path, start_step: int):
        """Opens a new file.

        Args:
          workdir: of the run; the folder is made if necessary.
          start_step: TensorBoard hides later steps of earlier files.
        """
        folder = workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(self._count)}"
        self._path = folder / f"events.out.tfevents.{unique}"
        with named(self._path):
            self._file = RecordWriter(str(self._path))
        self._flushed = time.monotonic()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=start_step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Adds numbers by name."""
        for name, value in values.items():
            self._add(Event(wall_time=now, step=step, summary=summary.scalar(name, value)))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds images, uint8 [H, W, 3], by name, and writes them to the disk."""
        for name, image in images.items():
            value = summary.image(name, np.asarray(image), dataformats="HWC")
            self._add(Event(wall_time=time.time(), step=step, summary=value))
        self._flush()

    def text(self, name: str, text: str) -> None:
        """Adds a text; line breaks stay."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        self._add(Event(wall_time=time.time(), summary=summary.text(name, indented)))

    def close(self) -> None:
        """Writes the rest and closes the file."""
        with named(self._path):
            self._file.close()

    def _add(self, event: Any) -> None:
        with named(self._path):
            self._file.write(event.SerializeToString())
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        with named(self._path):
            self._file.flush()
        self._flushed = time.monotonic()
