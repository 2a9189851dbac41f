"""Bipartite matching between predictions and objects.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1, with the
focal class cost of Deformable DETR. The costs are computed on the device; the assignment problem
is solved on the host by `scipy.optimize.linear_sum_assignment`, in one callback for all decoder
layers of all pictures that a device holds.

Three facts shape this module:

- `jax.pure_callback` inside a plain multi-device `jax.jit` makes the compiler gather its operands
  on one device. Inside `jax.shard_map` each device calls with its own shard.
- The callback receives jax arrays, and a jax operation inside a callback can hang the CPU backend:
  they become NumPy arrays first.
- An exception inside a callback is lost on TPU. Costs are therefore made finite on the device, and
  the number of entries that needed it is returned for the training loop to act upon.
"""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

from dn_detr_jax import boxes as box_ops

# Replaces costs that are not finite, and bounds the others: far above any real cost (|cost| stays
# below some hundreds for normalised boxes), and far below what float32 sums lose digits over.
MAX_COST = 1e6


def matching_cost(
    pred_logits: jax.Array,
    pred_boxes: jax.Array,
    labels: jax.Array,
    boxes: jax.Array,
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> jax.Array:
    """Cost of assigning each object to each query, for every decoder layer.

    Args:
      pred_logits: float [L, B, N, C].
      pred_boxes: float [L, B, N, 4] cxcywh, normalised.
      labels: int [B, M].
      boxes: float [B, M, 4] cxcywh, normalised.
      cost_class: weight of the focal class cost.
      cost_bbox: weight of the L1 distance of the boxes.
      cost_giou: weight of the negative generalized IoU.
      alpha: of the focal cost.
      gamma: of the focal cost.

    Returns:
      float32 [B, L, N, M], without gradient.
    """
    logits = jax.lax.stop_gradient(pred_logits.astype(jnp.float32)).swapaxes(0, 1)
    predicted = jax.lax.stop_gradient(pred_boxes.astype(jnp.float32)).swapaxes(0, 1)
    layers, num_queries = logits.shape[1:3]

    index = jnp.broadcast_to(
        labels[:, None, None, :], (labels.shape[0], layers, num_queries, labels.shape[1])
    )
    prob = jax.nn.sigmoid(jnp.take_along_axis(logits, index, axis=-1))  # of each object's class
    negative = (1 - alpha) * prob**gamma * -jnp.log(1 - prob + 1e-8)
    positive = alpha * (1 - prob) ** gamma * -jnp.log(prob + 1e-8)

    a, b = predicted[:, :, :, None, :], boxes[:, None, None, :, :]
    l1 = jnp.sum(jnp.abs(a - b), axis=-1)
    giou = box_ops.generalized_iou(box_ops.cxcywh_to_xyxy(a), box_ops.cxcywh_to_xyxy(b))
    return cost_class * (positive - negative) + cost_bbox * l1 - cost_giou * giou


def sanitize(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    """Seconds spent solving assignments in this process, over all its devices."""

    def __init__(self):
        """Starts at zero."""
        self._lock = threading.Lock()
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Adds one call."""
        with self._lock:
            self._seconds += seconds

    def take(self) -> float:
        """The seconds since the last `take`."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


host_timer = HostTimer()


def solve_on_host(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Solves every assignment problem of a shard with SciPy.

    Args:
      cost: finite float32 [B, L, N, M]; fastest where the costs of an object's queries are
        neighbours in memory.
      valid: bool [B, M].

    Returns:
      int32 [B, L, M]: query matched to each object. -1 for padding, and for the objects left over
      when a picture has more objects than queries.
    """
    start = time.perf_counter()
    cost, valid = np.asarray(cost), np.asarray(valid)
    result = np.full((*cost.shape[:2], cost.shape[3]), -1, np.int32)
    for picture in np.flatnonzero(valid.any(axis=1)):
        real = np.flatnonzero(valid[picture])
        # Objects as rows: SciPy's shortest augmenting paths grow with the smaller side.
        problems = cost[picture].swapaxes(1, 2)[:, real]
        for layer, problem in enumerate(problems):
            rows, queries = linear_sum_assignment(problem)
            result[picture, layer, real[rows]] = queries
    host_timer.add(time.perf_counter() - start)
    return result


def assign(cost: jax.Array, valid: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Optimal assignment by one host callback per device.

    Args:
      cost: finite float32 [B, L, N, M], see `sanitize`.
      valid: bool [B, M].
      mesh: with an axis `data` over which B is sharded; None on a single device.

    Returns:
      int32 [B, L, M], as `solve_on_host`.
    """

    def solve(by_object, valid):
        return solve_on_host(np.asarray(by_object).swapaxes(2, 3), valid)

    def call(cost, valid):
        shape = jax.ShapeDtypeStruct((*cost.shape[:2], cost.shape[3]), jnp.int32)
        # Transposed on the device, so that the host reads the costs of an object as one row.
        by_object = cost.swapaxes(2, 3)
        return jax.pure_callback(solve, shape, by_object, valid, vmap_method="sequential")

    if mesh is None:
        return call(cost, valid)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    return sharded(cost, valid)
