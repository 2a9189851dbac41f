"""The optimizer against a plain NumPy AdamW with PyTorch's semantics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dn_detr_jax.config import (
    base_config,
)
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training.optimizer import (
    clip_by_global_norm,
    describe,
    global_norm,
    make_optimizer,
    make_update_norm,
    norm_together,
    parameter_paths,
)


def _params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "backbone": {"stem": {"kernel": draw(3, 4)}, "layer1": {"kernel": draw(4, 2)}},
        "decoder": {"bias": draw(5), "kernel": draw(2, 5)},
    }


def _config(**changes):
    config = base_config()
    config.optimizer.update(
        {"learning_rate": 0.01, "weight_decay": 0.1, "eps": 1e-3, "step_at": "2 steps"} | changes
    )
    return config


def _numpy_adamw(params, gradients, config, factors, frozen):
    """Computes AdamW after clipping as PyTorch documents it, for flat params and gradients."""
    settings = config.optimizer
    params = {path: value.astype(np.float64) for path, value in params.items()}
    m = {path: np.zeros_like(value) for path, value in params.items()}
    v = {path: np.zeros_like(value) for path, value in params.items()}
    for t, grads in enumerate(gradients, start=1):
        grads = {p: g.astype(np.float64) for p, g in grads.items() if p not in frozen}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = min(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1.0
        rate = settings.learning_rate * (1.0 if t - 1 < 2 else settings.step_factor)
        for path, g in grads.items():
            g = g * clip
            lr = rate * factors.get(path, 1.0)
            params[path] *= 1 - lr * settings.weight_decay
            m[path] = settings.b1 * m[path] + (1 - settings.b1) * g
            v[path] = settings.b2 * v[path] + (1 - settings.b2) * g * g
            m_hat = m[path] / (1 - settings.b1**t)
            v_hat = v[path] / (1 - settings.b2**t)
            params[path] -= lr * m_hat / (np.sqrt(v_hat) + settings.eps)
    return params


def _flat(tree):
    return dict(zip(parameter_paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


@pytest.mark.parametrize("split", [False, True])
def test_norm_of_small_and_large_arrays_together(split):
    """Catches arrays that are missing or counted twice."""
    rng = np.random.default_rng(0)
    shapes = (3, 5), (2**18,), (2**9, 2**9 + 1), (), (0,)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for part in arrays, arrays[:1], arrays[2:3], arrays[4:]:
        want = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in part))
        np.testing.assert_allclose(global_norm(part, split=split), want, rtol=1e-5)
        np.testing.assert_allclose(norm_together(*part), want, rtol=1e-5)
    assert global_norm({}, split=split) == 0


@pytest.mark.parametrize("clip_norm", [0.1, 1e3, 0.0])
def test_three_steps_against_numpy(clip_norm):
    """Catches optax's other clipping, eps inside the root, decay without the factor, moments or
    norms that frozen parameters take part in, a drop one step early or late, and a norm of the
    update that is not that of the update."""
    params, gradients = _params(), [_params(seed) for seed in (1, 2, 3)]
    config = _config(clip_norm=clip_norm)
    trainable = {path: path != "backbone/stem/kernel" for path in parameter_paths(params)}
    optimizer, schedule = make_optimizer(config, params, 10, 100, trainable)
    update_norm = make_update_norm(config, params, schedule, trainable)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax.tree.norm(updates), update_norm(params, state)

    result, state = params, optimizer.init(params)
    for grads in gradients:
        result, state, expected, found = step(result, state, grads)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    expected = _numpy_adamw(
        _flat(params),
        [_flat(grads) for grads in gradients],
        config,
        factors={"backbone/layer1/kernel": 0.1},
        frozen={"backbone/stem/kernel"},
    )
    for path, value in _flat(result).items():
        np.testing.assert_allclose(value, expected[path], rtol=2e-6, atol=1e-7, err_msg=path)
    np.testing.assert_array_equal(
        result["backbone"]["stem"]["kernel"], params["backbone"]["stem"]["kernel"]
    )


def test_clipping_factor_is_that_of_pytorch():
    """Catches optax's clipping: at a norm of 1e-6, max_norm / (norm + 1e-6) is half of it."""
    grads = {"a": jnp.array([1e-6, 0.0])}
    clipped, _ = clip_by_global_norm(1e-6).update(grads, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], [0.5e-6, 0.0], rtol=1e-5)
    small, _ = clip_by_global_norm(0.1).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(small["a"], grads["a"])


def test_frozen_parameters_have_no_moments():
    params = _params()
    config = _config(lr_multipliers=(("^backbone/stem", 0.0),))
    optimizer, _ = make_optimizer(config, params, 10, 100)
    state = jax.eval_shape(optimizer.init, params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    trained = [p.shape for path, p in _flat(params).items() if path != "backbone/stem/kernel"]
    assert sorted(shapes) == sorted(trained * 2)


def _words(line):
    return " ".join(line.split())


def test_first_match_wins_and_the_table_says_so():
    config = _config(lr_multipliers=(("layer1", 0.5), ("^backbone/", 0.1)))
    table = describe(_params(), config).splitlines()
    assert _words(table[0]).startswith("layer1 rate 0.005 1 arrays 8 parameters")
    assert _words(table[1]).startswith("^backbone/ rate 0.001 1 arrays 12 parameters")
    assert _words(table[2]).startswith("(all others) rate 0.01 2 arrays 15 parameters")
    assert "0 arrays" in table[3]


def test_table_counts_frozen_parameters():
    trainable = {path: "stem" not in path for path in parameter_paths(_params())}
    table = describe(jax.eval_shape(_params), _config(), trainable).splitlines()
    assert "1 arrays 8 parameters" in _words(table[0])
    assert _words(table[-1]).startswith("(frozen) no update 1 arrays 12 parameters")


def test_patterns_that_take_nothing_are_errors():
    with pytest.raises(ConfigError, match=r"'\^neck/' matches no parameter.*backbone/layer1"):
        describe(_params(), _config(lr_multipliers=(("^neck/", 0.1),)))
    with pytest.raises(ConfigError, match=r"'layer1' gets no parameter: earlier"):
        describe(_params(), _config(lr_multipliers=(("^backbone/", 0.1), ("layer1", 0.5))))
    with pytest.raises(ConfigError, match="no parameter is left"):
        describe(_params(), _config(lr_multipliers=((".", 0.0),)))


def test_default_pattern_may_match_nothing():
    """A model without a backbone trains with the default config."""
    assert "0 arrays" in describe({"decoder": _params()["decoder"]}, _config()).splitlines()[0]
