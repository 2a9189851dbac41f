"""Bipartite matching between predictions and objects.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1, with the
class cost of the class loss. The costs are computed on the device; the assignment problems are
solved on the host by `scipy.optimize.linear_sum_assignment`, in one callback for all decoder layers
of all images of a device.

Three facts shape this module:

- `jax.pure_callback` inside a plain multi-device `jax.jit` makes the compiler gather its operands
  on one device. Inside `jax.shard_map` each device calls with its own shard.
- The callback receives jax arrays, and a jax operation inside a callback can hang the CPU backend.
  The callback therefore converts them to NumPy arrays first, and gets them in pieces (`_pieces`).
- An exception inside a callback is lost on TPU. Costs are therefore made finite on the device, and
  the training loop gets the number of entries that were not.
"""

import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dn_detr_jax import boxes as box_ops
from dn_detr_jax.arrays import Array, Bool, Float, Int
from dn_detr_jax.losses import DEFAULT_CLASS_LOSS, ClassLoss

# Replaces costs that are not finite, and bounds the others. It is far above any real cost (|cost|
# stays below some hundreds for normalized boxes), and small enough for exact sums in float32.
MAX_COST = 1e6
_PIECE = 16_384  # numbers of a piece of the costs: 64 KiB


def matching_cost(
    pred_logits: Float[Array, "L B N K"],
    pred_boxes: Float[Array, "L B N 4"],
    labels: Int[Array, "B M"],
    boxes: Float[Array, "B M 4"],
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    class_loss: ClassLoss = DEFAULT_CLASS_LOSS,
) -> Float[jax.Array, "B L N M"]:
    """Computes the cost of assigning each object to each query, for every decoder layer.

    Args:
      pred_logits: float [L, B, N, K].
      pred_boxes: float [L, B, N, 4] cxcywh, normalized.
      labels: int [B, M].
      boxes: float [B, M, 4] cxcywh, normalized.
      cost_class: weight of the class cost.
      cost_bbox: weight of the L1 distance of the boxes.
      cost_giou: weight of the negative generalized IoU.
      class_loss: whose class cost it is.

    Returns:
      float32 [B, L, N, M], without gradient.
    """
    logits = jax.lax.stop_gradient(pred_logits.astype(jnp.float32)).swapaxes(0, 1)
    predicted = jax.lax.stop_gradient(pred_boxes.astype(jnp.float32)).swapaxes(0, 1)
    layers, num_queries = logits.shape[1:3]

    index = jnp.broadcast_to(
        labels[:, None, None, :], (labels.shape[0], layers, num_queries, labels.shape[1])
    )
    by_class = class_loss.cost(logits, index)

    a, b = predicted[:, :, :, None, :], boxes[:, None, None, :, :]
    l1 = jnp.sum(jnp.abs(a - b), axis=-1)
    giou = box_ops.generalized_iou(box_ops.cxcywh_to_xyxy(a), box_ops.cxcywh_to_xyxy(b))
    return cost_class * by_class + cost_bbox * l1 - cost_giou * giou


def sanitize(
    cost: Float[Array, "B L N M"], valid: Bool[Array, "B M"]
) -> tuple[Float[jax.Array, "B L N M"], Int[jax.Array, ""]]:
    """Makes costs finite and counts the entries of real objects that were not.

    Args:
      cost: float32 [B, L, N, M].
      valid: bool [B, M].

    Returns:
      Costs within +-MAX_COST, and an int32 scalar. Columns of padding become 0.
    """
    finite = jnp.isfinite(cost)
    real = valid[:, None, None, :]
    count = jnp.sum(~finite & real, dtype=jnp.int32)
    cost = jnp.where(finite, jnp.clip(cost, -MAX_COST, MAX_COST), MAX_COST)
    return jnp.where(real, cost, 0.0), count


class HostTimer:
    """Measures the seconds that this process spends on assignments, over all its devices."""

    def __init__(self):
        """Starts at zero."""
        self._lock = threading.Lock()
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Adds the seconds of one call."""
        with self._lock:
            self._seconds += seconds

    def take(self) -> float:
        """Returns the seconds since the last `take`."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


host_timer = HostTimer()


