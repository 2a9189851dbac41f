"""`jax.jit` for tests: a program runs a few times, so compiling it is what costs."""

import functools

import jax

# Half to a third of the time to compile; numbers stay within float tolerance.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

# The same for processes that tests start, and for `config.compile.options`.
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
CONFIG = tuple(f"cpu:{name}={str(value).lower()}" for name, value in OPTIONS.items())

fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
