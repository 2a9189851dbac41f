"""XLA's options: an unknown default is ignored, an unknown option of the user is an error."""

import logging

import jax
import pytest

from dn_detr_jax.config import base_config
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training import compile_options
from dn_detr_jax.training.compile_options import accepted_options, known_options

_KNOWN, _GONE = "xla_backend_optimization_level", "xla_cpu_option_that_has_gone"


@pytest.fixture
def aged_default(monkeypatch, caplog):
    """Simulates a version of XLA without one of the defaults."""
    before = base_config()
    before.compile.options = (f"cpu:{_KNOWN}=1", f"cpu:{_GONE}=true")
    monkeypatch.setattr(compile_options, "base_config", lambda: before)
    compile_options._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    return before


@pytest.mark.smoke
def test_a_default_that_the_compiler_does_not_know_is_left_out(aged_default, caplog):
    """Catches a default that ends every training once XLA drops it, and a line for every use."""
    device = jax.devices()[0]
    for _ in range(2):
        options = accepted_options(aged_default, device)
        assert options == {_KNOWN: 1}
    jax.jit(lambda x: x + 1).lower(1.0).compile(options)
    lines = [line for line in caplog.messages if _GONE in line]
    assert len(lines) == 1 and "left out" in lines[0] and "No such compile option" in lines[0]


@pytest.mark.parametrize("entry", [f"{_GONE}=false", "xla_fast=1", f"{_KNOWN}=much"])
def test_an_option_of_the_user_that_the_compiler_refuses_is_an_error(aged_default, entry):
    """Catches a user's option that is silently left out, a default with another value included."""
    config = base_config()
    config.compile.options = (*aged_default.compile.options, f"cpu:{entry}")
    with pytest.raises(ConfigError) as caught:
        accepted_options(config, jax.devices()[0])
    message = str(caught.value)
    assert message.lower().startswith(f"config.compile.options = '{entry}': ")
    assert "\n" not in message


def test_every_option_is_kept_or_left_out_by_itself():
    """Catches one unknown option that drops the known ones."""
    options = {_KNOWN: 0, _GONE: 1, "xla_force_host_platform_device_count": 1}
    kept = known_options(options, jax.devices()[0])
    assert kept.keys() == {_KNOWN, "xla_force_host_platform_device_count"}
