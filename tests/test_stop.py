"""Signals: their effect on a loop, and the end of the program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dn_detr_jax.training.stop import StopRequest

LOOP = """
import sys, time
from dn_detr_jax.training.stop import StopRequest, end_on_signals
if sys.argv[1] == "program":
    end_on_signals()
with StopRequest(**dict(zip(("first", "lost"), sys.argv[3:]))) as stop:
    print("ready", flush=True)
    while not (stop.received and sys.argv[2] == "stops"):
        sorted(range(10**5))
print(stop.name, flush=True)
time.sleep(60)
"""


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_loop_is_asked_to_stop_and_afterwards_a_signal_ends_the_program(number):
    """Catches a signal that is lost between the loop and the rest of the program."""
    with start("program", "stops") as process:
        process.send_signal(number)
        name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
        assert process.stdout.readline() == f"{name}\n"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert stderr.endswith("SIGTERM: ended; nothing was to be saved; the same command continues\n")


@pytest.mark.parametrize(
    "words, first, lost",
    [
        ((), "saving after this step", "the same command continues"),
        (("ending", "it is lost"), "ending", "it is lost"),
    ],
)
def test_a_second_ctrl_c_ends_at_once(words, first, lost):
    """Catches a program that can't be left while its main thread is busy."""
    with start("program", "goes on", *words) as process:
        process.send_signal(signal.SIGINT)
        assert first in process.stderr.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == f"Ctrl-C twice: ended at once; {lost}\n"


def test_ctrl_c_passed_on_by_a_launcher_counts_once():
    """Catches a Ctrl-C that counts twice because `make` or `srun` forward it."""
    with start("program", "goes on") as process:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        time.sleep(0.3)
        assert process.poll() is None
        process.kill()


def test_handlers_of_another_program_are_put_back():
    """Catches a notebook whose Ctrl-C does nothing after a training."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):
        with StopRequest() as stop:
            assert not stop.received
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not stop.received and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.name == "SIGTERM"
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert signal.set_wakeup_fd(-1) == -1
