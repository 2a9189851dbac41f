"""Reads points between pixels from tables of rows, and what their gradients need.

A table [rows, heads, numbers] of one image holds all feature levels of `models/deformable.py`, one
after the other. A row of pixels is the features of one pixel. A row of patches is the features of
four pixels, those around a corner of pixels.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Shapes = tuple[tuple[int, int], ...]
_IN_TABLE: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Axis(NamedTuple):
    """One coordinate of all points [Q, heads, levels, points] of an image, between two pixels.

    Attributes:
      size: number of pixels of each level, int [levels, 1].
      low: number of the first of both pixels, int32; the other is the next one.
      shares: float32 of both pixels in a sample; 0 for a pixel outside of the level.
      slopes: derivatives of the shares by the relative location.
    """

    size: jax.Array
    low: jax.Array
    shares: tuple[jax.Array, jax.Array]
    slopes: tuple[jax.Array, jax.Array]


def find_cells(locations: jax.Array, shapes: Shapes) -> tuple[Axis, Axis]:
    """Finds the four pixels around each location [Q, heads, levels, points, 2]: x and y."""
    size = jnp.array([shape[::-1] for shape in shapes], jnp.int32)[:, None]  # [levels, 1, 2]
    position = locations.astype(jnp.float32) * size - 0.5
    # Both pixels around -2 are outside. NaN and what does not fit into int32 become -2, too.
    position = jnp.where((position > -1) & (position < size), position, -2.0)

    def axis(position, size):
        low = jnp.floor(position)
        first, second = low >= 0, (low >= -1) & (low < size - 1)
        fraction = position - low
        return Axis(
            size=size,
            low=low.astype(jnp.int32),
            shares=(jnp.where(first, 1 - fraction, 0.0), jnp.where(second, fraction, 0.0)),
            slopes=(jnp.where(first, -size, 0.0), jnp.where(second, size, 0.0)),
        )

    return axis(position[..., 0], size[..., 0]), axis(position[..., 1], size[..., 1])


def row_numbers(cells: tuple[Axis, Axis], shapes: Shapes, patches: bool) -> jax.Array:
    """Returns numbers of rows of a table [rows * heads, ...], int32 [Q, heads, reads].

    There are four reads for each point, or one if the rows are patches. A row of a pixel outside of
    the level is one of another pixel of the level; its share is 0.
    """
    x, y = cells
    queries, heads = x.low.shape[:2]
    more = 1 if patches else 0
    sizes = [(height + more) * (width + more) for height, width in shapes]
    starts = jnp.array([0, *itertools.accumulate(sizes[:-1])], jnp.int32)[:, None]
    head = jnp.arange(heads, dtype=jnp.int32)[:, None, None]

    def row(i, j):
        column, line = (
            jnp.clip(axis.low + k, 0, axis.size - 1 + more) for axis, k in ((x, i), (y, j))
        )
        return (starts + line * (x.size + more) + column) * heads + head

    if patches:
        return row(1, 1).reshape(queries, heads, -1)
    return jnp.stack([row(i, j) for j in (0, 1) for i in (0, 1)], -1).reshape(queries, heads, -1)


def pixel_shares(cells: tuple[Axis, Axis], weights: jax.Array) -> jax.Array:
    """Returns the shares of all pixels in the sums, float32 [Q, heads, levels * points * 4]."""
    x, y = cells
    weighted = [share * weights.astype(jnp.float32) for share in y.shares]
    shares = jnp.stack([b * a for b in weighted for a in x.shares], -1)
    return shares.reshape(*weights.shape[:2], -1)


def point_gradients(
    cells: tuple[Axis, Axis], weights: jax.Array, dots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of locations and weights.

    Args:
      dots: float32 [Q, heads, levels * points * 4], products of the four pixels of each point with
        the cotangent of the sum.
    """
    (x, y), weights = cells, weights.astype(jnp.float32)
    dots = dots.reshape(*weights.shape, 4)
    lines = (dots[..., 0], dots[..., 1]), (dots[..., 2], dots[..., 3])
    samples = [x.shares[0] * a + x.shares[1] * b for a, b in lines]
    slopes = [x.slopes[0] * a + x.slopes[1] * b for a, b in lines]

    def across(factors, values):
        return factors[0] * values[0] + factors[1] * values[1]

    of_x, of_y = across(y.shares, slopes) * weights, across(y.slopes, samples) * weights
    return jnp.stack([of_x, of_y], -1), across(y.shares, samples)


