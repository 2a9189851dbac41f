"""The noise of denoising queries: raw draws, and what they do to labels and boxes.

Li et al., "DN-DETR", CVPR 2022, section 4.2, draws uniform noise of one scale for all groups. Zhang
et al., "DINO", ICLR 2023, section 3.3, moves the sides of a box. The other distributions, noise of
the center or the size alone, and a scale for each group are additions of this project, to measure
what each of them is worth; the defaults are the published noise.

The draws are uniform for every distribution: `displacement` maps them by the inverse of its
cumulative distribution. One seed therefore moves the same boxes in the same directions under all
settings.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dn_detr_jax.arrays import Array, Bool, Float, Int, Leaf
from dn_detr_jax.boxes import clamp, cxcywh_to_xyxy, xyxy_to_cxcywh

DISTRIBUTIONS = ("uniform", "normal", "truncated_normal")
PARTS = ("both", "center", "size")


class Noise(flax.struct.PyTreeNode):
    """Raw random draws. They are separate from their use, so that stored draws can be injected.

    Attributes:
      label_u: float32 [B, S] uniform in [0, 1); a label flips if it is below the noise scale.
      label_new: int32 [B, S] replacements of the labels that flip.
      box_u: float32 [B, S, 4] uniform in [0, 1).
      box_sign: float32 [B, S, 4], 1 or -1, only for contrastive denoising.
      priority: float32 [B, M] uniform in [0, 1), only for packing: of more objects than fit, those
        with the lowest values are kept.
    """

    label_u: Leaf
    label_new: Leaf
    box_u: Leaf
    box_sign: Leaf | None = None
    priority: Leaf | None = None


def draw_noise(
    key: jax.Array,
    shape: tuple[int, int],
    num_classes: int,
    *,
    contrastive: bool = False,
    num_objects: int = 0,
) -> Noise:
    """Draws the noise of a global batch.

    Args:
      key: from `jax.random.fold_in(key, step)`, so that the noise does not depend on the devices.
      shape: (B, S).
      num_classes: C; replacements are uniform over the C real classes and may hit the true label.
      contrastive: also draw the signs of contrastive denoising; the other draws stay the same.
      num_objects: M, to also draw priorities for packing; the other draws stay the same. 0: none.
    """
    flip_key, label_key, box_key = jax.random.split(key, 3)
    sign_key, priority_key = jax.random.fold_in(key, 3), jax.random.fold_in(key, 4)
    objects = (shape[0], num_objects)
    return Noise(
        label_u=jax.random.uniform(flip_key, shape),
        label_new=jax.random.randint(label_key, shape, 0, num_classes, dtype=jnp.int32),
        box_u=jax.random.uniform(box_key, (*shape, 4)),
        box_sign=jax.random.rademacher(sign_key, (*shape, 4), jnp.float32) if contrastive else None,
        priority=jax.random.uniform(priority_key, objects) if num_objects else None,
    )


def over_groups(values: Sequence[float], groups: int) -> tuple[float, ...]:
    """Spreads values over the denoising groups, with linear interpolation between them.

    Args:
      values: at least one. The first is for the first group, the last for the last group, the
        others are spaced evenly between them.
      groups: G. As many values as groups are one for each group.

    Returns:
      G values.

    Examples:
      >>> over_groups((0.1, 0.5), groups=5)
      (0.1, 0.2, 0.3, 0.4, 0.5)
      >>> over_groups((0.2, 0.8, 0.2), groups=3)
      (0.2, 0.8, 0.2)
    """
    places = np.linspace(0, 1, len(values))
    spread = np.interp(np.linspace(0, 1, groups), places, values)
    return tuple(round(value, 12) for value in spread.tolist())


def displacement(
    draws: Float[Array, "*slots 4"], distribution: str = "uniform"
) -> Float[jax.Array, "*slots 4"]:
    """Maps uniform draws to displacements, in units of the noise scale.

    Args:
      draws: float [..., 4] uniform in [-1, 1]. The map is odd, so draws in [0, 1] become the
        absolute values of the same distribution.
      distribution: "uniform": the draws themselves. "normal": standard deviation 1/2, without a
        bound. "truncated_normal": the same normal distribution cut off at -1 and 1, which are two
        standard deviations.

    Returns:
      float [..., 4], finite.

    Raises:
      ValueError: unknown distribution.
    """
    if distribution == "uniform":
        return jnp.asarray(draws)
    if distribution == "normal":
        most = 1 - np.finfo(np.float32).eps  # a draw of exactly -1 or 1 would be infinite
        return jax.lax.erf_inv(jnp.clip(draws, -most, most)) / math.sqrt(2)
    if distribution == "truncated_normal":
        inside = math.erf(math.sqrt(2))  # probability within two standard deviations
        return jnp.clip(jax.lax.erf_inv(draws * inside) / math.sqrt(2), -1.0, 1.0)
    raise ValueError(f"distribution {distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")


def add_label_noise(
    labels: Int[Array, "B S"], noise: Noise, scale: float | Float[Array, "..."]
) -> Int[jax.Array, "B S"]:
    """Flips each label with a probability (section 4.2).

    Args:
      labels: int [B, S].
      noise: raw draws.
      scale: probability in [0, 1], one for all or an array that broadcasts to the labels. At 1
        every query gets a random class, which says nothing about its target.
    """
    return jnp.where(noise.label_u < scale, noise.label_new, labels)


def add_box_noise(
    boxes: Float[Array, "*slots 4"],
    noise: Noise,
    scale: float | Float[Array, "..."],
    *,
    distribution: str = "uniform",
    parts: str = "both",
) -> Float[jax.Array, "*slots 4"]:
    """Shifts centers and scales sides (section 4.2).

    Args:
      boxes: float [..., 4] cxcywh in [0, 1].
      noise: raw draws.
      scale: at most 1, one for all or an array that broadcasts to the boxes. Centers move by at
        most `scale` times half a side, and thus stay inside their box; sides become 1 - scale to
        1 + scale times as long. Normal noise has no such bound.
      distribution: see `displacement`.
      parts: "both"; "center": sides keep their length; "size": centers stay.

    Returns:
      float [..., 4] cxcywh, clipped to [0, 1].

    Raises:
      ValueError: unknown distribution or parts.
    """
    _check_parts(parts)
    center, size = boxes[..., 2:] / 2, boxes[..., 2:]
    half_range = jnp.concatenate(
        [
            jnp.zeros_like(center) if parts == "size" else center,
            jnp.zeros_like(size) if parts == "center" else size,
        ],
        axis=-1,
    )
    moved = displacement(2.0 * noise.box_u - 1.0, distribution) * half_range * scale
    return clamp(boxes + moved, 0.0, 1.0)


def add_contrastive_box_noise(
    boxes: Float[Array, "*slots 4"],
    noise: Noise,
    scale: float | Float[Array, "..."],
    negative: Bool[Array, "*slots"],
    *,
    distribution: str = "uniform",
    parts: str = "both",
) -> Float[jax.Array, "*slots 4"]:
    """Moves every side of a box independently, further for negatives (DINO, section 3.3).

    Args:
      boxes: float [..., 4] cxcywh in [0, 1].
      noise: raw draws with signs.
      scale: at most 1, one for all or an array that broadcasts to the boxes. A side moves inwards
        or outwards by a share of half the extent of the box: 0 to `scale`, for negatives `scale` to
        2 * `scale`. Normal noise has no upper bound.
      negative: bool [...].
      distribution: of the distance, for negatives of what is above `scale`, see `displacement`.
      parts: "both"; "center": opposite sides move together; "size": opposite sides move by the same
        distance, both inwards or both outwards.

    Returns:
      float [..., 4] cxcywh, corners clipped to [0, 1]. A box whose sides cross gets the extent 0.

    Raises:
      ValueError: the noise has no signs; unknown distribution or parts.
    """
    if noise.box_sign is None:
        raise ValueError("contrastive denoising needs draw_noise(..., contrastive=True)")
    _check_parts(parts)
    half = jnp.concatenate([boxes[..., 2:], boxes[..., 2:]], axis=-1) / 2
    distance = displacement(noise.box_u, distribution) + negative[..., None]
    moved = noise.box_sign * distance * half * scale
    if parts != "both":
        first = moved[..., :2]  # of the left and the upper side
        moved = jnp.concatenate([first, first if parts == "center" else -first], axis=-1)
    corners = cxcywh_to_xyxy(boxes) + moved
    return clamp(xyxy_to_cxcywh(clamp(corners, 0.0, 1.0)), 0.0)


def _check_parts(parts: str) -> None:
    if parts not in PARTS:
        raise ValueError(f"parts {parts!r}: expected one of {', '.join(PARTS)}")
