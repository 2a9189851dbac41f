"""Multi-scale deformable sampling, the core of deformable attention.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
equation 3. Every head of every query reads a few points of each feature level, at fractional
positions, and sums them with its own weights.

The samples take far more memory than the arguments: 64 rows of features for every head of every
query with 4 levels of 4 points. So the backward pass is written by hand. It keeps the arguments
alone, reads the samples a second time, and sums the gradient of the values in float32. All levels
are read at once from one table of rows, by gathers that are batched over the images, so that a
batch that is split over devices needs no collective. How the rows are read depends on the platform:

- CPUs: queries in parts that fit into caches; the forward pass adds one row after the other.
- GPUs: all queries at once; XLA fuses a gather, weights and sum into one kernel. The backward pass
  may have parts, for the memory of deterministic sums.
- TPUs: queries in parts; a row of the table holds the four pixels around a position, because a row
  of fewer than 128 numbers takes the space and the time of 128.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dn_detr_jax.arrays import Array, Float
from dn_detr_jax.models import deformable_rows as rows_of
from dn_detr_jax.models.deformable_rows import Shapes


def sample_levels(
    value: Float[Array, "B T heads d"],
    shapes: Shapes,
    locations: Float[Array, "B Q heads levels points 2"],
    weights: Float[Array, "B Q heads levels points"],
    part: int | None = None,
) -> Float[jax.Array, "B Q heads*d"]:
    """Computes weighted sums of bilinear samples; values outside of a level are 0.

    Args:
      value: [B, T, heads, d], the concatenated tokens of all levels, T = sum of h * w.
      shapes: (h, w) of each level.
      locations: float [B, Q, heads, levels, points, 2], x and y of each point relative to the
        width and height of the level: 0 is the outer edge of the first pixel, 1 that of the last.
        A sample at a location that is not finite is 0.
      weights: float [B, Q, heads, levels, points]; in an attention their sum over levels and points
        is 1.
      part: the most queries of an image that a GPU's backward pass samples at once; None: all.

    Returns:
      [B, Q, heads * d] in the dtype of `value`, summed in float32.

    Raises:
      ValueError: the number of tokens is not the number of pixels of all levels.
    """
    tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != tokens:
        raise ValueError(f"{value.shape[1]} tokens, but levels of {shapes} pixels have {tokens}")
    return _sample(shapes, part, value, locations, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sample(
    shapes: Shapes, part: int | None, value: Any, locations: Any, weights: Any
) -> jax.Array:
    """Computes `sample_levels` by the forward pass of the platform."""
    sums = _on_platform(_FORMS, _forward, shapes, value, locations, weights)
    return sums.reshape(*sums.shape[:2], -1).astype(value.dtype)


def _sample_forward(
    shapes: Shapes, part: int | None, *arguments: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _sample(shapes, part, *arguments), arguments


def _sample_backward(
    shapes: Shapes, part: int | None, arguments: tuple[Any, ...], cotangent: Any
) -> tuple[Any, ...]:
    # Without the barrier XLA would merge both passes' gathers and keep the samples in between.
    value, locations, weights = lax.optimization_barrier(arguments)
    cotangent = cotangent.reshape(*locations.shape[:3], -1).astype(jnp.float32)
    forms = _FORMS | {"default": _FORMS["default"]._replace(backward=part)}
    gradients = _on_platform(forms, _backward, shapes, value, locations, weights, cotangent)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, arguments, strict=True))


_sample.defvjp(_sample_forward, _sample_backward)


class _Form(NamedTuple):
    """How a platform computes the passes; the functions are those of `models/deformable_rows.py`.

    Attributes:
      patches: whether a row of the table is a patch.
      forward, backward: the most queries in one part of the pass, of each image; None: all.
      sums: of table, row numbers and shares.
      dots: of table, row numbers and cotangent.
      updates: of shares and cotangent.
    """

    patches: bool
    forward: int | None
    backward: int | None
    sums: Callable[..., jax.Array]
    dots: Callable[..., jax.Array]
    updates: Callable[..., jax.Array]


_PIXELS: dict[str, Any] = {"dots": rows_of.dots_of_pixels, "updates": rows_of.updates_of_pixels}
_PATCHES: dict[str, Any] = {"dots": rows_of.dots_of_patches, "updates": rows_of.updates_of_patches}
_FORMS = {
    "cpu": _Form(False, 256, 64, rows_of.sum_in_loop, **_PIXELS),
    "tpu": _Form(True, 512, 512, rows_of.sum_patches, **_PATCHES),
    "default": _Form(False, None, None, rows_of.sum_in_window, **_PIXELS),
}


def _on_platform(
    forms: dict[str, _Form], function: Callable[..., Any], shapes: Shapes, *arguments: Any
) -> Any:
    """Calls a pass with the form of the platform that the program is compiled for."""
    passes = {name: functools.partial(function, form, shapes) for name, form in forms.items()}
    return lax.platform_dependent(*arguments, **passes)


def _table(form: _Form, shapes: Shapes, value: Any) -> jax.Array:
    return rows_of.make_patches(value, shapes) if form.patches else value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(form: _Form, shapes: Shapes, value: Any, locations: Any, weights: Any) -> jax.Array:
    """Returns the sums float32 [B, Q, heads, d]."""
    table = _table(form, shapes, value)

    def of_image(table, locations, weights):
        cells = rows_of.find_cells(locations, shapes)
        rows = rows_of.row_numbers(cells, shapes, form.patches)
        return form.sums(table, rows, rows_of.pixel_shares(cells, weights))

    def part(carry, arguments):
        return carry, jax.vmap(of_image)(table, *arguments)

    return _in_parts(part, (), (locations, weights), form.forward)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    form: _Form, shapes: Shapes, value: Any, locations: Any, weights: Any, cotangent: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of value, locations and weights in float32; cotangent like the sums."""
    make_table = functools.partial(_table, form, shapes)
    table = make_table(value)

    def find(locations):
        cells = rows_of.find_cells(locations, shapes)
        return cells, rows_of.row_numbers(cells, shapes, form.patches)

    def of_image(total, table, locations, weights, cotangent):
        cells, rows = find(locations)
        dots = form.dots(table, rows, cotangent)
        gradients = rows_of.point_gradients(cells, weights, dots)
        # Cells and rows are found again, so that none of them are kept beside the dots. The plan
        # for an H100 in bfloat16 is 38% smaller (docs/performance.md).
        locations, weights, gradients = lax.optimization_barrier((locations, weights, gradients))
        cells, rows = find(locations)
        updates = form.updates(rows_of.pixel_shares(cells, weights), cotangent)
        return rows_of.add(total, rows, updates), gradients

    def part(total, arguments):
        return jax.vmap(of_image)(total, table, *arguments)

    arguments, zeros = (locations, weights, cotangent), jnp.zeros_like(table, jnp.float32)
    total, (of_locations, of_weights) = _in_parts(part, zeros, arguments, form.backward)
    transpose = jax.linear_transpose(make_table, value.astype(jnp.float32))
    return *transpose(total), of_locations, of_weights


def _in_parts(
    part: Callable[..., Any], carry: Any, arguments: tuple[Any, ...], most: int | None
) -> tuple[Any, Any]:
    """Scans over parts of at most `most` queries, None: one part, as `lax.scan` does.

    Args:
      part: takes the carry and the arguments of a part; returns the carry and results.
      carry: the first one.
      arguments: arrays [B, Q, ...].

    Returns:
      The last carry, and the results [B, Q, ...].
    """
    batch, queries = arguments[0].shape[:2]
    if most is None or queries <= most:
        return part(carry, arguments)
    parts = -(-queries // most)
    each = -(-queries // parts)

    def split(x):  # the added queries have weights and cotangents of 0
        x = jnp.pad(x, [(0, 0), (0, parts * each - queries), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, parts, each, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :queries]

    carry, results = lax.scan(part, carry, jax.tree.map(split, arguments))
    return carry, jax.tree.map(join, results)
