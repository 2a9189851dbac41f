"""The arrays that public functions take, with shapes in their signatures.

`Float[Array, "batch objects 4"]` is an array of that shape, as jaxtyping writes it: equal names in
one signature are equal sizes, `...` stands for any number of axes, `*name` for several that are
equal, `#` for sizes that broadcast. The tests check types and shapes at run time
(`tests/conftest.py`); elsewhere they cost nothing.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Array = jax.Array | np.ndarray
# A field of a pytree node: an array, in whose place tree maps put shardings, shapes and others.
if TYPE_CHECKING:
    Leaf = jax.Array
else:
    Leaf = Any

__all__ = ["Array", "Bool", "Float", "Int", "Leaf", "Shaped"]
