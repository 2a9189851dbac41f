"""`jax.jit` for tests: a program runs a few times, so compiling it is what costs."""

import functools
import os

import jax

from dn_detr_jax.training.compile_options import known_options

# Everything is tested on the CPU, also where libtpu is installed without a TPU.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"

# Tests, and the processes that they start, neither use nor fill the user's compiled programs.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# Half to a third of the time to compile; numbers stay within float tolerance. The second option
# went with jaxlib 0.11.
OPTIONS = known_options(
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}, jax.devices()[0]
)

# The same for processes that tests start, and for `config.compile.options`.
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
CONFIG = tuple(f"cpu:{name}={str(value).lower()}" for name, value in OPTIONS.items())

fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
