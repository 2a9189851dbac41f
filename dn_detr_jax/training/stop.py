"""SIGTERM and SIGINT (Ctrl-C): save and end, or end at once where nothing is to be saved.

While a training steps (`StopRequest`), the first signal asks it to stop: the loop finishes the step
or the evaluation under way, saves, and ends with exit status 0. At all other times of the program
(`end_on_signals`) there is nothing to save, and a signal ends the process at once. A second Ctrl-C
always ends the process at once, with exit status 130.

Python runs signal handlers in the main thread only, which may be waiting for a compiler or a device
for minutes. Therefore the handlers here do nothing; a thread reads the signals' numbers from
`signal.set_wakeup_fd`. It needs no import of JAX and can start with the program.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
INTERRUPTED = 130  # exit status after a second Ctrl-C: 128 + SIGINT, as shells have it
# A terminal sends Ctrl-C to all processes of a job, and some launchers pass it on once more.
_SAME_SECONDS = 0.1


def end_on_signals(
    what: str = "nothing was to be saved; the same command continues", status: int = 0
) -> None:
    """Makes SIGTERM and SIGINT end this program at once from now on.

    Does nothing outside the main thread, where Python allows no handlers.

    Args:
      what: ends the line on stderr.
      status: exit status.
    """
    global _program
    if _program is None and threading.current_thread() is threading.main_thread():
        _program = _Watcher(what, status)
        _program.start()


class StopRequest:
    """Lets a loop see SIGTERM and SIGINT, between `with` and its end.

    With several processes JAX has a handler of SIGTERM of its own, which makes all of them agree on
    a step; Ctrl-C is passed on to it.

    Attributes:
      name: of the signal, for messages; None until one has come.
      lost: what a second Ctrl-C leaves behind, for its message.
    """

    def __init__(
        self,
        several_processes: bool = False,
        first: str = "saving after this step; once more to end at once without saving",
        lost: str = "the same command continues",
    ):
        """Watches nothing yet.

        Args:
          several_processes: whether JAX has a handler of SIGTERM.
          first: what the first Ctrl-C does, for its message.
          lost: see above.
        """
        self.name: str | None = None
        self.lost = lost
        self._first, self._several = first, several_processes
        self._watcher: _Watcher | None = None

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        self._watcher = _program
        if self._watcher is None and threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT,) if self._several else _NUMBERS
            self._watcher = _Watcher(numbers=numbers)  # of a notebook or another program
            self._watcher.start()
        if self._watcher is not None:
            self._watcher.request = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.request = None
            if self._watcher is not _program:
                self._watcher.stop()

    def receive(self, number: int) -> None:
        """Called with a signal's number, in the watcher's thread."""
        first = self.name is None
        self.name = self.name or _NAMES[signal.Signals(number)]
        if first and number == signal.SIGINT:
            _write(f"Ctrl-C: {self._first}")
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)


class _Watcher(threading.Thread):
    """Reads the numbers of signals as they come, and acts on them.

    Attributes:
      request: of a loop that is to be asked to stop; None: the process ends.
    """

    def __init__(
        self, what: str = "", status: int = 0, numbers: tuple[signal.Signals, ...] = _NUMBERS
    ):
        super().__init__(name="signals", daemon=True)
        self._status = status
        self.request: StopRequest | None = None
        self._what, self._numbers = what, numbers
        self._interrupted_at: float | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # the interpreter writes into it
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    def start(self) -> None:
        super().start()
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            self._previous[number] = signal.signal(number, _do_nothing)

    def stop(self) -> None:
        """Puts the handlers from before back in place, in the main thread."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        self.join()
        self._reader.close()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in self._numbers:
                        self._take(number)

    def _take(self, number: int) -> None:
        request = self.request
        if number == signal.SIGINT:
            now, before = time.monotonic(), self._interrupted_at
            self._interrupted_at = now
            if before is not None and now - before < _SAME_SECONDS:
                return
            if before is not None:
                what = self._what if request is None else request.lost
                _end(f"Ctrl-C twice: ended at once; {what}", INTERRUPTED)
        if request is None:
            _end(f"{_NAMES[signal.Signals(number)]}: ended; {self._what}", self._status)
        else:
            request.receive(number)


_program: _Watcher | None = None  # of `end_on_signals`


def _do_nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _write(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # not through a stream that the main thread may hold


def _end(line: str, status: int) -> None:
    # Not by an exception: the main thread may be in a compiler, and threads would be waited for.
    _write(line)
    os._exit(status)
