"""`jax.jit` for tests: programs run only a few times, so they are compiled quickly."""

import atexit
import functools
import os
import shutil
import tempfile

import jax

# All tests run on the CPU, even if libtpu is installed without a TPU.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"

# Tests, and the processes that they start, share compiled programs, and not with the user.
CACHE = "TESTS_COMPILATION_CACHE"
if CACHE not in os.environ:  # set in the processes of pytest-xdist, which inherit it
    os.environ[CACHE] = tempfile.mkdtemp(prefix="tests-compilation-cache-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
for name, value in {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": os.environ[CACHE],
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

# These reduce the compile time to a half or a third; numbers stay within float tolerance. jaxlib
# 0.11 removed the second option.
OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

# The same for operations outside of `fast_jit`, for processes that tests start, and for
# `config.compile.options`.
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
if XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
CONFIG = tuple(f"cpu:{name}={str(value).lower()}" for name, value in OPTIONS.items())

fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
