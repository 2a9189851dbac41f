"""Multi-scale deformable sampling, the core of deformable attention.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
equation 3. Every head of every query reads a few points of each feature level, at fractional
positions, and sums them with its own weights. The function consists of gathers and sums, so it is
differentiable by all its inputs and needs no kernel of its own.
"""

import jax
import jax.numpy as jnp

from dn_detr_jax.arrays import Array, Float, Int


def sample_levels(
    value: Float[Array, "B T heads d"],
    shapes: tuple[tuple[int, int], ...],
    locations: Float[Array, "B Q heads levels points 2"],
    weights: Float[Array, "B Q heads levels points"],
) -> Float[jax.Array, "B Q heads*d"]:
    """Computes weighted sums of bilinear samples; values outside of a level are 0.

    Args:
      value: [B, T, heads, d], the concatenated tokens of all levels, T = sum of h * w.
      shapes: (h, w) of each level.
      locations: float [B, Q, heads, levels, points, 2], x and y of each point relative to the
        width and height of the level: 0 is the outer edge of the first pixel, 1 that of the last.
      weights: float [B, Q, heads, levels, points]; in an attention their sum over levels and points
        is 1.

    Returns:
      [B, Q, heads * d] in the dtype of `value`, summed in float32.

    Raises:
      ValueError: the number of tokens is not the number of pixels of all levels.
    """
    sizes = [height * width for height, width in shapes]
    if value.shape[1] != sum(sizes):
        raise ValueError(
            f"{value.shape[1]} tokens, but levels of {shapes} pixels have {sum(sizes)}"
        )
    batch, _, heads, features = value.shape
    queries = locations.shape[1]
    total = jnp.zeros((batch, heads, queries, features), jnp.float32)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for level, (shape, start, size) in enumerate(zip(shapes, starts, sizes, strict=True)):
        tokens = value[:, start : start + size].swapaxes(1, 2)  # [B, heads, h * w, d]
        points, shares = _corners(locations[:, :, :, level], shape)  # [B, Q, heads, points * 4]
        shares = shares * jnp.repeat(weights[:, :, :, level], 4, axis=-1)
        points, shares = points.swapaxes(1, 2), shares.swapaxes(1, 2)
        index = points.reshape(batch, heads, -1, 1)
        samples = jnp.take_along_axis(tokens, index, axis=2)
        samples = samples.reshape(*points.shape, features)
        total += jnp.einsum("bhqpd,bhqp->bhqd", samples, shares, preferred_element_type=jnp.float32)
    return total.swapaxes(1, 2).reshape(batch, queries, heads * features).astype(value.dtype)


def _corners(
    locations: Float[Array, "*queries points 2"], shape: tuple[int, int]
) -> tuple[Int[jax.Array, "*queries 4*points"], Float[jax.Array, "*queries 4*points"]]:
    """Finds the four pixels around each location [..., points, 2] of a level of `shape` (h, w).

    Returns:
      Pixel numbers int32 and bilinear shares float32, both [..., points * 4]; the share is 0
      outside of the level.
    """
    height, width = shape
    position = locations.astype(jnp.float32) * jnp.array([width, height], jnp.float32) - 0.5
    low = jnp.floor(position)
    pixels, shares = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            corner = low + jnp.array([dx, dy])
            share = jnp.prod(1.0 - jnp.abs(position - corner), axis=-1)
            x, y = corner[..., 0], corner[..., 1]
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            shares.append(jnp.where(inside, share, 0.0))
            # Masked before the cast: positions far away do not fit into int32.
            pixels.append(jnp.where(inside, y * width + x, 0).astype(jnp.int32))
    flat = (*locations.shape[:-2], 4 * locations.shape[-2])
    return jnp.stack(pixels, -1).reshape(flat), jnp.stack(shares, -1).reshape(flat)
