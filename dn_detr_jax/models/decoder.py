"""The transformer decoder of DAB-DETR: queries are anchor boxes, refined layer by layer.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022, sections 4.1
to 4.3. Each layer forms its position queries from the anchors that the layer before has refined
(their gradient is stopped in between), attends to the memory with content and position side by side
in every head (Meng et al., "Conditional DETR", ICCV 2021), and modulates that position attention by
the width and height of the anchor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.models.attention import MLP, FeedForward, Linear, attention, layer_norm
from dn_detr_jax.models.initializers import aligned_heads, xavier_uniform
from dn_detr_jax.models.position import box_encoding


def _interleave_heads(content: jax.Array, position: jax.Array, num_heads: int) -> jax.Array:
    """Puts content and position side by side inside every head: twice [B, K, D] to [B, K, 2D]."""
    shape = (*content.shape[:2], num_heads, -1)
    both = jnp.concatenate([content.reshape(shape), position.reshape(shape)], axis=-1)
    return both.reshape(*content.shape[:2], -1)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward network.

    Attributes:
      num_heads: heads of both attentions.
      ffn_dim: width of the feed-forward network.
      activation: "prelu" or "relu".
      dropout: rate.
      first: the first layer, whose content has no position yet, adds it to the cross-attention's
        content.
      position_gain: see `Decoder`.
      dtype: of the compute.
      attention_fn: `attention`, or another with its arguments.
    """

    num_heads: int
    ffn_dim: int
    activation: str
    dropout: float
    first: bool
    position_gain: float
    dtype: jnp.dtype
    attention_fn: Callable[..., jax.Array] = attention

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        return Linear(x.shape[-1], dtype=self.dtype, name=name)(x)

    def _project_position(self, x: jax.Array, name: str) -> jax.Array:
        if not self.position_gain:
            return self._project(x, name)
        init = aligned_heads(self.num_heads, self.position_gain)
        return Linear(x.shape[-1], nn.initializers.zeros, init, self.dtype, name=name)(x)

    def _residual(self, x: jax.Array, y: jax.Array, name: str, train: bool) -> jax.Array:
        y = Linear(x.shape[-1], nn.initializers.zeros, dtype=self.dtype, name=f"{name}_out")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return layer_norm(f"{name}_norm")(x + y)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        query_position: jax.Array,
        query_sine: jax.Array,
        mask: jax.Array,
        memory: jax.Array,
        memory_position: jax.Array,
        memory_valid: jax.Array,
        train: bool,
    ) -> jax.Array:
        """One layer.

        Args:
          x: [B, Q, D] content of the queries.
          query_position: [B, Q, D] learned encoding of the anchors.
          query_sine: [B, Q, D] modulated sine encoding of the anchors' centres.
          mask: bool, broadcasting to [B, Q, Q], of the self-attention.
          memory: [B, K, D] from the encoder.
          memory_position: [B, K, D] sine encoding.
          memory_valid: bool [B, K].
          train: dropout on.

        Returns:
          [B, Q, D].
        """
        project = self._project
        query = project(x, "self_query_content") + project(query_position, "self_query_position")
        key = project(x, "self_key_content") + project(query_position, "self_key_position")
        y = self.attention_fn(query, key, project(x, "self_value"), mask, self.num_heads)
        x = self._residual(x, y, "self", train)

        query, key = project(x, "cross_query_content"), project(memory, "cross_key_content")
        key_position = self._project_position(memory_position, "cross_key_position")
        if self.first:
            query = query + project(query_position, "cross_query_position")
            key = key + key_position
        query_sine = self._project_position(query_sine, "cross_query_sine")
        y = self.attention_fn(
            _interleave_heads(query, query_sine, self.num_heads),
            _interleave_heads(key, key_position, self.num_heads),
            project(memory, "cross_value"),
            memory_valid[:, None, :],
            self.num_heads,
        )
        x = self._residual(x, y, "cross", train)
        return FeedForward(
            self.ffn_dim, self.activation, self.dropout, self.dtype, name="feed_forward"
        )(x, train=train)


