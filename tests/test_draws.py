"""Random numbers drawn together are those that are drawn one by one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import fast_jit
from flax import linen as nn

from dn_detr_jax.models.draws import draw_together

SHAPES = [(), (1,), (3, 5), (5, 3), (16, 16), (257,), (2, 3, 4, 5), (64, 64), (0, 4)]


_cubed = jax.custom_vjp(lambda x: x**3)
_cubed.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def many(key):
    """Draws in all ways that initializers use, and some that they don't."""
    table = jnp.arange(7)  # a constant of the function
    keys = [jax.random.fold_in(key, number) for number in range(len(SHAPES))]
    found = {
        "uniform": [jax.random.uniform(k, s) for k, s in zip(keys, SHAPES, strict=True)],
        "normal": [jax.random.normal(k, s) for k, s in zip(keys, SHAPES, strict=True)],
        "truncated": nn.initializers.lecun_normal()(keys[2], (9, 9)),
        "orthogonal": nn.initializers.orthogonal()(keys[3], (6, 6)),  # loops within
        "bfloat16": jax.random.uniform(keys[4], (8, 3), jnp.bfloat16),
        "integers": jax.random.randint(keys[4], (8, 3), 0, 1000),
        "order": jax.random.permutation(keys[5], table),
        "own key": jax.random.uniform(key, (4,)),
        "folded twice": jax.random.uniform(jax.random.fold_in(keys[0], 3), (4,)),
        "folded by an array": jax.random.uniform(jax.random.fold_in(key, table[4]), (4,)),
        "folded by a draw": jax.random.uniform(
            jax.random.fold_in(key, jax.random.bits(keys[1]) % 5), (4,)
        ),
        "split": [jax.random.uniform(k, (3, 2)) for k in jax.random.split(keys[6], 3)],
        "mapped": jax.vmap(lambda k: jax.random.uniform(k, (3, 5)))(jax.random.split(key, 3)),
        "in a loop": jax.lax.map(lambda k: jax.random.normal(k, (2,)), jax.random.split(key, 3)),
        "rematerialized": jax.checkpoint(lambda k: jax.random.uniform(k, (4, 4)))(keys[7]),
        "with a derivative of its own": nn.relu(jax.random.normal(keys[8], (4, 4))),
        "with a backward pass of its own": _cubed(jax.random.normal(keys[8], (4, 4))),
        "constant": jnp.full((3, 3), 2.0),
        "literal": 2.0,
        "the key": jax.random.key_data(keys[1]),
    }
    inner = jax.jit(lambda k, scale: scale * jax.random.uniform(k, (3, 5)) + table[1])
    found["called twice"] = [inner(keys[0], 2.0), inner(keys[1], 3.0)]
    jax.random.normal(key, (100, 100)) @ jnp.ones((100, 100))  # nothing depends on it
    return found


@pytest.mark.parametrize("partitionable", [True, False])
def test_values_are_those_of_single_draws(partitionable):
    """Catches a bit that differs, for every kind of draw, key and call."""
    with jax.threefry_partitionable(partitionable):
        one_by_one = fast_jit(many)(jax.random.key(5))
        together = fast_jit(draw_together(many))(jax.random.key(5))
    assert jax.tree.structure(one_by_one) == jax.tree.structure(together)
    for path, value in jax.tree_util.tree_leaves_with_path(one_by_one):
        other = dict(jax.tree_util.tree_leaves_with_path(together))[path]
        assert value.dtype == other.dtype
        np.testing.assert_array_equal(value, other, jax.tree_util.keystr(path))


def test_keys_of_other_kinds_draw_as_before():
    """Catches stacked draws of keys whose stacked values differ from single ones."""
    key = jax.random.key(5, impl="rbg")

    def two(key):
        return [jax.random.uniform(jax.random.fold_in(key, number), (8,)) for number in range(2)]

    jax.tree.map(
        np.testing.assert_array_equal, fast_jit(two)(key), fast_jit(draw_together(two))(key)
    )


def test_a_program_has_few_draws():
    """Catches draws that are compiled one by one, and operations that no result needs."""

    def parameters(key):
        draws = [
            nn.initializers.lecun_normal()(jax.random.fold_in(key, number), (number + 16, 8))
            for number in range(40)
        ]
        unused = jnp.sin(jnp.ones((1000, 1000))) @ jnp.ones((1000, 1000))
        return draws, unused.shape

    text = jax.jit(draw_together(lambda key: parameters(key)[0])).lower(jax.random.key(0)).as_text()
    assert "dot_general" not in text and "sine" not in text
    calls = re.findall(r"call @\w*(?:threefry|random_bits)\w*", text)
    sizes = {4 ** math.ceil(math.log(8 * (number + 16), 4)) for number in range(40)}
    assert 2 <= len(calls) <= 3 * (len(sizes) + 1)
