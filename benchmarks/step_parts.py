"""Times the parts of a training step, each compiled as a separate program.

- backbone: from the uint8 images to the features, and back to the gradients of its parameters;
- encoder: input projection, position encoding and encoder, forward and backward to the features;
- decoder: queries, denoising ones too, decoder and heads, forward and backward to the memory;
- matching: costs on the device, their way to the host, the assignments, and the way back;
- losses: all losses with their gradients to the outputs, for a given assignment;
- optimizer: clipping, AdamW, the new parameters, and the norms of every step.

Inputs and gradients of outputs have the right shapes and random values. In the whole step, XLA may
overlap and fuse operations of different parts, so the sum of the parts is close to the time of the
step but not equal to it; report both. Each part takes the whole batch at once, even if
`train.accumulate_steps` splits the batch of the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks import common
from dn_detr_jax import denoising
from dn_detr_jax.criterion import MatchedPart, match_parts, total_loss
from dn_detr_jax.models.images import normalize_images
from dn_detr_jax.training.compile_options import accepted_options
from dn_detr_jax.training.optimizer import global_norm
from dn_detr_jax.training.step import denoising_queries, output_parts

PyTree = Any
OWNERS = {"backbone": ("backbone",), "encoder": ("encoder", "input_", "level_embedding")}


def run_cut(
    model: nn.Module, params: PyTree, batch: dict, dn: denoising.Denoising | None, given: dict
) -> tuple[dict[str, jax.Array], dict[str, PyTree]]:
    """Runs a detector with the results of some of its parts given.

    The compiler removes computations that only lead to a given result.

    Args:
      model: detector.
      params: of the whole model.
      batch: `image` uint8 [B, H, W, 3] and `size`.
      dn: denoising queries or None.
      given: results by the name of the submodule.

    Returns:
      The model's outputs; and by submodule the feature maps of the backbone that the pyramid uses,
      and the encoded tokens.
    """
    results = dict(given)
    levels = getattr(model.pyramid, "backbone_levels", 1)

    def intercept(call, args, kwargs, context):
        path = context.module.path
        if context.method_name != "__call__" or path not in (("backbone",), ("encoder",)):
            return call(*args, **kwargs)
        if path[0] == "backbone":
            if "backbone" not in given:
                results["backbone"] = tuple(call(*args, **kwargs)[-levels:])
            return results["backbone"]
        if "encoder" not in given:
            results["encoder"] = call(*args, **kwargs).tokens
        return args[0].replace(tokens=results["encoder"])

    with nn.intercept_methods(intercept):
        images = normalize_images(batch["image"], batch["size"])
        rngs = {"dropout": jax.random.key(0)}
        outputs = model.apply({"params": params}, images, batch["size"], dn, train=True, rngs=rngs)
    return outputs, results


def measure(step: Any, *, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Returns the seconds of each part.

    Args:
      step: a `train_step.Step`.
      rounds: timed rounds, after an untimed one; each runs every part.
      steps: number of runs of a part in a round.
    """
    options = accepted_options(step.config, jax.devices()[0])

    def compiled(function, *arguments):
        return jax.jit(function).lower(*arguments).compile(options)

    calls = programs(step, compiled)
    for call in calls.values():
        jax.block_until_ready(call())

    def repeat(call):
        for _ in range(steps):
            result = call()
        jax.block_until_ready(result)

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(common.timed(lambda call=call: repeat(call)) / steps)
    return {name: common.summary(times) for name, times in seconds.items()}


def programs(step: Any, compiled: Callable[..., Callable]) -> dict[str, Callable[[], Any]]:
    """Returns the compiled parts as functions without arguments.

    Args:
      step: a `train_step.Step`.
      compiled: compiles a function for arguments.
    """
    model, config, mesh, batch = step.model, step.config, step.mesh, step.batch
    params, state = step.state.params, step.state

    def forward(params, given, batch):
        dn = denoising_queries(batch, jax.random.key(0), config)
        return run_cut(model, params, batch, dn, given)

    outputs, results = jax.eval_shape(forward, params, {}, batch)
    draw = jax.jit(_random, static_argnums=0)
    given = jax.tree.map(lambda leaf: draw((leaf.shape, leaf.dtype)), results)
    outputs = {name: jax.nn.sigmoid(draw((x.shape, x.dtype))) for name, x in outputs.items()}

    owned: dict[str, dict[str, PyTree]] = {"backbone": {}, "encoder": {}, "decoder": {}}
    for key, value in params.items():
        owners = (name for name, starts in OWNERS.items() if key.startswith(starts))
        owned[next(owners, "decoder")][key] = value
    inputs = {"backbone": {}, "encoder": {"backbone": given["backbone"]}, "decoder": given}
    cotangents = {**given, "decoder": outputs}

    def part(name):
        def run(own, inputs, cotangent, params, batch):
            def out(own, inputs):
                merged = jax.tree.map(_freeze, {**params, **own}, step.mask)
                results = forward(merged, inputs, batch)
                return results[0] if name == "decoder" else results[1][name]

            result, backward = jax.vjp(out, own, inputs)
            return result, backward(cotangent)

        arguments = owned[name], inputs[name], cotangents[name], params, batch
        program = compiled(run, *arguments)
        return lambda: program(*arguments)

    def parts_of(outputs, batch):
        dn = denoising_queries(batch, jax.random.key(0), config)
        return output_parts(outputs, dn, batch, config)

    def match(outputs, batch):
        return match_parts(parts_of(outputs, batch), mesh)[0]

    def losses(outputs, batch, assignments):
        given = [
            dataclasses.replace(part, assignment=found) if isinstance(part, MatchedPart) else part
            for part, found in zip(parts_of(outputs, batch), assignments, strict=True)
        ]
        return total_loss(given, mesh)[0]

    match_program = compiled(match, outputs, batch)
    assignments = match_program(outputs, batch)
    losses_program = compiled(jax.value_and_grad(losses), outputs, batch, assignments)
    calls = {name: part(name) for name in owned}
    calls["matching"] = lambda: match_program(outputs, batch)
    calls["losses"] = lambda: losses_program(outputs, batch, assignments)

    def update(params, opt_state, grads):
        updates, opt_state = step.optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        norms = [global_norm(tree) for tree in (grads, new)]
        return new, opt_state, norms

    grads = jax.tree.map(jnp.ones_like, params)
    update_program = compiled(update, params, state.opt_state, grads)
    calls["optimizer"] = lambda: update_program(params, state.opt_state, grads)
    return calls


def _random(shape_and_dtype: tuple) -> jax.Array:
    shape, dtype = shape_and_dtype
    return jax.random.normal(jax.random.key(1), shape, dtype)


def _freeze(leaf: jax.Array, is_trained: bool) -> jax.Array:
    return leaf if is_trained else jax.lax.stop_gradient(leaf)