class Decoder(nn.Module):
    """A stack of decoder layers with iterative refinement of the anchors.

    Attributes:
      num_layers: L.
      num_heads: heads of the attentions.
      ffn_dim: width of the feed-forward networks.
      activation: "prelu" or "relu".
      dropout: rate.
      temperature: of the sine encoding of the anchors.
      position_gain: above 0, the cross-attention starts out looking at the place of the anchor: the
        position projections of query and key start equal, with this gain, and the scale of the
        position query at one. It needs the temperature of the features' encoding. 0: Xavier
        weights everywhere, as published.
      dtype: of the compute; anchors stay in float32.
      remat: compute layers again in the backward pass, see `config.model.remat`.
      attention_fn: `attention`, or another with its arguments.
    """

    num_layers: int
    num_heads: int
    ffn_dim: int
    activation: str
    dropout: float
    temperature: float
    position_gain: float
    dtype: jnp.dtype
    remat: bool = False
    attention_fn: Callable[..., jax.Array] = attention

    @nn.compact
    def __call__(
        self,
        content: jax.Array,
        anchors: jax.Array,
        mask: jax.Array,
        memory: jax.Array,
        memory_position: jax.Array,
        memory_valid: jax.Array,
        box_head: nn.Module,
        *,
        train: bool,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Decodes queries.

        Args:
          content: [B, Q, D].
          anchors: float32 [B, Q, 4] cxcywh in logit space.
          mask: bool, broadcasting to [B, Q, Q], True: may attend.
          memory: [B, K, D] from the encoder.
          memory_position: [B, K, D] sine encoding.
          memory_valid: bool [B, K].
          box_head: [..., D] to [..., 4], shared with the detector's prediction of boxes.
          train: dropout on.

        Returns:
          Two lists over the L layers: normalised states [B, Q, D], and the float32 [B, Q, 4] cxcywh
          boxes that the layer's predictions are relative to. Gradient flows through those boxes
          into the layer before; between the layers themselves it is stopped.
        """
        features = content.shape[-1]
        mlp = {"kernel_init": xavier_uniform, "dtype": self.dtype}
        position_head = MLP((features, features), **mlp, name="reference_point_head")
        query_scale = MLP(
            (features, features),
            **mlp,
            last_constant=1.0 if self.position_gain else None,
            name="query_scale",
        )
        size_head = MLP((features, 2), **mlp, name="reference_size_head")
        norm = layer_norm("norm")

        layer = nn.remat(DecoderLayer, static_argnums=(8,)) if self.remat else DecoderLayer
        x = content
        reference = jax.nn.sigmoid(anchors)
        references, states = [reference], []
        for i in range(self.num_layers):
            encoded = box_encoding(reference, features // 2, self.temperature)
            query_position = position_head(encoded)
            query_sine = encoded[..., :features]
            if i > 0:
                query_sine = query_sine * query_scale(x)
            # Width modulates the x half, height the y half, which comes first.
            size = jax.nn.sigmoid(size_head(x)) / reference[..., 2:]
            modulation = jnp.repeat(size[..., ::-1], features // 2, axis=-1)
            x = layer(
                self.num_heads,
                self.ffn_dim,
                self.activation,
                self.dropout,
                first=i == 0,
                position_gain=self.position_gain,
                dtype=self.dtype,
                attention_fn=self.attention_fn,
                name=f"layer{i}",
            )(
                x,
                query_position,
                query_sine * modulation,
                mask,
                memory,
                memory_position,
                memory_valid,
                train,
            )
            self.sow("intermediates", f"dec{i}", x)
            states.append(norm(x))
            if i < self.num_layers - 1:
                delta = box_head(x)
                refined = jax.nn.sigmoid(delta + inverse_sigmoid(reference))
                references.append(refined)
                reference = jax.lax.stop_gradient(refined)
        return states, references
