"""Connecting processes, each a thread here; missing, duplicate, wrong or lost ones are named."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dn_detr_jax.distributed.peers import (
    Peers,
    connect,
)
from dn_detr_jax.errors import DistributedError


def free_port():
    with socket.create_server(("", 0)) as listening:
        return listening.getsockname()[1]


def meet(processes, seconds=10.0):
    """Connects each (count, index) to the same run; returns its `Peers` or its error."""
    address = f"localhost:{free_port()}"

    def answer(process):
        try:
            return connect(address, *process, seconds)
        except DistributedError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(answer, processes))


def test_all_are_there_and_the_port_is_free_again():
    """Catches a coordinator of JAX that can't listen at the port of the first connections."""
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(connect, f"127.0.0.1:{port}", 3, i, 10.0) for i in (2, 1, 0)]
        peers = [call.result() for call in calls]
    assert [p.index for p in peers] == [2, 1, 0] and all(isinstance(p, Peers) for p in peers)
    with socket.create_server(("", port)):  # while the connections are open
        pass


def test_who_is_missing_is_named_everywhere():
    """Catches an error that does not name the missing one of 64 machines."""
    started = time.monotonic()
    errors = meet([(5, 0), (5, 2), (5, 4)], seconds=1.0)
    assert time.monotonic() - started < 5
    assert len(set(errors)) == 1
    assert "2 processes (1, 3) of 5 did not connect within 1 s" in errors[0]


def test_one_that_is_there_twice_is_named():
    errors = meet([(3, 0), (3, 1), (3, 1)])
    assert {str(error).split(":")[0] for error in errors} == {"two processes are process 1 of 3"}


def test_another_number_of_processes_is_named():
    errors = meet([(2, 0), (3, 1)])
    assert set(errors) == {"process 1 was started for 3 processes, process 0 for 2"}


def test_an_unused_address_ends_in_bounded_time():
    started = time.monotonic()
    with pytest.raises(
        DistributedError, match=r"can't be reached at localhost:\d+ within 1 s \(.+\)"
    ):
        connect(f"localhost:{free_port()}", 2, 1, 1.0)
    with pytest.raises(DistributedError, match=r"can't be reached at nobody\.invalid:1234"):
        connect("nobody.invalid:1234", 2, 1, 1.0)
    assert time.monotonic() - started < 10


def test_a_port_in_use_is_said():
    with (
        socket.create_server(("", 0)) as listening,
        pytest.raises(DistributedError, match=r"can't listen on port .* choose another port"),
    ):
        connect(f"localhost:{listening.getsockname()[1]}", 2, 0, 1.0)


def test_strangers_at_the_port_are_ignored():
    """Catches a port scanner that ends a run, or takes a process's place."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, f"localhost:{port}", 2, 0, 10.0)
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"process": 1}\n', b""):
            while True:
                try:
                    stranger = socket.create_connection(("localhost", port), timeout=5)
                    break
                except OSError:
                    time.sleep(0.02)
            with stranger:
                stranger.sendall(line)
        assert pool.submit(connect, f"localhost:{port}", 2, 1, 10.0).result().index == 1
        first.result()


class _News:
    """Returns the report of a process's `watch`, and its time."""

    def __init__(self, peers):
        self.text, self._came = None, threading.Event()
        peers.watch(self)

    def __call__(self, text):
        self.text = text
        self._came.set()

    def wait(self, seconds=5.0):
        self._came.wait(seconds)
        return self.text


@pytest.mark.parametrize("lost", [0, 2])
def test_all_learn_at_once_who_has_ended_without_a_word(lost):
    """Covers killed processes, whose connections the kernel closes, the coordinator included."""
    peers = meet([(3, 0), (3, 1), (3, 2)])
    news = {p.index: _News(p) for p in peers if p.index != lost}
    for connection in peers[lost]._connections.values():
        connection.close()
    for told in news.values():
        assert told.wait().startswith(f"process {lost} has ended unexpectedly")


def test_all_learn_the_error_of_one():
    peers = meet([(3, 0), (3, 1), (3, 2)])
    news = [_News(p) for p in peers]
    peers[1].leave("image 17 can't be read")
    assert news[0].wait() == news[2].wait() == "process 1 has ended: image 17 can't be read"


def test_those_that_have_done_their_work_are_not_missed():
    """Catches a run that fails at its very end, for any order in which the processes leave."""
    for order in ((0, 1, 2), (2, 1, 0)):
        peers = meet([(3, 0), (3, 1), (3, 2)])
        news = [_News(p) for p in peers]
        for index in order:
            peers[index].leave()
        for index in order:
            for connection in peers[index]._connections.values():
                connection.connection.shutdown(socket.SHUT_RDWR)
        assert [told.wait(0.2) for told in news] == [None] * 3