def load_solver() -> Callable:
    """Returns SciPy's solver. The first call imports it, for half a second or more."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment


def solve_on_host(
    cost: Float[jax.Array | np.ndarray, "B L N M"], valid: Bool[jax.Array | np.ndarray, "B M"]
) -> Int[np.ndarray, "B L M"]:
    """Solves every assignment problem of a shard with SciPy.

    Args:
      cost: finite float32 [B, L, N, M]; fastest if the costs of an object's queries are neighbors
        in memory.
      valid: bool [B, M].

    Returns:
      int32 [B, L, M], the query matched to each object; -1 for padding, and for the objects left
      over if an image has more objects than queries.
    """
    linear_sum_assignment = load_solver()
    start = time.perf_counter()
    costs, is_real = np.asarray(cost), np.asarray(valid)
    result = np.full((*costs.shape[:2], costs.shape[3]), -1, np.int32)
    for image in np.flatnonzero(is_real.any(axis=1)):
        real = np.flatnonzero(is_real[image])
        # Objects as rows: SciPy's shortest augmenting paths grow with the smaller side.
        problems = costs[image].swapaxes(1, 2)[:, real]
        for layer, problem in enumerate(problems):
            rows, queries = linear_sum_assignment(problem)
            result[image, layer, real[rows]] = queries
    host_timer.add(time.perf_counter() - start)
    return result


def _pieces(cost: jax.Array, platform: str) -> list[jax.Array]:
    """Cuts costs into pieces below 100 KiB on CPUs, and leaves them whole elsewhere.

    jax copies the arguments of a callback into arrays, on CPUs larger ones by a thread of the pool
    that runs the programs. With as many devices as cores, one of each say, all those threads may
    wait in callbacks for such copies.
    """
    if platform != "cpu":
        return [cost]
    flat = cost.reshape(-1)
    return jnp.split(flat, np.arange(_PIECE, flat.size, _PIECE))


def assign(
    cost: Float[Array, "B L N M"], valid: Bool[Array, "B M"], mesh: Mesh | None = None
) -> Int[jax.Array, "B L M"]:
    """Solves the assignment problems of one set of outputs, see `assign_all`."""
    return assign_all([(cost, valid)], mesh)[0]


def assign_all(
    problems: Sequence[tuple[Array, Array]], mesh: Mesh | None = None
) -> list[jax.Array]:
    """Solves assignment problems by one host callback per device.

    Args:
      problems: pairs of a finite cost float32 [B, L, N, M], see `sanitize`, and valid bool [B, M].
        L, N and M may differ from pair to pair.
      mesh: with an axis `data` over which B is sharded; None on a single device.

    Returns:
      int32 [B, L, M] for each pair, as `solve_on_host`.
    """
    if not problems:
        return []
    shapes = [(cost.shape[1], cost.shape[3]) for cost, _ in problems]
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform

    def call(problems):
        # Transposed on the device, so that the host reads the costs of an object as one row.
        by_object = [cost.swapaxes(2, 3) for cost, _ in problems]
        sizes = [cost.shape for cost in by_object]

        def solve(given):
            # One array for all: a callback with several results does not lower inside `shard_map`
            # in some versions of jax.
            found = []
            for (pieces, valid), size in zip(given, sizes, strict=True):
                arrays = [np.asarray(piece) for piece in pieces]
                whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
                cost = whole.reshape(size)
                found.append(solve_on_host(cost.swapaxes(2, 3), valid).reshape(len(cost), -1))
            return np.concatenate(found, axis=1)

        pieces = [_pieces(cost, platform) for cost in by_object]
        given = [(cost, valid) for cost, (_, valid) in zip(pieces, problems, strict=True)]
        total = sum(layers * objects for layers, objects in shapes)
        shape = jax.ShapeDtypeStruct((len(by_object[0]), total), jnp.int32)
        return jax.pure_callback(solve, shape, given, vmap_method="sequential")

    if mesh is not None:
        call = jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    flat, found, start = call(list(problems)), [], 0
    for layers, objects in shapes:
        part = flat[:, start : start + layers * objects]
        found.append(part.reshape(len(flat), layers, objects))
        start += layers * objects
    return found
