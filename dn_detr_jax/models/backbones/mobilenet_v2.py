"""MobileNetV2 backbones (Sandler et al., CVPR 2018), in torchvision's form.

Padded pixels are set to zero before every convolution that reads neighbors, as in `resnet`, so an
image gives the same features on every canvas. `mask_padding=False` is the behavior of the PyTorch
code.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float, Int
from dn_detr_jax.models.backbones.resnet import FrozenBatchNorm, Masks, kaiming_normal
from dn_detr_jax.models.depthwise import DepthwiseConv
from dn_detr_jax.models.products import PointwiseConv

# (expansion, channels, blocks, stride of the first) of each group of blocks.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS, LAST_CHANNELS = 32, 1280
# First and last block, counted from 1, of each stage: all but its first have stride 1.
STAGES = ((2, 3), (4, 6), (7, 13), (14, 17))


def rounded(channels: float) -> int:
    """Rounds to a multiple of 8, of at least 8 and at least 90% of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class _Convolution(nn.Module):
    """A convolution with its norm."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w _"]) -> Float[jax.Array, "B h2 w2 {self.features}"]:
        """Convolves and normalizes."""
        conv: nn.Module
        if self.depthwise:
            conv = DepthwiseConv(kaiming_normal, self.stride, self.dtype, name="conv")
        elif self.size == 1:
            conv = PointwiseConv(
                self.features, kaiming_normal, self.stride, self.dtype, name="conv"
            )
        else:
            conv = nn.Conv(
                self.features,
                (self.size, self.size),
                strides=self.stride,
                padding=self.size // 2,
                use_bias=False,
                kernel_init=kaiming_normal,
                dtype=self.dtype,
                name="conv",
            )
        x = conv(x)
        valid = jnp.ones((1, *x.shape[1:3], 1), bool)
        return FrozenBatchNorm(dtype=self.dtype, name="norm")(x, valid)


class _Block(nn.Module):
    """An inverted residual: expansion, convolution of each channel, projection."""

    expansion: int
    features: int
    stride: int
    mask_padding: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w _"], valid: Bool[Array, "B h w 1"]
    ) -> Float[jax.Array, "B h2 w2 {self.features}"]:
        """Applies the block, given the mask of the valid pixels of `x`."""
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion > 1:
            y = nn.relu6(_Convolution(hidden, dtype=self.dtype, name="expand")(y))
        if self.mask_padding:
            y = jnp.where(valid, y, 0)
        depthwise = _Convolution(hidden, 3, self.stride, True, self.dtype, name="depthwise")
        y = _Convolution(self.features, dtype=self.dtype, name="project")(nn.relu6(depthwise(y)))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNetV2 without pooling and classifier.

    Attributes:
      width: factor of all channels.
      mask_padding: results do not depend on the canvas, see the module's docstring.
      dtype: of the compute.
      remat: recompute blocks in the backward pass in place of storing them.
    """

    width: float = 1.0
    mask_padding: bool = True
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], size: Int[Array, "B 2"], *, train: bool = False
    ) -> tuple[Float[jax.Array, "B _ _ _"], ...]:
        """Computes the features of a batch.

        Args:
          image: float [B, H, W, 3], normalized, zero at padded pixels.
          size: int [B, 2], valid height and width.
          train: without effect.

        Returns:
          [B, ceil(H / s), ceil(W / s), C] of the strides s = 4, 8, 16 and 32; C is 24, 32, 96 and
          1280 at width 1.
        """
        del train
        masks = Masks(size, image.shape[1:3])
        stem = _Convolution(
            rounded(STEM_CHANNELS * self.width), 3, 2, dtype=self.dtype, name="stem"
        )
        x = nn.relu6(stem(image))
        block = nn.remat(_Block) if self.remat else _Block
        layers = [
            (expansion, channels, stride if first else 1)
            for expansion, channels, count, stride in GROUPS
            for first in [True] + [False] * (count - 1)
        ]
        features = []
        for index, (expansion, channels, stride) in enumerate(layers, start=1):
            x = block(
                expansion=expansion,
                features=rounded(channels * self.width),
                stride=stride,
                mask_padding=self.mask_padding,
                dtype=self.dtype,
                name=f"block{index}",
            )(x, masks(x.shape[1:3]))
            if index in [last for _, last in STAGES[:-1]]:
                features.append(x)
        channels = rounded(LAST_CHANNELS * max(1.0, self.width))
        x = nn.relu6(_Convolution(channels, dtype=self.dtype, name="last")(x))
        return (*features, x)
