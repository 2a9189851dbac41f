"""Memory that programs on CPUs free stays with the process."""

import ctypes
import functools
import os

import jax

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Who sets one of these has other plans for the allocator.
_SETTINGS = "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep what is freed, if programs of this process run on CPUs.

    XLA allocates the arrays of a program in one block each time that it runs, and glibc gets such a
    block from the system and returns it: at 256 x 320, a step of `coco_r50` waits for 77,000 pages
    that the system sets to zero (docs/performance.md). Afterwards the process holds the most that
    it ever needed until it ends. Other C libraries, and environments that set malloc themselves
    (`MALLOC_MMAP_MAX_` and the like, `GLIBC_TUNABLES`), stay as they are.

    Returns:
      Whether malloc was set. The first call decides for the process.
    """
    chosen = any(os.environ.get(name) for name in _SETTINGS)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if jax.default_backend() != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    # -1 is the largest size.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
