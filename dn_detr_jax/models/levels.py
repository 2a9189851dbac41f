"""The feature levels that pyramid, encoder, queries and decoder hand on."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


class Levels(flax.struct.PyTreeNode):
    """Feature maps of one or several resolutions as one sequence of K tokens.

    The tokens of a level are its pixels row by row; levels follow one another.

    Attributes:
      tokens: [B, K, D] features. Values at padded tokens are meaningless.
      position: [B, K, D] position encodings.
      valid: bool [B, K], False at padded tokens.
      shapes: (height, width) of each level, static; K is the sum of their products.
    """

    tokens: jax.Array
    position: jax.Array
    valid: jax.Array
    shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of_maps(
        cls,
        features: Sequence[jax.Array],
        position: Sequence[jax.Array],
        valid: Sequence[jax.Array],
    ) -> "Levels":
        """Flattens and concatenates maps.

        Args:
          features: [B, h, w, D] of each level.
          position: [B, h, w, D] of each level.
          valid: bool [B, h, w] of each level.
        """
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        return cls(_sequence(features), _sequence(position), _sequence(valid), shapes)


def _sequence(maps: Sequence[jax.Array]) -> jax.Array:
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in maps]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
