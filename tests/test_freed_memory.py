"""Memory that is freed stays with a process that computes on CPUs."""

import os
import platform
import subprocess
import sys

import pytest

from dn_detr_jax.training.freed_memory import _SETTINGS, keep_freed_memory

# Prints whether malloc was set, and the pages that 20 blocks of 64 MiB, each freed, took after the
# first one.
_PROGRAM = """
import resource
from dn_detr_jax.training.freed_memory import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = keep_freed_memory()
pages()
print(done, sum(pages() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets the malloc of glibc")
def test_a_block_takes_new_pages_only_once():
    """Catches a setting that malloc does not take."""
    environment = {k: v for k, v in os.environ.items() if k not in {"GLIBC_TUNABLES", *_SETTINGS}}
    environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    was_set, pages = done.stdout.split()
    assert was_set == "True"
    assert int(pages) < 100


@pytest.mark.parametrize(
    "name, value",
    [("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9"), *((name, "65536") for name in _SETTINGS)],
)
def test_settings_of_the_environment_stay(name, value, monkeypatch):
    """Catches a process that undoes what its user chose."""
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory.__wrapped__()
