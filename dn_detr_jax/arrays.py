"""The arrays that public functions take, with shapes in their signatures.

`Float[Array, "B M 4"]` is an array of that shape, as jaxtyping writes it: equal names in one
signature are equal sizes, `_` is any size, `...` any number of axes, `*name` several axes that are
equal, `#` marks sizes that broadcast. A lone name has a space in front, `" L"`, by which linters
tell it from a forward reference. Tests check types and shapes at run time, `tests/typecheck.py`;
elsewhere they cost nothing.

Signatures and docstrings name sizes by these letters:

| letter | size |
|---|---|
| B | images of a batch |
| H, W | rows and columns of a canvas; h, w: of a feature map |
| M | slots for the objects of an image |
| N | matching queries |
| G | denoising groups |
| S | denoising slots, of all groups |
| Q | queries, S + N |
| L | decoder layers |
| C | classes; of a backbone's feature map: channels |
| K | logits of a query: C, or C + 1 with "no object" |
| D | channels of the transformer |
| T | tokens: the pixels of all feature levels |
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

if TYPE_CHECKING:
    Array = jax.Array
    Leaf = jax.Array
else:
    # As in jax, an argument may be a NumPy array.
    Array = jax.Array | np.ndarray
    # A field of a pytree node: an array, in whose place tree maps put shardings and other leaves.
    Leaf = Any

__all__ = ["Array", "Bool", "Float", "Int", "Leaf", "Shaped", "UInt8"]
