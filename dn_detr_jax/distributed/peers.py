"""Who takes part in a run of several processes, and who has ended: plain TCP beside JAX.

JAX ends a process that waits in vain for others with a stack trace that does not name them, and
notices a process that has ended after a timeout, on some devices never in Python. Before JAX
starts, therefore, every process connects to process 0, at the address where JAX' coordinator will
listen afterwards; whoever is missing, double or started for another number of processes is named.
The connections stay open. The kernel closes them when their process ends, however that happens:
process 0 sees it at once and tells the others who it was and, if there was an error, which.

Messages are lines of JSON. Nothing of JAX is imported here.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dn_detr_jax.errors import DistributedError

_RETRY_SECONDS = 0.2
_SECONDS_FOR_A_LINE = 5.0  # from its first byte to its last
_LONGEST_LINE = 1 << 16
# Firewalls forget connections that are silent for some minutes; a machine without power is noticed.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 5}

VANISHED = "without a word (killed, out of memory, or its machine is gone)"


class _Line:
    """A connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; what can't be sent is lost, as is whoever should have got it."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(_SECONDS_FOR_A_LINE)
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, {} if none came in time, None if the other side has closed."""
        deadline, received = time.monotonic() + seconds, b""
        while not received.endswith(b"\n"):
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                byte = self.connection.recv(1)  # and nothing of the next line
            except TimeoutError:
                return {}
            except OSError:
                return None
            received += byte
            if not byte or len(received) > _LONGEST_LINE:
                return None
        try:
            message = json.loads(received)
        except ValueError:
            return None  # whoever that is, it is none of us
        return message if isinstance(message, dict) else None

    @property
    def is_closed(self) -> bool:
        """Whether the other side has ended."""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()


class Peers:
    """The processes of a run, found by `call_roll`: process 0 knows all, the others know it."""

    def __init__(self, index: int, lines: Mapping[int, _Line]):
        """Takes over the connections, by the index of the process at their other end."""
        self.index, self._lines = index, dict(lines)
        self._left = False

    def watch(self, when_lost: Callable[[str], None]) -> None:
        """Calls `when_lost` once, from a thread, with who has ended before its work was done."""
        if self._lines:
            threading.Thread(target=self._watch, args=(when_lost,), daemon=True).start()

    def _watch(self, when_lost: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    lost = self._lost(key.data)
                    if lost is None:
                        selector.unregister(key.fileobj)
                    elif lost and not self._left:
                        self._tell({"lost": lost})
                        return when_lost(lost)

    def _lost(self, index: int) -> str | None:
        """Who a readable connection says is lost: "" nobody; None: its other end is done."""
        message = self._lines[index].receive(_SECONDS_FOR_A_LINE)
        if message is None:
            return f"process {index} has ended {VANISHED}"
        if message.get("lost"):
            return str(message["lost"])
        if "left" not in message:
            return ""
        return f"process {index} has ended: {message['left']}" if message["left"] else None

    def leave(self, error: str = "") -> None:
        """Says that this process ends: its work is done, or an `error` ended it."""
        if not self._left:
            self._left = True
            self._tell({"left": error})

    def _tell(self, message: Mapping[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)


def call_roll(address: str, count: int, index: int, seconds: float) -> Peers:
    """Waits until all processes of a run are there.

    Args:
      address: "host:port" of process 0.
      count: number of processes.
      index: of this one.
      seconds: how long to wait.

    Returns:
      The connections to the others; the port of process 0 is free again.

    Raises:
      DistributedError: not all came in time, one came twice, or one expects another number; every
        process that was there gets the same error.
    """
    if index == 0:
        return Peers(0, _call(int(address.rpartition(":")[2]), count, seconds))
    return Peers(index, {0: _answer(address, count, index, seconds)})


def _call(port: int, count: int, seconds: float) -> dict[int, _Line]:
    """Process 0's part: connections by index."""
    deadline = time.monotonic() + seconds
    came: dict[int, _Line] = {}
    error = ""
    with _listen(port) as listening:
        while len(came) < count - 1 and not error:
            listening.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                line = _Line(listening.accept()[0])
            except TimeoutError:
                missing = [index for index in range(1, count) if index not in came]
                error = (
                    f"{_named(missing)} of {count} did not come within {seconds:.0f} s to port "
                    f"{port} of process 0; see the output there, or allow more time"
                )
                break
            error = _enter(line, came, count)
    for line in came.values():
        line.send({"error": error})
    if error:
        raise DistributedError(error)
    return came


def _enter(line: _Line, came: dict[int, _Line], count: int) -> str:
    """Takes in a new connection; returns what is wrong with it, if anything."""
    hello = line.receive(_SECONDS_FOR_A_LINE)
    if not hello or not {"process", "processes"} <= hello.keys():
        line.close()  # none of us
        return ""
    index, expected = hello["process"], hello["processes"]
    error = ""
    if expected != count:
        error = f"process {index} was started for {expected} processes, process 0 for {count}"
    elif index in came and not came[index].is_closed:
        error = f"two processes are process {index} of {count}: give each its own --process_id"
    if error:
        line.send({"error": error})
        return error
    came[index] = line
    return ""


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # compiled in, and yet switched off
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
        return socket.create_server(("", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise DistributedError(
            f"process 0 can't listen on port {port} of this machine ({error}): another program, "
            "or another process 0, uses it; choose another port (--coordinator_address, or "
            "JAX_COORDINATOR_PORT where the cluster names the host)"
        ) from error


def _answer(address: str, count: int, index: int, seconds: float) -> _Line:
    """The part of all other processes: the connection to process 0."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    reason = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except (OSError, OverflowError) as error:
            reason = str(error)
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        line = _Line(connection)
        line.send({"process": index, "processes": count})
        verdict = line.receive(max(deadline - time.monotonic(), 1.0) + _SECONDS_FOR_A_LINE)
        if verdict and "error" in verdict:
            if verdict["error"]:
                raise DistributedError(str(verdict["error"]))
            return line
        reason = "it closed the connection" if verdict is None else "it did not answer"
        line.close()
        time.sleep(min(_RETRY_SECONDS, left))
    raise DistributedError(
        f"process 0 can't be reached at {address} within {seconds:.0f} s ({reason}): see its "
        "output, or correct --coordinator_address"
    )


def _named(indices: Sequence[int]) -> str:
    """The processes of a list, the first few by their indices."""
    listed = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process {listed}" if len(indices) == 1 else f"{len(indices)} processes ({listed})"
