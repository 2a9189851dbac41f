"""`jax.jit` for tests: programs run only a few times, so they are compiled quickly."""

import functools
import os

import jax

from dn_detr_jax.training.compile_options import known_options

# All tests run on the CPU, even if libtpu is installed without a TPU.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"

# Tests, and the processes that they start, neither use nor fill the user's compiled programs.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# These reduce the compile time to a half or a third; numbers stay within float tolerance. jaxlib
# 0.11 removed the second option.
OPTIONS = known_options(
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}, jax.devices()[0]
)

# The same for processes that tests start, and for `config.compile.options`.
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
CONFIG = tuple(f"cpu:{name}={str(value).lower()}" for name, value in OPTIONS.items())

fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
