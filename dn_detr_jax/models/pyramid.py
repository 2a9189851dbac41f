"""From the features of a backbone to the levels that a transformer works on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float, Int
from dn_detr_jax.models.backbones.resnet import GroupNorm
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.initializers import (
    torch_default_bias,
    torch_default_kernel,
    xavier_uniform,
)
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


class MultiLevel(nn.Module):
    """Several feature maps, projected to one width and normalized, and coarser ones made of them.

    Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR
    2021, appendix A.2.

    Attributes:
      hidden_dim: D.
      backbone_levels: last feature maps of the backbone that are used.
      extra_levels: further levels, each of half the resolution: the first is a convolution of the
        backbone's last feature map, the others of the level before.
      temperature_h: vertical temperature of the sine encoding.
      temperature_w: horizontal temperature.
      norm_groups: groups of the norms; where they don't divide D, there are D / 4.
      half_pixel: see `position.image_encoding`.
      mask_padding: results do not depend on the canvas; False: they do, as in PyTorch.
      xavier: projections start with Xavier weights and biases of 0; False: as PyTorch's layers do.
      dtype: of the compute.
    """

    hidden_dim: int
    backbone_levels: int = 3
    extra_levels: int = 1
    temperature_h: float = 10000.0
    temperature_w: float = 10000.0
    norm_groups: int = 32
    half_pixel: bool = True
    mask_padding: bool = True
    xavier: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: tuple[Float[Array, "B _ _ _"], ...],
        size: Int[Array, "B 2"],
        canvas: Sequence[int],
    ) -> Levels:
        """Projects features and encodes their positions, see `LastLevel`."""
        count = self.backbone_levels + self.extra_levels
        normal = nn.initializers.normal(1.0)
        embedding = self.param("level_embedding", normal, (count, self.hidden_dim))
        fits = self.hidden_dim % self.norm_groups == 0
        groups = self.norm_groups if fits else self.hidden_dim // 4
        used = features[-self.backbone_levels :]
        maps, positions, masks = [], [], []
        x = used[-1]
        for level in range(count):
            if level < self.backbone_levels:
                self.sow("intermediates", "features", used[level])
                y = self._project(used[level], level)
            else:
                y = self._halve(x, valid_tokens(size, canvas, x.shape[1:3]), level)
            valid = valid_tokens(size, canvas, y.shape[1:3])
            counted = valid if self.mask_padding else jnp.ones_like(valid)
            norm = GroupNorm(groups, name=f"input_norm{level}")
            y = norm(y.astype(jnp.float32), counted[..., None])
            temperatures = self.temperature_h, self.temperature_w
            position = image_encoding(
                valid, self.hidden_dim, *temperatures, half_pixel=self.half_pixel
            )
            self.sow("intermediates", "position", position)
            self.sow("intermediates", "src", y)
            maps.append(y)
            positions.append((position + embedding[level]).astype(self.dtype))
            masks.append(valid)
            if level >= self.backbone_levels:
                x = y
        return Levels.of_maps(maps, positions, masks)

    def _project(self, x: Float[Array, "B h w _"], level: int) -> Float[jax.Array, "B h w D"]:
        bias, kernel = self._inits(x.shape[-1])
        name = f"input_proj{level}"
        return Linear(self.hidden_dim, bias, kernel, dtype=self.dtype, name=name)(x)

    def _inits(self, fan_in: int) -> tuple[nn.initializers.Initializer, ...]:
        """Initializers of bias and kernel."""
        if self.xavier:
            return nn.initializers.zeros, xavier_uniform
        return torch_default_bias(fan_in), torch_default_kernel

    def _halve(
        self, x: Float[Array, "B h w _"], valid: Bool[Array, "B h w"], level: int
    ) -> Float[jax.Array, "B h2 w2 D"]:
        if self.mask_padding:
            x = jnp.where(valid[..., None], x, 0)
        bias, kernel = self._inits(9 * x.shape[-1])
        return nn.Conv(
            self.hidden_dim,
            (3, 3),
            strides=2,
            padding=1,
            kernel_init=kernel,
            bias_init=bias,
            dtype=self.dtype,
            name=f"input_proj{level}",
        )(x)
