"""The compiled training step, sharded over a mesh.

It is one `jax.jit` with explicit shardings: the batch is split over the mesh axis `data`, state and
metrics are replicated, and losses are sums over the global batch divided by global counts. The
compiler adds the all-reduce of the gradients; the losses do not deal with devices. Random numbers
come from the seed and the step by `jax.random.fold_in`, so they depend neither on the number of
devices nor on where a run was interrupted.

With `train.accumulate_steps` a device processes its images in several parts, one after the other.
The noise is drawn and the counts are taken before the batch is split, so the losses and gradients
of the parts add up to those of the whole batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.criterion import MatchedPart, OutputPart, Totals, total_loss
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.models.registry import loss_settings, variant_of
from dn_detr_jax.sharding import (
    largest_axis_over_data,
    over_data,
    replicated,
    with_sharding,
)
from dn_detr_jax.training.metrics import StepMetrics
from dn_detr_jax.training.nonfinite import unless_nonfinite
from dn_detr_jax.training.optimizer import global_norm
from dn_detr_jax.training.state import TrainState, abstract_state, moving_average, shardings

PyTree = Any
Batch = dict[str, jax.Array]


def denoising_queries(
    batch: Batch, key: jax.Array, config: ConfigDict, noise: denoising.Noise | None = None
) -> denoising.Denoising | None:
    """Makes the denoising queries of a batch; None if `dn.groups` is 0.

    Args:
      batch: `labels` [B, M], `boxes` [B, M, 4] and `valid` [B, M].
      key: for the noise.
      config: whole configuration.
      noise: draws to use in place of those from `key`.
    """
    if not config.dn.groups:
        return None
    labels, valid, contrastive = batch["labels"], batch["valid"], config.dn.contrastive
    batch_size, num_objects = labels.shape
    if noise is None:
        slots = denoising.slots_needed(num_objects, config.dn.groups, contrastive)
        noise = denoising.draw_noise(
            key,
            (batch_size, slots),
            config.model.num_classes,
            contrastive=contrastive,
            num_objects=num_objects,
        )
    packed = config.dn.layout == "packed"
    most = config.dn.slots // (2 if contrastive else 1)
    if packed and num_objects > most:
        if noise.priority is None:
            raise ValueError("packing needs draw_noise(..., num_objects=M)")
        valid = denoising.limit_objects(valid, noise.priority, most)
    dn = denoising.prepare(
        labels, batch["boxes"], valid, noise, contrastive=contrastive, **_noise_options(config.dn)
    )
    return denoising.pack(dn, config.dn.slots) if packed else dn


def _noise_options(dn: ConfigDict) -> dict[str, Any]:
    """Options of `denoising.prepare` from `config.dn`."""

    def scale(name: str) -> float | tuple[float, ...]:
        by_group = dn[f"{name}_by_group"]
        return denoising.over_groups(by_group, dn.groups) if by_group else dn[name]

    return {
        "groups": dn.groups,
        "label_noise": scale("label_noise"),
        "box_noise": scale("box_noise"),
        "distribution": dn.box_distribution,
        "parts": dn.box_parts,
        "label_denoising": dn.label_denoising,
        "mask": dn.mask,
    }


def compute_losses(
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    config: ConfigDict,
    mesh: Mesh,
    noise: denoising.Noise | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the training loss of a batch and all its terms.

    Args:
      params: of the model.
      batch: `image` uint8 [B, H, W, 3], `size` [B, 2], `labels` [B, M], `boxes` [B, M, 4] and
        `valid` [B, M].
      key: for noise and dropout of this step.
      model: detector.
      config: whole configuration.
      mesh: for the matching.
      noise: draws to use in place of those from `key`.

    Returns:
      The weighted sum over decoder layers of matching and denoising losses, and a dictionary of
      scalars: `loss_ce`, `loss_ce_0`, ..., the same with `dn_` in front for the denoising part,
      `num_objects` and `nonfinite_costs`.
    """
    noise_key, dropout_key = jax.random.split(key)
    dn = denoising_queries(batch, noise_key, config, noise)
    return _losses(params, batch, dn, dropout_key, model=model, config=config, mesh=mesh)


