"""The lock of a work directory: one process at a time writes into it.

The lock is a POSIX record lock (`fcntl.lockf`) on the file `lock` of the work directory. The kernel
releases it when the process ends, however it ends; child processes do not inherit it. It works
between the machines of an NFS mount (version 4, or 3 with a lock manager) and of other network file
systems with POSIX locks. Any process may read beside it.

The file holds one line: host, process id and time of the process that took the lock last. The file
stays, because removing it could take the lock from a process that has just opened it.
"""

import errno
import os
import socket
import time
from logging import getLogger
from pathlib import Path

from dn_detr_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module has no optional type

logger = getLogger(__name__)

_FILE = "lock"
_HELD: set[str] = set()  # of this process: a second lock of its own would succeed


class WorkdirLock:
    """The right to write into a work directory, from construction to `release`."""

    def __init__(self, workdir: Path):
        """Takes the lock.

        Args:
          workdir: an existing folder.

        Raises:
          CheckpointError: another process has the lock; the message names it.
          OSError: the lock's file can't be written.
        """
        self._path = Path(workdir) / _FILE
        self._key = os.path.realpath(self._path)
        self._descriptor: int | None = None
        # Closing any descriptor of the file would release this process's lock on it.
        if self._key in _HELD:
            raise _refusal(workdir, f"this process ({os.getpid()})")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, self._path)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise _refusal(workdir, holder or "another process") from None
        self._descriptor = descriptor
        _HELD.add(self._key)
        _write_holder(descriptor)

    def release(self) -> None:
        """Releases the lock; may be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _HELD.discard(self._key)
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Locks without waiting; BlockingIOError if another process has the lock."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no record locks on this system")
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror, str(path)) from None
        logger.warning(
            "%s: this file system has no locks (%s): a second training in the same work directory "
            "would not be refused",
            path,
            error.strerror,
        )


def _write_holder(descriptor: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder, 0)
    except OSError as error:  # a full disk: the lock itself needs no space
        logger.warning("%s: the lock's owner can't be written: %s", _FILE, error.strerror)


def _refusal(workdir: Path, holder: str) -> CheckpointError:
    return CheckpointError(
        f"{workdir}: in use by {holder}: a work directory takes one training at a time; wait for "
        "it, end it, or choose another --workdir"
    )
