"""Dot-product attention kernels with one interface: plain XLA, and cuDNN's fused kernel."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from dn_detr_jax.arrays import Array, Bool, Float


def attention(
    query: Float[Array, "B Q D"],
    key: Float[Array, "B T D"],
    value: Float[Array, "B T E"],
    mask: Bool[Array, "#B #Q T"],
    num_heads: int,
    *,
    remat: bool = False,
) -> Float[jax.Array, "B Q E"]:
    """Computes multi-head scaled dot-product attention, with scores and softmax in float32.

    Args:
      query: [B, Q, heads * d], heads outermost.
      key: [B, T, heads * d].
      value: [B, T, heads * e]; e may differ from d.
      mask: bool, broadcasting to [B, Q, T], True: may attend. Every row needs one True.
      num_heads: heads.
      remat: recompute the scores in the backward pass in place of storing them.

    Returns:
      [B, Q, heads * e] in the dtype of `value`.
    """

    def heads(x):
        return x.reshape(*x.shape[:2], num_heads, -1)

    out = _attend(heads(query), heads(key), heads(value), mask[:, None], remat)
    return out.reshape(*out.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, remat):
    """Attends with [B, Q, heads, d], [B, T, heads, d], [B, T, heads, e] and [#B, 1, #Q, T].

    Neither pass divides the weights by their sums: the results, of e numbers in place of T, are
    divided. The derivative of the softmax needs for each query and head the sum of weights times
    their gradients, which is the sum of the result times its gradient (Dao et al.,
    "FlashAttention", NeurIPS 2022, appendix B).
    """
    return _attend_forward(query, key, value, mask, remat)[0]


def _weights(query, key, mask):
    """Returns weights [B, heads, Q, T], of which the largest is 1, and sums [B, heads, Q]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1)


def _attend_forward(query, key, value, mask, remat):
    weights, sums = _weights(query, key, mask)
    weights = weights.astype(value.dtype)
    out = jnp.einsum("bhqk,bkhd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = jnp.swapaxes(out / sums[..., None], 1, 2).astype(value.dtype)
    return out, (query, key, value, mask, out, None if remat else (weights, sums))


def _attend_backward(remat, saved, gradient):
    query, key, value, mask, out, kept = saved
    if remat:
        # Otherwise the compiler would find that the forward pass has the weights, and keep them.
        query, key, gradient = jax.lax.optimization_barrier((query, key, gradient))
        kept = _weights(query, key, mask)
    weights, sums = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gradient = gradient.astype(jnp.float32) / jnp.swapaxes(sums, 1, 2)[..., None]
    mean = jnp.sum(gradient * out.astype(jnp.float32), axis=-1)
    gradient = gradient.astype(value.dtype)
    of_weights = product("bqhd,bkhd->bhqk", gradient, value)
    of_scores = weights * (of_weights - jnp.swapaxes(mean, 1, 2)[..., None])
    of_scores = (of_scores * query.shape[-1] ** -0.5).astype(query.dtype)
    of_query = jnp.swapaxes(product("bhqk,bkhd->bhqd", of_scores, key), 1, 2).astype(query.dtype)
    of_key = product("bhqk,bqhd->bkhd", of_scores, query).astype(key.dtype)
    of_value = product("bhqk,bqhd->bkhd", weights.astype(value.dtype), gradient)
    return of_query, of_key, of_value.astype(value.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def fused_attention(
    query: Float[Array, "B Q D"],
    key: Float[Array, "B T D"],
    value: Float[Array, "B T E"],
    mask: Bool[Array, "#B #Q T"],
    num_heads: int,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[jax.Array, "B Q E"]:
    """Computes `attention` in one kernel, which stores no scores for the backward pass.

    cuDNN needs even numbers of queries and keys, and one width for the heads of queries, keys and
    values, a multiple of 8. The function pads its arguments accordingly and crops the result.

    Args:
      query: [B, Q, heads * d], heads outermost; bfloat16 or float16, like the other two.
      key: [B, T, heads * d].
      value: [B, T, heads * e]; e may differ from d.
      mask: bool, broadcasting to [B, Q, T], True: may attend. Every row needs one True.
      num_heads: heads.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      [B, Q, heads * e] in the dtype of `value`.
    """
    (batch, queries, depth), keys = query.shape, key.shape[1]
    widths = depth // num_heads, value.shape[-1] // num_heads
    width = max(widths) + -max(widths) % 8

    def heads(x):
        x = x.reshape(*x.shape[:2], num_heads, -1)
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])))

    mask = jnp.broadcast_to(mask, (batch, queries, keys))
    mask = jnp.pad(mask, ((0, 0), (0, queries % 2), (0, 0)), mode="edge")
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, keys % 2)))  # the padding key is masked
    out = jax.nn.dot_product_attention(
        heads(query),
        heads(key),
        heads(value),
        mask=mask[:, None],
        scale=widths[0] ** -0.5,
        implementation=implementation,
    )
    return out[:, :queries, :, : widths[1]].reshape(batch, queries, -1)