def _losses(
    params: PyTree,
    batch: Batch,
    dn: denoising.Denoising | None,
    dropout_key: jax.Array,
    *,
    model: nn.Module,
    config: ConfigDict,
    mesh: Mesh | None,
    totals: Totals | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`compute_losses` with its denoising queries made, of a batch or of a part of one."""
    outputs: Any = model.apply(
        {"params": params},
        normalize_images(batch["image"], batch["size"]),
        batch["size"],
        dn,
        attend_padding=config.dn.attend_padding,
        train=True,
        rngs={"dropout": dropout_key},
    )
    total, terms, _ = criterion(outputs, dn, batch, config=config, mesh=mesh, totals=totals)
    return total, terms


def output_parts(
    outputs: dict[str, jax.Array],
    dn: denoising.Denoising | None,
    batch: Batch,
    config: ConfigDict,
    totals: Totals | None = None,
) -> list[OutputPart]:
    """Splits a model's outputs into the parts of its variant; arguments as for `criterion`."""
    totals = Totals.of(batch, dn) if totals is None else totals
    variant = variant_of(config.model)
    return variant.output_parts(outputs, dn, batch, totals, loss_settings(config))


def criterion(
    outputs: dict[str, jax.Array],
    dn: denoising.Denoising | None,
    batch: Batch,
    *,
    config: ConfigDict,
    mesh: Mesh | None,
    assignment: jax.Array | None = None,
    totals: Totals | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array | None]:
    """Computes the training loss of a model's outputs.

    Args:
      outputs: `pred_logits` [L, B, S + N, K] and `pred_boxes` [L, B, S + N, 4], and what else the
        parts of the variant read.
      dn: the denoising queries among them, or None.
      batch: `labels`, `boxes` and `valid`.
      config: whole configuration.
      mesh: for the matching; None if the batch is on one device.
      assignment: int [B, L, M] of the matching queries, to use in place of the matching.
      totals: counts of the batch that this one is a part of; the results of all parts add up to
        those of that batch.

    Returns:
      The loss and the terms of `compute_losses`, and the assignment int32 [B, L, M] that was found
      for the matching queries, None if it was given.
    """
    parts = output_parts(outputs, dn, batch, config, totals)
    if assignment is not None:
        parts[0] = dataclasses.replace(cast(MatchedPart, parts[0]), assignment=assignment)
    total, terms, assignments = total_loss(parts, mesh)
    terms["num_objects"] = jnp.sum(batch["valid"], dtype=jnp.float32)
    return total, terms, assignments[0]


def compute_gradients(
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    trainable: PyTree,
    model: nn.Module,
    config: ConfigDict,
    mesh: Mesh,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
    """Returns the results of `compute_losses` and the gradient of the loss.

    Args:
      params, batch, key, model, config, mesh: as for `compute_losses`. With
        `config.train.accumulate_steps` above 1 every device processes its part of the batch in so
        many steps; the results are the same, except for the values that dropout sets to zero.
      trainable: bool for every parameter; gradients of the others are zero.
    """
    parts = {"model": model, "config": config}

    def frozen(params):
        # Otherwise the backward pass of frozen layers would be computed and discarded.
        return jax.tree.map(
            lambda p, train: p if train else jax.lax.stop_gradient(p), params, trainable
        )

    if config.train.accumulate_steps == 1:

        def loss_of_batch(params):
            return compute_losses(frozen(params), batch, key, **parts, mesh=mesh)

        return jax.value_and_grad(loss_of_batch, has_aux=True)(params)

    noise_key, dropout_key = jax.random.split(key)
    dn = denoising_queries(batch, noise_key, config)
    steps = config.train.accumulate_steps

    def of_device(params, rows, totals, dropout_key):
        # From here every device has its own copy, whose gradient is summed once, at the end.
        params = jax.lax.pcast(params, "data", to="varying")
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("data"))
        rows = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), rows)

        def add(sums, part_and_key):
            part, key = part_and_key

            def loss_of_part(params):
                return _losses(frozen(params), *part, key, **parts, mesh=None, totals=totals)

            result, grads = jax.value_and_grad(loss_of_part, has_aux=True)(params)
            return jax.tree.map(jnp.add, sums, grads), result

        zeros = jax.tree.map(jnp.zeros_like, params)
        keys = jax.random.split(dropout_key, steps)
        grads, results = jax.lax.scan(add, zeros, (rows, keys))
        results = jax.tree.map(lambda x: jnp.sum(x, axis=0), results)
        return jax.lax.psum((results, grads), "data")

    # Within `shard_map` the gradients are summed over the devices once, not once in every part.
    summed = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P("data"), P(), P()), out_specs=P())
    return summed(params, (batch, dn), Totals.of(batch, dn), dropout_key)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    trainable: PyTree,
    config: ConfigDict,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one optimizer step. `trainable` has a bool for every parameter; see `compute_gradients`.

    Returns:
      The new state and the metrics: `loss`, its terms, and the global norms `grad_norm` (before
      clipping) and `param_norm` (after the update); with `config.on_nonfinite` of "skip" also
      `skipped`, see `training.nonfinite`.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    (loss, metrics), grads = compute_gradients(
        state.params, batch, key, trainable=trainable, model=model, config=config, mesh=mesh
    )
    if config.mesh.shard_optimizer:
        # Every device keeps its part of the gradients, to update its part of the moments.
        split = largest_axis_over_data(grads, mesh)
        grads = jax.lax.with_sharding_constraint(grads, split)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    norm = functools.partial(global_norm, split=config.mesh.shard_optimizer)
    before_update = metrics | {"loss": loss, "grad_norm": norm(grads)}
    metrics = before_update | {"param_norm": norm(params)}
    ema = state.ema
    if ema is not None:
        average = config.train.ema_decay, config.train.ema_tau
        ema = moving_average(ema, params, state.step, *average)
    new = TrainState(state.step + 1, params, opt_state, ema)
    if config.on_nonfinite == "skip":
        new, metrics["skipped"] = unless_nonfinite(new, state, before_update)
    return new, metrics


