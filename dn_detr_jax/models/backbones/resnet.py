"""ResNet v1.5 backbones (He et al., CVPR 2016; stride in the 3x3 as torchvision and timm have it).

Use frozen batch norm with pretrained weights and group norm for training from scratch. Padded
pixels are set to zero before every convolution that reads neighbors, and are excluded from the
group statistics, so an image gives the same features on every canvas. `mask_padding=False` is the
behavior of the PyTorch code, where the padding of a batch leaks into its images.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float, Int
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.products import PointwiseConv

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_DEPTHS = (50, 101)
BOTTLENECK_EXPANSION = 4

# He et al., ICCV 2015, as torchvision initializes its ResNets.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class FrozenBatchNorm(nn.Module):
    """Batch norm as a fixed affine map, with the statistics as parameters that are not trained."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], valid: Bool[Array, "#B h w 1"]
    ) -> Float[jax.Array, "B h w C"]:
        """Scales and shifts every channel; ignores `valid`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        factor = scale * jax.lax.rsqrt(var + self.eps)
        # In float32: rounding a factor to bfloat16 would bias its whole channel.
        return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm (Wu and He, ECCV 2018) with the statistics of the valid pixels.

    The mask of `flax.linen.GroupNorm` needs all channels, this one has none.

    Attributes:
      groups: of channels; 0: 32, below 128 channels one for every four.
      eps: added to the variance.
      dtype: not used, the output has that of the input.
    """

    groups: int = 0
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], valid: Bool[Array, "B h w 1"]
    ) -> Float[jax.Array, "B h w C"]:
        """Normalizes over the pixels where `valid` is True."""
        channels = x.shape[-1]
        groups = self.groups or min(32, channels // 4)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        # Sum over pixels first: one pass over the large array, then small ones.
        masked = jnp.where(valid, x, 0).astype(jnp.float32)
        count = jnp.sum(valid, axis=(1, 2), dtype=jnp.float32) * (channels // groups)

        def group_mean(channel_sums):  # [B, C] -> [B, C]
            sums = channel_sums.reshape(x.shape[0], groups, -1).sum(axis=-1)
            return jnp.repeat(sums / count, channels // groups, axis=-1)

        mean = group_mean(jnp.sum(masked, axis=(1, 2)))
        mean_of_squares = group_mean(jnp.sum(masked * masked, axis=(1, 2)))
        variance = jnp.maximum(mean_of_squares - mean * mean, 0.0)
        factor = scale * jax.lax.rsqrt(variance + self.eps)
        shift = bias - mean * factor
        return x * factor[:, None, None].astype(x.dtype) + shift[:, None, None].astype(x.dtype)


NORMS = {"frozen_batch_norm": FrozenBatchNorm, "group_norm": GroupNorm}


class Masks:
    """Masks [B, H, W, 1] of the valid pixels at any resolution, each made once."""

    def __init__(self, size: Int[Array, "B 2"], canvas: tuple[int, ...]):
        self._size, self._canvas = size, canvas
        self._cache: dict[tuple[int, ...], jax.Array] = {}

    def __call__(self, shape: tuple[int, ...]) -> Bool[Array, "B {shape[0]} {shape[1]} 1"]:
        """Returns the mask of a map of `shape`."""
        if shape not in self._cache:
            self._cache[shape] = valid_tokens(self._size, self._canvas, shape)[..., None]
        return self._cache[shape]


class _Block(nn.Module):
    """A residual block, basic (two 3x3) or bottleneck (1x1, 3x3, 1x1)."""

    features: int
    bottleneck: bool
    stride: int
    dilation: int
    norm: Callable[..., nn.Module]
    mask_padding: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w _"],
        valid: Bool[Array, "B h w 1"],
        valid_out: Bool[Array, "B h2 w2 1"],
    ) -> Float[jax.Array, "B h2 w2 _"]:
        """Applies the block, given masks of the valid pixels of `x` and of the result."""

        def masks(x):
            return valid if x.shape[1:3] == valid.shape[1:3] else valid_out

        def conv(x, features, size, name, stride=1, dilation=1):
            if size == 1:
                return PointwiseConv(features, kaiming_normal, stride, self.dtype, name=name)(x)
            if self.mask_padding:
                x = jnp.where(masks(x), x, 0)
            padding = dilation * (size // 2)
            return nn.Conv(
                features,
                (size, size),
                strides=stride,
                kernel_dilation=dilation,
                padding=padding,
                use_bias=False,
                kernel_init=kaiming_normal,
                dtype=self.dtype,
                name=name,
            )(x)

        def norm(x, name):
            return self.norm(name=name, dtype=self.dtype)(x, masks(x))

        if self.bottleneck:
            features = self.features * BOTTLENECK_EXPANSION
            y = nn.relu(norm(conv(x, self.features, 1, "conv1"), "norm1"))
            y = conv(y, self.features, 3, "conv2", self.stride, self.dilation)
            y = nn.relu(norm(y, "norm2"))
            y = norm(conv(y, features, 1, "conv3"), "norm3")
        else:
            features = self.features
            y = nn.relu(norm(conv(x, features, 3, "conv1", self.stride, self.dilation), "norm1"))
            y = norm(conv(y, features, 3, "conv2"), "norm2")
        if x.shape != y.shape:
            x = conv(x, features, 1, "downsample_conv", self.stride)
            x = norm(x, "downsample_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet without pooling and classifier.

    Attributes:
      depth: 18, 34, 50 or 101.
      width: channels of the first stage, 64 as published; every stage doubles them.
      stages: 1 to 4.
      norm: a key of `NORMS`.
      stem: "standard", 7x7 stride 2 and 3x3 max pooling stride 2; or "light", for small images:
        3x3 stride 2, and stride 2 in the first stage.
      dilation: the last stage is dilated in place of its stride (DC5).
      mask_padding: results do not depend on the canvas, see the module's docstring.
      dtype: of the compute.
      remat: recompute blocks in the backward pass in place of storing them.
    """

    depth: int = 50
    width: int = 64
    stages: int = 4
    norm: str = "frozen_batch_norm"
    stem: str = "standard"
    dilation: bool = False
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
          [B, ceil(H / s), ceil(W / s), C] of every stage: the stride s of stage i is 4 * 2 ** i,
          half of that for the last one with dilation.
        """
        del train
        masks = Masks(size, image.shape[1:3])
        norm = NORMS[self.norm]
        kernel, padding = ((7, 7), 3) if self.stem == "standard" else ((3, 3), 1)
        x = nn.Conv(
            self.width,
            kernel,
            strides=2,
            padding=padding,
            use_bias=False,
            kernel_init=kaiming_normal,
            dtype=self.dtype,
            name="stem_conv",
        )(image)
        x = nn.relu(norm(name="stem_norm", dtype=self.dtype)(x, masks(x.shape[1:3])))
        if self.stem == "standard":
            if self.mask_padding:  # after the ReLU, zero is neutral for the maximum
                x = jnp.where(masks(x.shape[1:3]), x, 0)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

        block = nn.remat(_Block) if self.remat else _Block
        features = []
        for stage, blocks in enumerate(BLOCKS[self.depth][: self.stages]):
            dilated = self.dilation and stage == self.stages - 1
            strided = (stage > 0 or self.stem == "light") and not dilated
            for index in range(blocks):
                stride = 2 if index == 0 and strided else 1
                height, width = x.shape[1:3]
                out = -(-height // stride), -(-width // stride)
                x = block(
                    features=self.width * 2**stage,
                    bottleneck=self.depth in BOTTLENECK_DEPTHS,
                    stride=stride,
                    dilation=2 if dilated and index > 0 else 1,
                    norm=norm,
                    mask_padding=self.mask_padding,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_block{index}",
                )(x, masks((height, width)), masks(out))
            features.append(x)
        return tuple(features)
