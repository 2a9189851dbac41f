"""What a detector does with an image, layer by layer: boxes, anchors, and where queries look.

The decoders keep no attention weights. The linear maps in front of the cross-attention have names
of their own, so that flax hands out what they return; the weights are computed from it here, for
the few queries that somebody looks at.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from dn_detr_jax import matching
from dn_detr_jax.criterion import MatchedPart, Totals
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.layers import Linear
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.registry import loss_settings
from dn_detr_jax.training.compile_cache import compile_and_log
from dn_detr_jax.training.compile_options import accepted_options

Batch = Mapping[str, Any]
Maps = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A batch in the eyes of the detector, as NumPy arrays.

    Attributes:
      boxes: float32 [L, B, N, 4] cxcywh, the boxes that every layer predicts.
      logits: float32 [L, B, N, K].
      anchors: float32 [L, B, N, 4] cxcywh, from which every layer starts; None for a detector
        without anchors.
      assignment: int32 [L, B, M], the query matched to each object by every layer, -1 for padding.
      maps: for every layer what its linear maps return, [B, ...] by name; empty for a decoder
        whose cross-attention is not known here.
      valid: bool [B, T], tokens of the memory.
      shapes: height and width of every level of the memory.
    """

    boxes: np.ndarray
    logits: np.ndarray
    anchors: np.ndarray | None
    assignment: np.ndarray
    maps: tuple[Maps, ...]
    valid: np.ndarray
    shapes: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Dense attention of a query to one level.

    Attributes:
      weights: float [heads, h, w] over the canvas; those of a head add up to 1 over all levels.
    """

    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class AttentionPoints:
    """Deformable attention of a query to one level.

    Attributes:
      points: float [heads, points, 2], x and y relative to the valid part of the image.
      weights: float [heads, points]; those of a head add up to 1 over all levels.
    """

    points: np.ndarray
    weights: np.ndarray


class LayerOutputs:
    """`layer_outputs`, compiled once for every canvas."""

    def __init__(self, model: nn.Module, config: ConfigDict, *, details: bool):
        """Compiles nothing yet; arguments as for `layer_outputs`."""

        def program(params, batch):
            return layer_outputs(params, batch, model=model, config=config, details=details)

        self._program = jax.jit(program)
        self._name = "layers with attention" if details else "layers"
        self._options = accepted_options(config, jax.local_devices()[0])
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}

    def __call__(self, params: Any, batch: Batch) -> dict[str, Any]:
        """Returns the results on the host."""
        arrays = {name: jnp.asarray(values) for name, values in batch.items()}
        shape = arrays["image"].shape
        if shape not in self._compiled:
            name = "{} for {} x {}".format(self._name, *shape[1:3])
            lowered = self._program.lower(params, arrays)
            self._compiled[shape] = compile_and_log(lowered, name, self._options)
        return jax.device_get(self._compiled[shape](params, arrays))


def layer_outputs(
    params: Any, batch: Batch, *, model: nn.Module, config: ConfigDict, details: bool = False
) -> dict[str, Any]:
    """Applies the detector, and computes the costs of matching of all layers; to be jitted.

    Args:
      params: of the model.
      batch: of images, with their objects.
      model: detector.
      config: whole configuration.
      details: whether to return `intermediates` of the decoder and the `memory` too.

    Returns:
      `pred_logits` and `pred_boxes` [L, B, N, ...]; `cost` float32 [B, L, N, M].
    """
    images = normalize_images(batch["image"], batch["size"])
    options: dict[str, Any] = {}
    if details:
        options = {"mutable": ["intermediates"], "capture_intermediates": _is_shown}
    applied: Any = model.apply({"params": params}, images, batch["size"], **options)
    outputs, state = applied if details else (applied, {})
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    part = MatchedPart(logits, boxes, batch, Totals.of(batch, None), loss_settings(config))
    cost, _ = matching.sanitize(part.cost(), batch["valid"])
    found = {"pred_logits": logits, "pred_boxes": boxes, "cost": cost}
    if details:
        kept = state["intermediates"]
        names = ("decoder", "encoder", "references")
        found["intermediates"] = {name: kept[name] for name in names if name in kept}
    return found


def match(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Matches the objects of a batch in every layer: [B, L, N, M] to int32 [L, B, M]."""
    return np.swapaxes(matching.solve_on_host(cost, valid), 0, 1)


