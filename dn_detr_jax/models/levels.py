"""The feature levels that pyramid, encoder, queries and decoder hand on."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp

from dn_detr_jax.arrays import Array, Bool, Float, Leaf, Shaped


class Levels(flax.struct.PyTreeNode):
    """Feature maps of one or several resolutions as one sequence of T tokens.

    The tokens of a level are its pixels row by row; levels follow one another.

    Attributes:
      tokens: [B, T, D] features. Values at padded tokens are meaningless.
      position: [B, T, D] position encodings.
      valid: bool [B, T], False at padded tokens.
      shapes: (height, width) of each level, static; T is the sum of their products.
    """

    tokens: Leaf
    position: Leaf
    valid: Leaf
    shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of_maps(
        cls,
        features: Sequence[Float[Array, "B _ _ D"]],
        position: Sequence[Float[Array, "B _ _ D"]],
        valid: Sequence[Bool[Array, "B _ _"]],
    ) -> "Levels":
        """Flattens and concatenates maps.

        Args:
          features: [B, h, w, D] of each level.
          position: [B, h, w, D] of each level.
          valid: bool [B, h, w] of each level.
        """
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        return cls(_sequence(features), _sequence(position), _sequence(valid), shapes)


def _sequence(maps: Sequence[Shaped[Array, "B _ _ *D"]]) -> Shaped[Array, "B _ *D"]:
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in maps]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
