"""Compares two implementations for each of two parts of the transformer.

    python -m benchmarks.layers --canvas 640x672 --batch_size 2 --rounds 10

- "scores": the scores of the decoder's cross-attention have a content and a position part. This
  package concatenates both in every head for one matrix product of twice the width; the alternative
  adds two products. Measured: forward and backward pass of one attention.
- "layers": the program has the encoder's layers one after the other, or `flax.linen.scan` over
  their stacked parameters, one layer in a loop. Measured: forward and backward pass of the
  encoder's layers.

The number of tokens is that of the canvas at stride 32; all other sizes are the config's. Both
implementations of a pair run in turns; "against the first" is the ratio of their times.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.train_step import device, gigabytes
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.config import (
    validate,
)
from dn_detr_jax.models.attention import attention
from dn_detr_jax.models.decoder import interleave_heads
from dn_detr_jax.models.encoder import EncoderLayer
from dn_detr_jax.models.layers import LayerConfig
from dn_detr_jax.models.levels import Levels

FLAGS = common.FLAGS
STRIDE = 32


def side_by_side(query, query_sine, key, key_position, value, mask, heads: int) -> jax.Array:
    """Computes the attention with content and position as the two halves of every head."""
    query = interleave_heads(query, query_sine, heads)
    key = interleave_heads(key, key_position, heads)
    return attention(query, key, value, mask, heads)


def two_products(query, query_sine, key, key_position, value, mask, heads: int) -> jax.Array:
    """Computes the same attention by two products of half the width."""

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    def product(a, b):
        options = {"preferred_element_type": jnp.float32}
        return jnp.einsum("bqhd,bkhd->bhqk", split(a), split(b), **options)

    scores = product(query, key) + product(query_sine, key_position)
    scores = scores * (2 * query.shape[-1] // heads) ** -0.5
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, split(value))
    return out.reshape(*out.shape[:2], -1)


class Layers(nn.Module):
    """The encoder's layers, unrolled or scanned."""

    scan: bool
    num_layers: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps [B, K, D] to [B, K, D]."""

        def run(layer, x):
            ratios = jnp.ones((len(x), 1, 2))
            return layer(Levels(x, position, valid, ratios, ((1, x.shape[1]),)), train=False)

        if not self.scan:
            for _ in range(self.num_layers):
                x = run(EncoderLayer(self.config), x)
            return x
        scan = nn.scan(
            lambda layer, x, _: (run(layer, x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        return scan(EncoderLayer(self.config), x, None)[0]


def pairs(config: ConfigDict) -> dict[str, dict[str, tuple[Callable, Sequence[Any]]]]:
    """Returns {choice: {way: (function, arguments)}}; gradients are for the first argument."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    batch, (height, width) = config.train.batch_size, config.data.canvases[0]
    tokens = math.ceil(height / STRIDE) * math.ceil(width / STRIDE)
    queries = model.num_queries + config.dn.slots

    def random(count, seed):
        shape = (batch, count, model.hidden_dim)
        return jax.random.normal(jax.random.key(seed), shape).astype(dtype)

    inputs = tuple(random(n, i) for i, n in enumerate((queries, queries, tokens, tokens, tokens)))
    valid = jnp.ones((batch, tokens), bool)

    def energy(x):
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def scores(way):
        return lambda x: energy(way(*x, valid[:, None, :], model.num_heads))

    layer = LayerConfig(model.num_heads, model.ffn_dim, model.activation, model.dropout, dtype)
    found: dict[str, dict[str, tuple[Callable, Sequence[Any]]]] = {
        "scores": {
            "one product": (scores(side_by_side), (inputs,)),
            "two products": (scores(two_products), (inputs,)),
        },
        "layers": {},
    }
    for name, scan in (("unrolled", False), ("scanned", True)):
        layers = Layers(scan, model.encoder_layers, layer)
        run = functools.partial(_run, layers, energy)
        params = jax.jit(layers.init)(jax.random.key(9), inputs[2], inputs[3], valid)
        found["layers"][name] = (run, (params, inputs[2], inputs[3], valid))
    return found


def _run(layers: nn.Module, energy: Callable, params: Any, *inputs: jax.Array) -> jax.Array:
    return energy(layers.apply(params, *inputs))


def measure(ways: dict[str, tuple[Callable, Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """Returns the figures of both ways of a pair, measured in turns."""
    calls, rows, seconds = {}, {}, {name: [] for name in ways}
    for name, (function, arguments) in ways.items():
        lowered = jax.jit(jax.value_and_grad(function)).lower(*arguments)
        programs: list[jax.stages.Compiled] = []
        compile_seconds = common.timed(lambda low=lowered, to=programs: to.append(low.compile()))
        plan = programs[0].memory_analysis()
        rows[name] = {
            "compile_s": round(compile_seconds, 2),
            "temporaries_gb": gigabytes(plan.temp_size_in_bytes),
        }
        calls[name] = functools.partial(_wait, programs[0], arguments)
        calls[name]()
    for _ in range(FLAGS.rounds):
        for name, call in calls.items():
            seconds[name].append(common.timed(call))
    first = next(iter(ways))
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
        row |= {"seconds": common.summary(seconds[name])}
        row |= {"against the first": common.summary(ratios)}
    return rows


def _wait(program: jax.stages.Compiled, arguments: Sequence[Any]) -> None:
    jax.block_until_ready(program(*arguments))


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    validate(FLAGS.config)
    report = common.Report("layers")
    for setting in common.settings_of_flags(FLAGS.config):
        common.apply_setting(FLAGS.config, setting)
        for choice, ways in pairs(FLAGS.config).items():
            for way, row in measure(ways).items():
                head = {"device": device()} | setting.columns()
                report.add(head | {"choice": choice, "way": way} | row)
    report.show()


if __name__ == "__main__":
    common.define_flags(batch_size=["2"])
    run_main(main)
