"""Kernels of an exported detector in fewer bytes: bfloat16, or int8 with a scale per channel.

The program restores float32 kernels before it computes; activations and all other parameters stay
float32. So the file shrinks, and the detections change by the rounding of the kernels alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WEIGHTS = ("float32", "bfloat16", "int8")
_SCALE = "_scale"  # at the end of the name of a kernel
Params = dict[str, jax.Array]


def store_weights(params: dict[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
    """Returns parameters as they are stored.

    Args:
      params: by path, such as "encoder/layer_0/ffn/kernel".
      weights: of `WEIGHTS`.

    Returns:
      The parameters. Kernels in bfloat16 are stored as uint16 with the same bits, because `.npy`
      files have no bfloat16. Kernels in int8 have a scale for each channel of the output, the last
      dimension: the largest magnitude of the channel is 127.
    """
    stored = {}
    for name, value in params.items():
        value = np.asarray(value)
        if weights == "float32" or not _is_kernel(name, value):
            stored[name] = value
        elif weights == "bfloat16":
            stored[name] = value.astype(jnp.bfloat16).view(np.uint16)
        else:
            largest = np.abs(value).max(axis=tuple(range(value.ndim - 1)))
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            stored[name] = np.round(value / scale).astype(np.int8)
            stored[name + _SCALE] = scale
    return stored


def restore_weights(stored: Params) -> Params:
    """Returns float32 parameters from those of `store_weights`, within a program."""
    params = {}
    for name, value in stored.items():
        if value.dtype == jnp.uint16:
            value = lax.bitcast_convert_type(value, jnp.bfloat16).astype(jnp.float32)
        elif value.dtype == jnp.int8:
            value = value.astype(jnp.float32) * stored[name + _SCALE]
        elif name.endswith(f"kernel{_SCALE}"):
            continue
        params[name] = value
    return params


def _is_kernel(name: str, value: np.ndarray) -> bool:
    return name.endswith("kernel") and value.ndim > 1 and value.dtype == np.float32
