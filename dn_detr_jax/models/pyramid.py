"""From the features of a backbone to the levels that a transformer works on."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float, Int
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.initializers import torch_default_kernel
from dn_detr_jax.models.layers import Linear
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.position import image_encoding


class LastLevel(nn.Module):
    """The last feature map alone, projected to the width of the transformer.

    Attributes:
      hidden_dim: D.
      temperature_h: vertical temperature of the sine encoding.
      temperature_w: horizontal temperature.
      dtype: of the compute.
    """

    hidden_dim: int
    temperature_h: float
    temperature_w: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: tuple[Float[Array, "B _ _ _"], ...],
        size: Int[Array, "B 2"],
        canvas: Sequence[int],
    ) -> Levels:
        """Projects features and encodes their positions.

        Args:
          features: [B, h, w, C] of each level of the backbone.
          size: int [B, 2], valid height and width in the canvas.
          canvas: (H, W) of the batch.
        """
        last = features[-1]
        self.sow("intermediates", "features", last)
        valid = valid_tokens(size, canvas, last.shape[1:3])
        position = image_encoding(valid, self.hidden_dim, self.temperature_h, self.temperature_w)
        self.sow("intermediates", "position", position)
        projected = Linear(
            self.hidden_dim,
            kernel_init=torch_default_kernel,
            dtype=self.dtype,
            out_dtype=jnp.float32,
            name="input_proj",
        )(last)
        self.sow("intermediates", "src", projected)
        return Levels.of_maps([projected], [position.astype(self.dtype)], [valid])
