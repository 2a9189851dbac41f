"""Which canvases (padding buckets) to use for a data set: few compiled shapes, little padding.

    python -m dn_detr_jax canvases --config configs/coco_r50.py --config.data.dir=PATH_OF_COCO

Draws the training augmentation for many images of the data set, reading only their sizes, and
searches for the 1, 2, 4, 8 and 16 canvases (or `--num_canvases`) with the least padding, once
with the published augmentation unchanged and once with the config's `data.snap`. Every training
and every evaluation image fits a proposed canvas under every draw. Prints a line to
paste into the config for each, and how many objects the images have, for `data.max_objects`.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.data.annotations import Annotations
from dn_detr_jax.data.placement import Canvas, canvas_factors, place
from dn_detr_jax.data.transforms import draw_geometry, eval_geometry, largest_sizes
from dn_detr_jax.errors import DataError

MULTIPLE = 32  # sides of canvases are multiples of this, the stride of a whole ResNet

_SEARCHED = 3000  # sizes on which sets of canvases are compared; more change little
_ROUNDS = 12  # restarts of the search from a disturbed best set


def drawn_sizes(sizes: np.ndarray, augment: ConfigDict, count: int, seed: int = 0) -> np.ndarray:
    """Draws images with replacement and returns their sizes after the training augmentation.

    Args:
      sizes: int [N, 2], heights and widths of the data set.
      augment: `config.data.augment`.
      count: how many to draw.
      seed: of the draws.

    Returns:
      int32 [count, 2].
    """
    rng = np.random.default_rng(seed)
    chosen = np.asarray(sizes)[rng.integers(len(sizes), size=count)]
    return draw_geometry(rng, chosen, augment).size


def required_sizes(
    training: np.ndarray, validation: np.ndarray, data_config: ConfigDict
) -> np.ndarray:
    """Returns sizes that canvases must hold so that every image fits one.

    Args:
      training: int [N, 2], original sizes.
      validation: int [V, 2], original sizes.
      data_config: `config.data`.

    Returns:
      int [r, 2], rounded up to multiples of `MULTIPLE`; none fits into another.
    """
    largest = largest_sizes(training, data_config.augment).reshape(-1, 2)
    evaluated = eval_geometry(
        validation, data_config.eval_short_side, data_config.eval_max_long_side
    ).size
    sizes = np.unique(_round_up(np.concatenate([largest, evaluated])), axis=0)
    within = (sizes[:, None] <= sizes).all(-1).sum(1) > 1  # each lies within itself
    return sizes[~within]


def padding(
    sizes: np.ndarray, canvases: Sequence[Canvas], snap: float, max_long_side: int
) -> float:
    """Returns the share of padded pixels if every batch is full of images of its canvas.

    Args:
      sizes: int [n, 2], final sizes as drawn; each fits a canvas.
      canvases: heights and widths.
      snap: see `plan.canvas_factors`.
      max_long_side: see `plan.canvas_factors`.

    Raises:
      DataError: if a size fits no canvas.
    """
    factors = canvas_factors(sizes, canvases, snap, max_long_side)
    if not factors.any(-1).all():
        height, width = np.asarray(sizes)[factors.any(-1).argmin()].tolist()
        raise DataError(
            f"data.canvases {tuple(canvases)}: an image of {height} x {width} fits none"
        )
    chosen, placed = place(sizes, canvases, snap, max_long_side)
    area = np.prod(np.asarray(canvases, np.int64)[chosen], axis=-1)
    return float(1 - placed.prod(-1, dtype=np.int64).sum() / area.sum())


def propose(
    sizes: np.ndarray,
    required: np.ndarray,
    counts: Sequence[int],
    snap: float,
    max_long_side: int,
    seed: int = 0,
) -> list[tuple[Canvas, ...]]:
    """Searches for sets of canvases with little padding.

    No canvas is larger than so many canvases have to be, since the largest decides how much memory
    a device needs. A set grows by the canvas that helps most; then canvases are exchanged, one at
    a time for the best other one, until no exchange helps; then the same again from the best set
    with two canvases replaced at random, a few times over. Equal arguments give equal sets.

    Args:
      sizes: int [n, 2], final sizes as drawn (`drawn_sizes`).
      required: int [r, 2]; a canvas must hold each (`required_sizes`).
      counts: how many canvases, one or more, for each set.
      snap: share by which an image's scale may move so that it touches its canvas.
      max_long_side: of training images.
      seed: of the search.

    Returns:
      A set for each of `counts`, of at most that many canvases, the largest first.
    """
    rng = np.random.default_rng(seed)
    if snap and len(sizes) > _SEARCHED:
        sizes = sizes[rng.choice(len(sizes), _SEARCHED, replace=False)]
    search = _Search(sizes, required, snap, max_long_side)
    found: dict[int, list[int]] = {}
    before: list[int] = []
    for count in sorted(set(counts)):
        cover = search.cover(required, count)
        search.limit = search.area[cover].max()
        members = min(
            (search.improve(search.grow(start, count)) for start in (before, cover)),
            key=search.cost,
        )
        for _ in range(_ROUNDS if count > 2 else 0):
            disturbed = list(members)
            for position in rng.choice(count, 2, replace=False):
                disturbed[position] = int(rng.integers(len(search.area)))
            members = min((members, search.improve(disturbed)), key=search.cost)
        found[count] = before = members
    return [search.canvases_of(found[count]) for count in counts]


class _Search:
    """Costs of sets of canvases, which are positions in the list of all candidates.

    The cost is the share of padding, plus one for every required size that no canvas holds and for
    every canvas with an area above `limit`.
    """

    def __init__(self, sizes: np.ndarray, required: np.ndarray, snap: float, max_long_side: int):
        sizes, weights, pixels = _grouped(sizes, snap)
        everything = np.concatenate([sizes, required])
        low = _round_up(np.floor(everything.min(0) * (1 - snap)))
        high = _round_up(everything.max(0))
        heights, widths = (np.arange(a, b + 1, MULTIPLE) for a, b in zip(low, high, strict=True))
        self.canvases = np.stack(np.meshgrid(heights, widths, indexing="ij"), -1).reshape(-1, 2)
        self.area = self.canvases.prod(-1).astype(np.float32)
        self.limit = np.float32(np.inf)
        factors = canvas_factors(sizes, self.canvases, snap, max_long_side).T  # [C, n]
        pixels = factors**2 * pixels
        self._weights = (weights / weights.sum()).astype(np.float32)
        self._filled = (pixels / self.area[:, None]).astype(np.float32)
        self._pixels = (pixels * self._weights).astype(np.float32)
        self._holds = np.all(required <= self.canvases[:, None], axis=-1)  # [C, r]

    def canvases_of(self, members: Sequence[int]) -> tuple[Canvas, ...]:
        """Heights and widths, the largest first."""
        chosen = {(int(self.canvases[m, 0]), int(self.canvases[m, 1])) for m in members}
        return tuple(sorted(chosen, key=lambda canvas: (-canvas[0] * canvas[1], canvas)))

    def cost(self, members: list[int]) -> float:
        """The cost of a set."""
        return float(self._costs(members[:-1], np.array(members[-1:]))[0])

    def cover(self, required: np.ndarray, count: int) -> list[int]:
        """At most `count` canvases that hold all the required sizes, by joining near ones."""
        boxes = [_round_up(size) for size in required]
        while len(boxes) > count:
            pairs = itertools.combinations(range(len(boxes)), 2)
            joined = {(i, j): np.maximum(boxes[i], boxes[j]) for i, j in pairs}
            i, j = min(joined, key=lambda pair: joined[pair].prod())
            boxes = [box for n, box in enumerate(boxes) if n not in (i, j)] + [joined[i, j]]
        return [int((self.canvases == box).all(1).argmax()) for box in boxes]

    def grow(self, members: list[int], count: int) -> list[int]:
        """Adds canvases, always the one that helps most."""
        while len(members) < count:
            members = [*members, int(self._costs(members).argmin())]
        return members

    def improve(self, members: list[int]) -> list[int]:
        """Exchanges canvases for others as long as that lowers the cost."""
        members, best = list(members), self.cost(members)
        unchanged, position = 0, 0
        while unchanged < len(members):
            rest = members[:position] + members[position + 1 :]
            costs = self._costs(rest)
            candidate = int(costs.argmin())
            if costs[candidate] < best - 1e-6:
                members[position], best, unchanged = candidate, float(costs[candidate]), 0
            else:
                unchanged += 1
            position = (position + 1) % len(members)
        return members

    def _costs(self, members: list[int], others: np.ndarray | None = None) -> np.ndarray:
        """The costs of `members` with each of the `others` (by default every candidate) added."""
        added = slice(None) if others is None else others
        filled, area, pixels = np.zeros((3, self._filled.shape[1]), np.float32)
        for m in members:
            better = self._filled[m] > filled
            filled = np.where(better, self._filled[m], filled)
            area = np.where(better, self.area[m], area)
            pixels = np.where(better, self._pixels[m], pixels)
        better = self._filled[added] > filled
        areas = np.where(better, self.area[added, None], area)
        areas = np.einsum("cn,n->c", areas, self._weights)
        real = np.where(better, self._pixels[added], pixels).sum(1)
        held = self._holds[members].any(0) | self._holds[added]
        broken = (~held).sum(1) + (self.area[added] > self.limit)
        broken = broken + (self.area[members] > self.limit).sum()
        return 1 - real / np.maximum(areas, 1e-9) + broken


def _grouped(sizes: np.ndarray, snap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes that the search need not tell apart, their weights and their mean pixels."""
    pixels = np.asarray(sizes, np.int64).prod(-1)
    if snap:  # the exact size matters
        return sizes, np.ones(len(sizes)), pixels
    groups, inverse, weights = np.unique(
        _round_up(sizes), axis=0, return_inverse=True, return_counts=True
    )
    return groups, weights, np.bincount(inverse.ravel(), pixels) / weights


