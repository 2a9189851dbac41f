"""What the config says about compilation for a platform."""

import contextlib
import re
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.errors import ConfigError

_OPTION = re.compile(r"(cpu|gpu|tpu):([A-Za-z]\w*)=(\S+)")


def parse_option(entry: Any) -> tuple[str, str, bool | int | float | str] | None:
    """Splits an entry of `compile.options` into platform, name and value; None if it is none.

    Examples:
      >>> parse_option("gpu:xla_gpu_enable_triton_gemm=false")
      ('gpu', 'xla_gpu_enable_triton_gemm', False)
    """
    match = _OPTION.fullmatch(entry) if isinstance(entry, str) else None
    return (match[1], match[2], _option_value(match[3])) if match else None


def _option_value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def compiler_options(config: ConfigDict, platform: str) -> dict[str, Any]:
    """Returns XLA's options for the programs of a platform.

    Args:
      config: a valid config; only `compile.options` is read.
      platform: of the devices, "cpu", "gpu" or "tpu".

    Returns:
      Values by name, for `jax.stages.Lowered.compile` and `jax.jit`.

    Examples:
      >>> config = ConfigDict({"compile": {"options": ("cpu:xla_a=true", "gpu:xla_b=2")}})
      >>> compiler_options(config, "cpu"), compiler_options(config, "tpu")
      ({'xla_a': True}, {})
    """
    parsed = filter(None, map(parse_option, config.compile.options))
    return {name: value for of_platform, name, value in parsed if of_platform == platform}


def check_attention(config: ConfigDict, platform: str) -> None:
    """Raises ConfigError if a platform ("cpu", "gpu", "tpu") lacks the config's attention."""
    if config.compile.attention == "cudnn" and platform != "gpu":
        expected = f'"xla" on the platform {platform}: cuDNN is for NVIDIA\'s GPUs'
        raise ConfigError("compile.attention", "cudnn", expected)