def read(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Reads rows of a table [rows, heads, ...] of an image; the numbers are from `row_numbers`."""
    flat = table.reshape(-1, table.shape[-1])
    return flat.at[rows].get(**_IN_TABLE).astype(jnp.float32)


def add(total: jax.Array, rows: jax.Array, updates: jax.Array) -> jax.Array:
    """Adds to the rows that `read` reads."""
    flat = total.reshape(-1, total.shape[-1]).at[rows].add(updates, **_IN_TABLE)
    return flat.reshape(total.shape)


def sum_in_loop(table: jax.Array, rows: jax.Array, shares: jax.Array) -> jax.Array:
    """Sums rows of pixels one after the other: XLA's kernel for CPUs stores no sample."""
    total = jnp.zeros((), jnp.float32)
    for i in range(rows.shape[-1]):
        total += read(table, rows[..., i]) * shares[..., i, None]
    return total


def sum_in_window(table: jax.Array, rows: jax.Array, shares: jax.Array) -> jax.Array:
    """Sums rows of pixels within one kernel of a GPU.

    XLA fuses a gather into the sum over a window. Before a plain sum it transposes, and stores, all
    samples.
    """
    samples = read(table, rows) * shares[..., None]
    window = (1, 1, samples.shape[2], 1)
    return lax.reduce_window(samples, 0.0, lax.add, window, window, "VALID")[:, :, 0]


def sum_patches(table: jax.Array, rows: jax.Array, shares: jax.Array) -> jax.Array:
    """Sums patches without a change of the lanes that their pixels are in, then the four pixels."""
    queries, heads, _ = rows.shape
    lanes = table.shape[-1]
    samples = read(table, rows.reshape(queries * heads, -1))
    shares = _over_lanes(shares, lanes).reshape(samples.shape)
    sums = jnp.sum(samples * shares, axis=1)
    return sums.reshape(queries, heads, 4, lanes // 4).sum(2)


def _over_lanes(shares: jax.Array, lanes: int) -> jax.Array:
    """Repeats the share [..., points * 4] of each pixel over its lanes: [..., points, lanes]."""
    shares = shares.reshape(*shares.shape[:-1], -1, 4)
    return jnp.repeat(shares, lanes // 4, axis=-1)


def dots_of_pixels(table: jax.Array, rows: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the dots of `point_gradients` for rows of pixels."""
    return jnp.einsum("qhpd,qhd->qhp", read(table, rows), cotangent, precision="highest")


def dots_of_patches(table: jax.Array, rows: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the dots of `point_gradients` for rows of patches."""
    lanes = table.shape[-1]
    samples = read(table, rows.reshape(-1, rows.shape[-1]))
    products = samples * jnp.tile(cotangent, 4).reshape(-1, 1, lanes)
    pixels = jnp.repeat(jnp.eye(4, dtype=jnp.float32), lanes // 4, axis=0)
    return jnp.dot(products, pixels, precision="highest")


def updates_of_pixels(shares: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the gradients of the rows that were read."""
    return shares[..., None] * cotangent[:, :, None]


def updates_of_patches(shares: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the gradients of the patches that were read."""
    cotangent = jnp.tile(cotangent, 4)[:, :, None]
    return _over_lanes(shares, cotangent.shape[-1]) * cotangent


def make_patches(value: jax.Array, shapes: Shapes) -> jax.Array:
    """Puts the pixels of each 2 x 2 patch side by side.

    Args:
      value: [B, T, heads, d].

    Returns:
      [B, sum of (h + 1) * (w + 1), heads, 4 * d]: a patch for every corner of the pixels of a
      level. Pixels outside of the level are 0.
    """
    tables, start = [], 0
    for height, width in shapes:
        level = value[:, start : start + height * width]
        start += height * width
        level = level.reshape(-1, height, width, *value.shape[2:])
        level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        pixels = [level[:, j : j + height + 1, i : i + width + 1] for j in (0, 1) for i in (0, 1)]
        patches = jnp.concatenate(pixels, -1)
        tables.append(patches.reshape(patches.shape[0], -1, *patches.shape[3:]))
    return jnp.concatenate(tables, 1)
