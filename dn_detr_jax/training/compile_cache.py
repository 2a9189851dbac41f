"""Compiled programs kept on disk for the next run, and a log of compile times.

The cache is JAX's persistent compilation cache. The training step calls the host for its matching,
and JAX keeps such programs from version 0.11 on (https://github.com/jax-ml/jax/pull/38405): with
0.10 the step is compiled in every process, the other programs of a run, which do not call the host,
are found. An entry that can't be read, such as one that was being written when its process was
killed, is a warning of JAX, and the program is compiled.
"""

import contextlib
import hashlib
import logging
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from dn_detr_jax.config import expand_user
from dn_detr_jax.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

# JAX keeps programs that took a second. What a start compiles before its first step takes less in
# part, and each costs time again.
_KEPT_FROM = 0.1  # seconds
_JAX_KEEPS_FROM = 1.0


def use_compile_cache(cache_dir: str) -> None:
    """Starts to store compiled programs on disk, and to load those that are there.

    Programs that took 0.1 s to compile are stored, unless the user has set another limit by
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.

    Args:
      cache_dir: `config.compile.cache_dir`; empty: no cache. A folder that can't be written, or a
        missing home directory, is a warning. A folder that JAX has from elsewhere, such as from
        JAX_COMPILATION_CACHE_DIR, stays in use.
    """
    minimum = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, minimum) == _JAX_KEEPS_FROM:
        jax.config.update(minimum, _KEPT_FROM)
    # jax adds its options at run time: type checkers do not know them.
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    used_already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not cache_dir or not enabled or used_already:
        return
    try:
        folder = expand_user(cache_dir, "compile.cache_dir") / _host()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (ConfigError, OSError) as error:
        reason = ConfigError("compile.cache_dir", cache_dir, one_line(error))
        if isinstance(error, ConfigError):
            reason = error
        logger.warning("compiled programs are not kept: %s", reason)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _host() -> str:
    """Returns a name for machines with the same processor features.

    Programs for CPUs use all available features, and several machines may share a home directory.
    """
    features = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features.update(values.split())
    described = " ".join([platform.machine(), *sorted(features)])
    return hashlib.sha256(described.encode()).hexdigest()[:12]


class _CacheHits(threading.local):
    """Counts the programs that each thread loads from the cache."""

    count = 0

    def __call__(self, event: str, **_: Any) -> None:
        """Called by JAX, in the thread that compiles."""
        self.count += event == "/jax/compilation_cache/cache_hits"


_cache_hits = _CacheHits()
jax.monitoring.register_event_listener(_cache_hits)


def compile_and_log(
    lowered: jax.stages.Lowered,
    name: str,
    options: dict[str, Any] | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> jax.stages.Compiled:
    """Compiles a program, and logs the time and whether it came from the cache.

    Args:
      lowered: program.
      name: for the log, such as "train for 800 x 1344".
      options: of the compiler.
      wanted: asked when it is compiled; False: nothing is logged.
    """
    start, hits = time.monotonic(), _cache_hits.count
    program = lowered.compile(options)
    source = ", from the cache" if _cache_hits.count > hits else ""
    if wanted():
        logger.info("compiled %s in %.1f s%s", name, time.monotonic() - start, source)
    return program
