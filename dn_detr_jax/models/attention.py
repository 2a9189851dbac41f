"""Dot-product attention kernels with one interface: plain XLA, and cuDNN's fused kernel."""

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

    def weighted_sum(query, key, value):
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = scores * (query.shape[-1] ** -0.5)
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    if remat:
        weighted_sum = jax.checkpoint(weighted_sum)
    out = weighted_sum(heads(query), heads(key), heads(value))
    return out.reshape(*out.shape[:2], -1)


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
