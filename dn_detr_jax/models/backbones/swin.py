"""Swin Transformer backbones (Liu et al., "Swin Transformer", ICCV 2021), as detectors use them.

Attention stays within windows. A map is padded with zeros to whole windows, odd maps to even sizes
before tokens are merged, and every second block shifts its windows, also where a single window
covers the map: the conventions of detectron2's backbone and thus of detrex's weights.

An image gives the same features on every canvas. Its zero padding ends with its last window: tokens
beyond are masked in the attention, and tokens beyond the image are set to zero where windows or
merging read them. The features are those that the image has alone on a canvas of its own size.
`mask_padding=False` is the behavior of the PyTorch code, where the padding of a batch is a part of
the image.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float, Int, Shaped
from dn_detr_jax.models.initializers import torch_default_bias, torch_default_kernel
from dn_detr_jax.models.layers import Linear, layer_norm

PATCH = 4
MLP_RATIO = 4

_kernel_init = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros


def _linear(features: int, dtype: DTypeLike, name: str) -> Linear:
    return Linear(features, _zeros, _kernel_init, dtype, name=name)


def _within(
    extent: Int[Array, "B 2"] | None, height: int, width: int
) -> Bool[jax.Array, "#B {height} {width}"]:
    """Masks the tokens in the first rows and columns; all tokens if `extent` is None."""
    if extent is None:
        return jnp.ones((1, height, width), bool)
    rows = jnp.arange(height) < extent[:, :1]
    columns = jnp.arange(width) < extent[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def partition(x: Shaped[Array, "B h w *C"], window: int) -> Shaped[Array, "B n t *C"]:
    """Splits maps [B, h, w, ...] into windows [B, h w / window^2, window^2, ...], row by row."""
    batch, height, width, *rest = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, *rest)
    return x.swapaxes(2, 3).reshape(batch, -1, window * window, *rest)


def _merge(
    x: Float[Array, "B n t C"], window: int, height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    """Reverses `partition`."""
    x = x.reshape(x.shape[0], height // window, width // window, window, window, x.shape[-1])
    return x.swapaxes(2, 3).reshape(x.shape[0], height, width, -1)


def relative_index(window: int) -> np.ndarray:
    """Numbers the offsets from key to query within a window: int [window^2, window^2]."""
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def _regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Numbers the parts of a shifted map that were neighbors before: int [n, window^2]."""

    def parts(size):
        line = np.arange(size)
        return (line >= size - window).astype(np.int32) + (line >= size - shift)

    regions = 3 * parts(height)[:, None] + parts(width)[None, :]
    return np.asarray(partition(regions[None], window))[0]


class Block(nn.Module):
    """Attention within windows, then a two-layer network, each with its residual.

    Attributes:
      heads: of the attention.
      window: side of a window.
      shift: of the windows, 0 for none.
      drop_path: probability that a residual is dropped in training.
      dtype: of the compute. The residual stream stays in float32, as in the transformer.
    """

    heads: int
    window: int
    shift: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None, train: bool
    ) -> Float[jax.Array, "B h w C"]:
        """Applies the block.

        Args:
          x: float32 tokens.
          extent: int [B, 2], rows and columns of tokens of each image; None: the whole map.
          train: residuals are dropped.
        """
        channels = x.shape[-1]

        def add(x, y):
            drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))
            return x + drop(y, deterministic=not train)

        x = add(x, self._attention(layer_norm("norm1")(x), extent))
        y = _linear(MLP_RATIO * channels, self.dtype, "linear1")(layer_norm("norm2")(x))
        y = nn.gelu(y.astype(jnp.float32), approximate=False)
        return add(x, _linear(channels, self.dtype, "linear2")(y))

    def _attention(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None
    ) -> Float[jax.Array, "B h w C"]:
        """Attends within windows, with a learned bias for every offset."""
        height, width, channels = x.shape[1:]
        side, shift = self.window, self.shift
        if extent is not None:
            x = jnp.where(_within(extent, height, width)[..., None], x, 0)
        full = -(-height // side) * side, -(-width // side) * side
        x = jnp.pad(x, ((0, 0), (0, full[0] - height), (0, full[1] - width), (0, 0)))
        if shift:
            x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        tokens = partition(x, side)

        qkv = _linear(3 * channels, self.dtype, "qkv")(tokens)
        qkv = qkv.reshape(*tokens.shape[:3], 3, self.heads, -1)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        scores = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=jnp.float32)
        scores = scores * query.shape[-1] ** -0.5 + self._position_bias()
        mask = self._mask(extent, full)
        if mask is not None:
            scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores, axis=-1).astype(value.dtype)
        y = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value)
        y = _linear(channels, self.dtype, "out")(y.reshape(tokens.shape))

        y = _merge(y, side, *full)
        if shift:
            y = jnp.roll(y, (shift, shift), axis=(1, 2))
        return y[:, :height, :width]

    def _position_bias(self) -> Float[jax.Array, "heads t t"]:
        shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("position_bias", _kernel_init, shape)
        return jnp.moveaxis(table[relative_index(self.window)], -1, 0)

    def _mask(
        self, extent: Int[Array, "B 2"] | None, full: tuple[int, int]
    ) -> Bool[jax.Array, "#B n #t t"] | None:
        """Tells which token (row) may attend to which other one of its window.

        They have to be neighbors without the shift, and within the windows that hold the image.
        """
        mask = None
        if extent is not None:
            reach = (extent + self.window - 1) // self.window * self.window
            inside = jnp.roll(_within(reach, *full), (-self.shift, -self.shift), axis=(1, 2))
            mask = partition(inside, self.window)[:, :, None, :]
        if self.shift:
            region = _regions(*full, self.window, self.shift)
            neighbors = jnp.asarray(region)[None, :, :, None] == region[None, :, None, :]
            mask = neighbors if mask is None else mask & neighbors
        return mask