def jit_train_step(
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    trainable: PyTree,
    config: ConfigDict,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Jits the train step.

    Args:
      model: detector.
      optimizer: of the state.
      trainable: bool for every parameter.
      config: whole configuration, constant in the program.
      mesh: devices.

    Returns:
      A function (state, batch) -> (state, metrics) to which the state is donated. It is traced and
      compiled once for each canvas.
    """

    def packed(state, batch):
        state, metrics = train_step(
            state,
            batch,
            model=model,
            optimizer=optimizer,
            trainable=trainable,
            config=config,
            mesh=mesh,
        )
        return state, StepMetrics.of(metrics)

    state_shardings = shardings(abstract_state(model, optimizer, config, mesh))
    return jax.jit(
        packed,
        in_shardings=(state_shardings, over_data(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def abstract_batch(
    config: ConfigDict, purpose: str, mesh: Mesh, canvas: tuple[int, int] | None = None
) -> Batch:
    """Returns the shapes of a batch.

    Args:
      config: whole configuration.
      purpose: "train" or "eval", the section with the batch size.
      mesh: devices.
      canvas: (height, width), by default the first of the config.
    """
    batch_size = config[purpose].batch_size
    height, width = canvas or config.data.canvases[0]
    objects = config.data.max_objects
    shapes = {
        "image": ((height, width, 3), jnp.uint8),
        "size": ((2,), jnp.int32),
        "labels": ((objects,), jnp.int32),
        "boxes": ((objects, 4), jnp.float32),
        "valid": ((objects,), jnp.bool),
        "image_id": ((), jnp.int32),
    }
    structs = {k: jax.ShapeDtypeStruct((batch_size, *s), d) for k, (s, d) in shapes.items()}
    return with_sharding(structs, over_data(mesh))
