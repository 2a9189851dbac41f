"""XLA's options, without those that the compiler at hand does not know.

Options of XLA come and go with its versions. One that the project sets by itself, to be faster, is
left out where the compiler refuses it; one that a user sets is an error there.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dn_detr_jax.config import base_config, compiler_options
from dn_detr_jax.errors import ConfigError

logger = logging.getLogger(__name__)


def accepted_options(config: ConfigDict, device: jax.Device) -> dict[str, Any]:
    """The options of a config for programs of a device, defaults that are refused left out.

    The first call for an option logs that it is left out.

    Args:
      config: whole configuration. An entry of `compile.options` that `base_config` has too is a
        default.
      device: to compile for. It may be a topology's, or one of this process.

    Returns:
      For `jax.stages.Lowered.compile` and `jax.jit`: values by name.

    Raises:
      ConfigError: the compiler refuses an option that is not a default.
    """
    defaults = compiler_options(base_config(), device.platform)
    options = compiler_options(config, device.platform)
    for name, value in options.items():
        reason = _refusal(name, value, device)
        if reason and defaults.get(name) != value:
            raise ConfigError("compile.options", f"{name}={value}", reason)
    return known_options(options, device)


def known_options(options: dict[str, Any], device: jax.Device) -> dict[str, Any]:
    """The options that the compiler takes; the first call for another one logs it.

    Args:
      options: values by name.
      device: to compile for. It may be a topology's, or one of this process.
    """
    refused = {name: _refusal(name, value, device) for name, value in options.items()}
    for name, reason in refused.items():
        if reason:
            _log_once(f"compiler option {name}={options[name]} is left out: {reason}")
    return {name: value for name, value in options.items() if not refused[name]}


@functools.cache
def _refusal(name: str, value: Any, device: jax.Device) -> str:
    """Returns the compiler's objection to an option; empty if it accepts the option."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x).lower(number).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
