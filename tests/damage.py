"""Shared parts of the fuzzing tests: damage to files, and time limits for reading."""

import contextlib
import signal

from hypothesis import settings
from hypothesis import strategies as st


def examples(number: int) -> int:
    """Examples of a test, where the profile in use has others than the 25 of `tests`."""
    return max(number * settings().max_examples // 25, 1)


@contextlib.contextmanager
def within(seconds: float):
    """Fails if the block takes longer than a time limit."""

    def fail(*_):
        raise AssertionError(f"no end after {20 * seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)  # machines may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def one_line(error: BaseException, *words: str) -> None:
    """Checks that a message is one line of readable length which has these words in it."""
    message = str(error)
    assert message and "\n" not in message and len(message) < 10_000, message
    for word in words:
        assert word in message, message


@st.composite
def damaged(draw, whole: bytes, most: int = 4) -> bytes:
    """A file's content after a few accidents: bits flipped, parts lost, doubled or overwritten."""
    data = bytearray(whole)
    accidents = ["flip", "cut", "lose", "zeros", "ones", "double", "noise"]
    # Headers are short and decide much: half of the damage is done there.
    place = st.one_of(st.integers(0, 96), st.integers(0, max(len(whole) - 1, 0)))
    for _ in range(draw(st.integers(1, most))):
        start = min(draw(place), len(data))
        end = min(start + draw(st.sampled_from([1, 2, 4, 8, 64, 4096])), len(data))
        accident = draw(st.sampled_from(accidents))
        if accident == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif accident == "cut":
            del data[start:]
        elif accident == "lose":
            del data[start:end]
        elif accident == "zeros":
            data[start:end] = bytes(end - start)
        elif accident == "ones":
            data[start:end] = b"\xff" * (end - start)
        elif accident == "double":
            data[end:end] = data[start:end]
        elif accident == "noise":
            data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)