def read_trace(found: Mapping[str, Any], valid: np.ndarray) -> Trace:
    """Sorts the results of `layer_outputs` with `details`.

    Args:
      found: results on the host.
      valid: bool [B, M], of the batch.
    """
    kept = found["intermediates"]
    boxes = np.asarray(found["pred_boxes"])
    memory = kept.get("encoder", {}).get("__call__", [None])[0]
    layers = kept.get("decoder", {})
    maps = []
    for number in range(len(boxes)):
        of_layer = layers.get(f"layer{number}", {})
        values = {name: np.asarray(value["__call__"][0]) for name, value in of_layer.items()}
        maps.append(values)
    known = isinstance(memory, Levels) and all(map(_kind, maps))
    references = kept.get("references", [None])[0]
    # DETR's queries have no boxes to start from.
    moves = references is not None and not all("cross_query" in of_layer for of_layer in maps)
    return Trace(
        boxes=boxes,
        logits=np.asarray(found["pred_logits"]),
        anchors=np.asarray(references) if moves else None,
        assignment=match(np.asarray(found["cost"]), valid),
        maps=tuple(maps) if known else (),
        valid=np.asarray(memory.valid) if known else np.zeros((0, 0), bool),
        shapes=memory.shapes if known else (),
    )


def cross_attention(
    trace: Trace, layer: int, image: int, query: int, num_heads: int
) -> list[AttentionMap] | list[AttentionPoints]:
    """Computes where a query looks in a layer, for every level of the memory.

    Args:
      trace: with `maps`.
      layer: 0 to L - 1.
      image: row of the batch.
      query: 0 to N - 1.
      num_heads: `config.model.num_heads`.
    """
    maps = {name: values[image] for name, values in trace.maps[layer].items()}
    if _kind(maps) == "deformable":
        assert trace.anchors is not None
        return _points(maps, trace.anchors[layer, image, query], query, num_heads, trace.shapes)
    weights = _dense_weights(maps, trace.valid[image], query, num_heads, trace.shapes)
    return [AttentionMap(of_level) for of_level in weights]


def _is_shown(module: nn.Module, method: str) -> bool:
    """Whether flax keeps what a module returns: linear maps of the decoder, and the memory."""
    if method != "__call__":
        return False
    name = module.name or ""
    if isinstance(module, Linear):
        return name == "level_attention" or name.startswith("cross_")
    return name == "encoder"


def _kind(maps: Maps) -> str:
    """Which cross-attention a layer has, by the names of its linear maps; "" for another one."""
    if "cross_sampling_offsets" in maps:
        return "deformable"
    return "dense" if {"cross_query_content", "cross_query"} & set(maps) else ""


def _dense_weights(
    maps: Maps,
    valid: np.ndarray,
    query: int,
    num_heads: int,
    shapes: tuple[tuple[int, int], ...],
) -> list[np.ndarray]:
    """Weights [heads, h, w] of every level, as `models.decoder.DecoderLayer` computes them."""

    def heads(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).reshape(*x.shape[:-1], num_heads, -1)

    if "cross_query" in maps:
        parts = [(maps["cross_query"], maps["cross_key"])]
    else:
        content = maps["cross_query_content"], maps["cross_key_content"]
        if "cross_query_position" in maps:  # the first layer adds the positions
            content = (
                content[0] + maps["cross_query_position"],
                content[1] + maps["cross_key_position"],
            )
        parts = [content, (maps["cross_query_sine"], maps["cross_key_position"])]
    scores = sum(np.einsum("hd,thd->ht", heads(q[query]), heads(k)) for q, k in parts)
    scores = scores / np.sqrt(sum(q.shape[-1] for q, _ in parts) / num_heads)
    scores = np.where(valid, scores, -np.inf)
    ends = np.cumsum([height * width for height, width in shapes])[:-1]
    if "level_attention" in maps:
        of_levels = _softmax(maps["level_attention"][query].astype(np.float32))
        weights = [
            _softmax(x) * share
            for x, share in zip(np.split(scores, ends, axis=1), of_levels, strict=True)
        ]
    else:
        weights = np.split(_softmax(scores), ends, axis=1)
    return [x.reshape(num_heads, *shape) for x, shape in zip(weights, shapes, strict=True)]


def _points(
    maps: Maps,
    anchor: np.ndarray,
    query: int,
    num_heads: int,
    shapes: tuple[tuple[int, int], ...],
) -> list[AttentionPoints]:
    """Points and weights of every level, as `models.deformable_attention` computes them.

    It places them relative to the whole of a level; the shares of its valid part cancel.
    """
    levels = len(shapes)
    logits = maps["cross_attention_weights"][query].astype(np.float32)
    weights = _softmax(logits.reshape(num_heads, -1)).reshape(num_heads, levels, -1)
    offsets = maps["cross_sampling_offsets"][query].astype(np.float32)
    offsets = offsets.reshape(*weights.shape, 2)
    points = anchor[:2] + offsets * anchor[2:] * (0.5 / weights.shape[-1])
    return [AttentionPoints(points[:, level], weights[:, level]) for level in range(levels)]


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)
