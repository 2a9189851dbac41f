"""Names missing and lost processes of a run, by TCP connections beside those of JAX.

JAX reports missing processes with a stack trace that does not name them, and lost processes after a
timeout, on some devices never in Python. Therefore every process connects to process 0 before JAX
starts, at the address of JAX's later coordinator. Missing processes, duplicates and processes
started for another number are named. The connections stay open. The kernel closes them when their
process ends in any way: process 0 notices it at once and tells the others the index and the error.

Messages are lines of JSON. This module does not import JAX.
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
_LINE_SECONDS = 5.0  # from its first byte to its last
_LONGEST_line = 1 << 16
# Firewalls drop connections after some silent minutes; this also notices machines without power.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 5}

VANISHED = "unexpectedly (killed, out of memory, or its machine has failed)"


class _Connection:
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
        """Sends a message; errors are ignored, since the receiver is lost then."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(_LINE_SECONDS)
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next message, {} after the timeout, None if the other side has closed."""
        deadline, received = time.monotonic() + seconds, b""
        while not received.endswith(b"\n"):
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                byte = self.connection.recv(1)  # never a byte of the next line
            except TimeoutError:
                return {}
            except OSError:
                return None
            received += byte
            if not byte or len(received) > _LONGEST_line:
                return None
        try:
            message = json.loads(received)
        except ValueError:
            return None  # not a process of this run
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
    """The connections of a run: of process 0 to all others, of each other one to process 0."""

    def __init__(self, index: int, connections: Mapping[int, _Connection]):
        """Takes over the connections, by the index of the process at the other end."""
        self.index, self._connections = index, dict(connections)
        self._left = False

    def watch(self, when_lost: Callable[[str], None]) -> None:
        """Calls `when_lost` once, from a thread, with a text about the first lost process."""
        if self._connections:
            threading.Thread(target=self._watch, args=(when_lost,), daemon=True).start()

    def _watch(self, when_lost: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for index, peer in self._connections.items():
                selector.register(peer, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    lost = self._lost(key.data)
                    if lost is None:
                        selector.unregister(key.fileobj)
                    elif lost and not self._left:
                        self._tell({"lost": lost})
                        return when_lost(lost)

    def _lost(self, index: int) -> str | None:
        """Reads which process is lost: "" for none; None if the other end has done its work."""
        message = self._connections[index].receive(_LINE_SECONDS)
        if message is None:
            return f"process {index} has ended {VANISHED}"
        if message.get("lost"):
            return str(message["lost"])
        if "left" not in message:
            return ""
        return f"process {index} has ended: {message['left']}" if message["left"] else None

    def leave(self, error: str = "") -> None:
        """Tells the others that this process ends, after its work or with an `error`."""
        if not self._left:
            self._left = True
            self._tell({"left": error})

    def _tell(self, message: Mapping[str, Any]) -> None:
        for peer in self._connections.values():
            peer.send(message)


def connect(address: str, count: int, index: int, seconds: float) -> Peers:
    """Connects all processes of a run.

    Args:
      address: "host:port" of process 0.
      count: number of processes.
      index: of this process.
      seconds: timeout.

    Returns:
      The connections; the port of process 0 is free again.

    Raises:
      DistributedError: not all connected in time, an index is used twice, or a process expects
        another number; all connected processes raise the same error.
    """
    if index == 0:
        return Peers(0, _accept_all(int(address.rpartition(":")[2]), count, seconds))
    return Peers(index, {0: _connect_to_first(address, count, index, seconds)})


def _accept_all(port: int, count: int, seconds: float) -> dict[int, _Connection]:
    """Accepts the connections as process 0; returns them by index."""
    deadline = time.monotonic() + seconds
    connected: dict[int, _Connection] = {}
    error = ""
    with _listen(port) as listening:
        while len(connected) < count - 1 and not error:
            listening.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                peer = _Connection(listening.accept()[0])
            except TimeoutError:
                missing = [index for index in range(1, count) if index not in connected]
                error = (
                    f"{_listed(missing)} of {count} did not connect within {seconds:.0f} s to port "
                    f"{port} of process 0; see their output, or raise --start_timeout"
                )
                break
            error = _add(peer, connected, count)
    for peer in connected.values():
        peer.send({"error": error})
    if error:
        raise DistributedError(error)
    return connected


def _add(peer: _Connection, connected: dict[int, _Connection], count: int) -> str:
    """Adds a new connection; returns its error, or ""."""
    greeting = peer.receive(_LINE_SECONDS)
    if not greeting or not {"process", "processes"} <= greeting.keys():
        peer.close()  # not a process of this run
        return ""
    index, expected = greeting["process"], greeting["processes"]
    error = ""
    if expected != count:
        error = f"process {index} was started for {expected} processes, process 0 for {count}"
    elif index in connected and not connected[index].is_closed:
        error = f"two processes are process {index} of {count}: give each its own --process_id"
    if error:
        peer.send({"error": error})
        return error
    connected[index] = peer
    return ""


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # compiled in, but disabled
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


def _connect_to_first(address: str, count: int, index: int, seconds: float) -> _Connection:
    """Connects to process 0 as one of the other processes."""
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
        peer = _Connection(connection)
        peer.send({"process": index, "processes": count})
        verdict = peer.receive(max(deadline - time.monotonic(), 1.0) + _LINE_SECONDS)
        if verdict and "error" in verdict:
            if verdict["error"]:
                raise DistributedError(str(verdict["error"]))
            return peer
        reason = "it closed the connection" if verdict is None else "it did not answer"
        peer.close()
        time.sleep(min(_RETRY_SECONDS, left))
    raise DistributedError(
        f"process 0 can't be reached at {address} within {seconds:.0f} s ({reason}): see its "
        "output, or correct --coordinator_address"
    )


def _listed(indices: Sequence[int]) -> str:
    """Formats a list of processes with the first few indices."""
    listed = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process {listed}" if len(indices) == 1 else f"{len(indices)} processes ({listed})"