def _round_up(sizes: np.ndarray) -> np.ndarray:
    return (-(-np.asarray(sizes) // MULTIPLE) * MULTIPLE).astype(np.int64)


def report(
    training: Annotations,
    validation: Annotations,
    data_config: ConfigDict,
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    images: int = 20_000,
) -> str:
    """Returns a text with proposals for `config.data.canvases` and their padding.

    Args:
      training: table of the training split.
      validation: table of the validation split.
      data_config: `config.data`.
      counts: how many canvases, one or more, for each proposal.
      images: images drawn to measure the padding.
    """
    augment = data_config.augment
    drawn = drawn_sizes(training.sizes, augment, images)
    held_out = drawn_sizes(training.sizes, augment, images, seed=1)
    required = required_sizes(training.sizes, validation.sizes, data_config)
    lines = [
        f"{len(training.sizes)} training and {len(validation.sizes)} validation images; "
        f"padding of {images} augmented training images, drawn with replacement"
    ]
    try:
        current = padding(held_out, data_config.canvases, data_config.snap, augment.max_long_side)
        lines.append(
            f"{current:.1%} padding with the config's {len(data_config.canvases)} canvases"
        )
    except DataError as error:
        lines.append(str(error))
    for snap in dict.fromkeys((0.0, float(data_config.snap))):
        lines += ["", f"config.data.snap = {snap}"]
        proposals = propose(drawn, required, counts, snap, augment.max_long_side)
        for canvases in dict.fromkeys(proposals):
            share = padding(held_out, canvases, snap, augment.max_long_side)
            lines.append(f"# {share:.1%} padding with {len(canvases)}:")
            lines.append(f"config.data.canvases = {canvases}")
    return "\n".join([*lines, "", *_objects(training, data_config.max_objects)])


def _objects(annotations: Annotations, max_objects: int) -> list[str]:
    """Lines about the number of objects, and what `data.max_objects` would leave out."""
    counts = annotations.counts
    largest = max(int(counts.max(initial=0)), 1)
    limits = {max(int(np.quantile(counts, q)), 1) for q in (0.5, 0.9, 0.99, 0.999)} | {max_objects}
    lines = []
    for limit in sorted(limits - {0, largest}, reverse=True):
        more = int((counts > limit).sum())
        lines.append(
            f"# {limit}: {more} of {len(counts)} images have more ({more / len(counts):.2%})"
        )
    return [
        f"config.data.max_objects = {largest}",
        "# holds all the objects of every image",
        *lines,
    ]