class Merging(nn.Module):
    """Halves the resolution: four neighboring tokens become one of twice the channels."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None
    ) -> Float[jax.Array, "B h2 w2 2*C"]:
        """Merges tokens; those beyond `extent` count as zeros."""
        height, width, channels = x.shape[1:]
        if extent is not None:
            x = jnp.where(_within(extent, height, width)[..., None], x, 0)
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(x.shape[0], -(-height // 2), 2, -(-width // 2), 2, channels)
        # The row varies fastest among the four.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(x.shape[0], x.shape[1], x.shape[3], -1)
        reduction = nn.Dense(
            2 * channels,
            use_bias=False,
            kernel_init=_kernel_init,
            dtype=self.dtype,
            name="reduction",
        )
        return reduction(layer_norm("norm")(x)).astype(jnp.float32)


class Swin(nn.Module):
    """Swin Transformer without pooling and classifier.

    Attributes:
      channels: of the first stage; every stage doubles them.
      depths: blocks of each stage.
      heads: attention heads of each stage.
      window: side of the attention windows.
      levels: stages that are returned, the last ones; each has a layer norm of its own.
      drop_path: probability that the last block's residuals are dropped in training; it rises
        linearly over the blocks (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016).
      mask_padding: results do not depend on the canvas, see the module's docstring.
      dtype: of the compute.
      remat: recompute blocks in the backward pass in place of storing them.
    """

    channels: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    levels: int = 3
    drop_path: float = 0.0
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
          train: residuals are dropped.

        Returns:
          Normalized [B, ceil(H / s), ceil(W / s), C] of the last `levels` stages: the stride s of
          stage i is 4 * 2 ** i.
        """
        x = self._embed(image)
        extent = (size + PATCH - 1) // PATCH if self.mask_padding else None
        rates = iter(np.linspace(0.0, self.drop_path, sum(self.depths)))
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        features = []
        for stage, depth in enumerate(self.depths):
            if stage > 0:
                x = Merging(self.dtype, name=f"stage{stage - 1}_merging")(x, extent)
                extent = None if extent is None else (extent + 1) // 2
            for index in range(depth):
                x = block(
                    heads=self.heads[stage],
                    window=self.window,
                    shift=index % 2 * (self.window // 2),
                    drop_path=float(next(rates)),
                    dtype=self.dtype,
                    name=f"stage{stage}_block{index}",
                )(x, extent, train)
            if stage >= len(self.depths) - self.levels:
                features.append(layer_norm(f"norm{stage}")(x))
        return tuple(features)

    def _embed(self, image: Float[Array, "B H W 3"]) -> Float[jax.Array, "B h w C"]:
        """Maps patches of 4 x 4 pixels to tokens."""
        height, width = image.shape[1:3]
        image = jnp.pad(image, ((0, 0), (0, -height % PATCH), (0, -width % PATCH), (0, 0)))
        x = nn.Conv(
            self.channels,
            (PATCH, PATCH),
            strides=PATCH,
            padding=0,
            kernel_init=torch_default_kernel,
            bias_init=torch_default_bias(PATCH * PATCH * 3),
            dtype=self.dtype,
            name="stem_patches",
        )(image)
        return layer_norm("stem_norm")(x)
