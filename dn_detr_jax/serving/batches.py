"""Micro-batches: images of requests that arrive together are detected in one call."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dn_detr_jax.inference.exported import ExportedDetector

Row = dict[str, np.ndarray]


class Busy(Exception):  # noqa: N818, a state of the server
    """As many images wait as may; the request can be made again later."""


@dataclasses.dataclass
class _Waiting:
    image: np.ndarray
    size: np.ndarray
    found: asyncio.Future[Row]


class Batches:
    """Detects objects in images that several requests hand over, several images at a time.

    One thread calls the detector. While it does, the next images gather; there is no timer, so that
    an image that comes alone does not wait for others.
    """

    def __init__(self, detector: ExportedDetector, most_waiting: int):
        """Begins nothing yet.

        Args:
          detector: a call takes up to its `batch_size` images.
          most_waiting: images that may wait for a call.
        """
        self._detector = detector
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(most_waiting)
        self._thread = ThreadPoolExecutor(1, "detector")

    @property
    def waiting(self) -> int:
        """Images that wait for a call of the detector."""
        return self._queue.qsize()

    async def detect(self, image: np.ndarray, size: np.ndarray) -> Row:
        """Detects the objects in an image.

        Args:
          image, size: of `ExportedDetector.prepare`.

        Returns:
          What the detector returns, of one row.

        Raises:
          Busy: too many images wait.
        """
        found: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait(_Waiting(image, size, found))
        except asyncio.QueueFull:
            raise Busy from None
        return await found

    async def run(self) -> None:
        """Serves the images until it is cancelled."""
        loop = asyncio.get_running_loop()
        # A program for any number of images is compiled for each number that it is called with.
        together = self._detector.batch_size or 1
        while True:
            rows = [await self._queue.get()]
            while len(rows) < together and not self._queue.empty():
                rows.append(self._queue.get_nowait())
            rows = [row for row in rows if not row.found.done()]  # without requests that gave up
            if not rows:
                continue
            images = np.stack([row.image for row in rows])
            sizes = np.stack([row.size for row in rows])
            try:
                found = await loop.run_in_executor(self._thread, self._detector, images, sizes)
            except Exception as error:  # the requests fail, the server goes on
                for row in rows:
                    if not row.found.done():
                        row.found.set_exception(error)
                continue
            for i, row in enumerate(rows):
                if not row.found.done():
                    row.found.set_result({name: part[i : i + 1] for name, part in found.items()})
