"""From images to detections: the function that everything else compiles, and the evaluation step.

The matching is not part of the evaluation step: a program that calls the host can't be kept in
JAX's cache of compiled programs. It is a program of its own, `jit_match`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax import matching
from dn_detr_jax.arrays import Array, Int, Shaped, UInt8
from dn_detr_jax.criterion import MatchedPart, Totals
from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.registry import loss_settings
from dn_detr_jax.sharding import over_data, replicated

PyTree = Any
Batch = dict[str, Array]


def detect(
    params: PyTree,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    *,
    model: nn.Module,
    config: ConfigDict,
) -> dict[str, Shaped[jax.Array, "B ..."]]:
    """Detects objects by the last decoder layer.

    Args:
      params: of the model.
      images: uint8 [B, H, W, 3] RGB, anything beyond `sizes`.
      sizes: int32 [B, 2], height and width of each image on its canvas.
      model: detector.
      config: whole configuration; `eval.num_select` and the class loss are used.

    Returns:
      See `select_detections`.
    """
    outputs: Any = model.apply({"params": params}, normalize_images(images, sizes), sizes)
    logits, boxes = outputs["pred_logits"][-1], outputs["pred_boxes"][-1]
    class_loss = loss_settings(config).class_loss
    return select_detections(logits, boxes, config.eval.num_select, class_loss)


def eval_step(
    params: PyTree, batch: Batch, *, model: nn.Module, config: ConfigDict
) -> dict[str, Shaped[jax.Array, "B ..."]]:
    """Detects objects, and computes the cost of matching the decoder layers.

    Returns:
      `scores`, `labels` and `boxes` as `select_detections`; `image_id` int32 [B]; and `cost`, the
      argument of `matching.assign`, float32 [B, L, N, M].
    """
    settings = loss_settings(config)
    images = normalize_images(batch["image"], batch["size"])
    outputs: Any = model.apply({"params": params}, images, batch["size"])
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    part = MatchedPart(logits, boxes, batch, Totals.of(batch, None), settings)
    cost, _ = matching.sanitize(part.cost(), batch["valid"])
    last = logits[-1], boxes[-1]
    detections = select_detections(*last, config.eval.num_select, settings.class_loss)
    return detections | {"image_id": batch["image_id"], "cost": cost}


def jit_eval_step(
    *, model: nn.Module, config: ConfigDict, mesh: Mesh
) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
    """Jits `eval_step`: (params, batch) -> detections, gathered on every device, and costs."""

    def step(params, batch):
        return eval_step(params, batch, model=model, config=config)

    everywhere, over = replicated(mesh), over_data(mesh)
    detections = dict.fromkeys(("scores", "labels", "boxes", "image_id"), everywhere)
    return jax.jit(step, in_shardings=(everywhere, over), out_shardings=detections | {"cost": over})


def jit_match(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Jits the matching of detections.

    Returns:
      A function of `cost` float32 [B, L, N, M] of `eval_step` and `valid` bool [B, M], which gives
      the query matched to each object, -1 for padding, int32 [B, L, M], gathered on every device.
    """

    def match(cost, valid):
        return matching.assign(cost, valid, mesh)

    return jax.jit(match, in_shardings=over_data(mesh), out_shardings=replicated(mesh))
