"""The feature levels that pyramid, encoder, queries and decoder hand on."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax.arrays import Array, Bool, Float, Leaf, Shaped


class Levels(flax.struct.PyTreeNode):
    """Feature maps of one or several resolutions as one sequence of T tokens.

    The tokens of a level are its pixels row by row; levels follow one another.

    Attributes:
      tokens: [B, T, D] features. Values at padded tokens are meaningless.
      position: [B, T, D] position encodings.
      valid: bool [B, T], False at padded tokens.
      ratios: float32 [B, levels, 2], the valid share of the width and height of each level.
      shapes: (height, width) of each level, static; T is the sum of their products.
    """

    tokens: Leaf
    position: Leaf
    valid: Leaf
    ratios: Leaf
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
          valid: bool [B, h, w] of each level, a rectangle from the top left corner.
        """
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        lines = [(x[:, 0], x[:, :, 0]) for x in valid]  # of the width, of the height
        ratios = [jnp.stack([jnp.mean(x, axis=1) for x in pair], axis=-1) for pair in lines]
        sequences = _sequence(features), _sequence(position), _sequence(valid)
        return cls(*sequences, jnp.stack(ratios, axis=1), shapes)

    def centers(self) -> Float[jax.Array, "B T 2"]:
        """Returns x and y of every token's center, relative to the valid part of its level.

        They are in [0, 1] at valid tokens and may be above 1 at padded ones.
        """
        centers = []
        for level, (height, width) in enumerate(self.shapes):
            y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
            of_level = np.stack([x / width, y / height], axis=-1).reshape(1, -1, 2)
            centers.append(of_level / self.ratios[:, level, None])
        return jnp.concatenate(centers, axis=1)

    def references(self) -> Float[jax.Array, "B T levels 2"]:
        """Returns the point of every level, relative to its whole size, at each token's center."""
        return self.centers()[:, :, None] * self.ratios[:, None]


def _sequence(maps: Sequence[Shaped[Array, "B _ _ *D"]]) -> Shaped[Array, "B _ *D"]:
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in maps]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
