"""Where the decoder's queries come from: content, anchors, and who attends to whom.

Matching queries are learned here. Denoising queries, in training, are put in front of them. A
module for queries receives the encoder's levels, so that it can also select proposals from them;
what it predicts on the way goes into `Queries.outputs`.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax import denoising
from dn_detr_jax.arrays import Array, Float, Leaf
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.models.levels import Levels


class Queries(flax.struct.PyTreeNode):
    """The input of a decoder: Q = S + N queries, S denoising slots in front of N matching queries.

    Attributes:
      content: [B, Q, D].
      anchors: float32 [B, Q, 4] cxcywh in logit space.
      mask: bool, broadcasting to [B, Q, Q], of the self-attention, True: may attend.
      outputs: further outputs of the detector by name, for losses of their own.
      position: [B, Q, D] encodings, where the queries have some that the anchors do not give.
    """

    content: Leaf
    anchors: Leaf
    mask: Leaf
    outputs: dict[str, Leaf] = flax.struct.field(default_factory=dict)
    position: Leaf | None = None


def with_denoising(
    content: Float[Array, "B N D"],
    anchors: Float[Array, "B N 4"],
    label_table: Float[Array, "_ _"],
    dn: Denoising | None,
    *,
    indicator: bool = True,
    attend_padding: bool = False,
) -> Queries:
    """Puts denoising queries, if there are any, in front of matching queries.

    Args:
      content: [B, N, D] of the matching queries.
      anchors: float32 [B, N, 4] cxcywh in logit space.
      label_table: see `denoising.query_content`.
      dn: denoising queries, or None.
      indicator: see `denoising.query_content`.
      attend_padding: see `denoising.attention_mask`.
    """
    num_queries = content.shape[1]
    if dn is None:
        return Queries(content, anchors, jnp.ones((1, 1, num_queries), bool))
    noised = denoising.query_content(label_table, dn, indicator=indicator)
    content = jnp.concatenate([noised, content], axis=1)
    anchors = jnp.concatenate([inverse_sigmoid(denoising.query_boxes(dn)), anchors], axis=1)
    mask = denoising.attention_mask(dn, num_queries, attend_padding=attend_padding)
    return Queries(content, anchors, mask)


def _anchor_init(random_xy: bool) -> nn.initializers.Initializer:
    """Draws anchors in logit space: standard normal, or with centers uniform over the image."""

    def init(key, shape, dtype=jnp.float32):
        anchors = jax.random.normal(key, shape, dtype)
        if random_xy:
            centers = jax.random.uniform(jax.random.fold_in(key, 1), (shape[0], 2), dtype)
            anchors = anchors.at[:, :2].set(inverse_sigmoid(centers))
        return anchors

    return init


class LabelQueries(nn.Module):
    """Learned anchors whose content is the label embedding of "no object", as in DN-DAB-DETR.

    The content of a query is the embedding of a label and one indicator channel: the noised label
    and 1 for denoising queries, the extra "no object" row and 0 for matching queries.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      num_queries: anchors; there are N = num_queries * max(num_patterns, 1) matching queries.
      num_patterns: learned contents that are added to the content of every anchor; 0: none.
      random_refpoints_xy: initial anchors have centers uniform over the image.
      indicator: False: there is no indicator channel, and a label has D channels.
      pattern_init: initializer of the patterns.
    """

    num_classes: int
    hidden_dim: int
    num_queries: int
    num_patterns: int = 0
    random_refpoints_xy: bool = False
    indicator: bool = True
    pattern_init: nn.initializers.Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(
        self, levels: Levels, dn: Denoising | None, *, attend_padding: bool = False
    ) -> Queries:
        """Makes the queries of a batch, see `with_denoising`; `levels` give its size alone."""
        normal, width = nn.initializers.normal(1.0), self.hidden_dim - self.indicator
        table = self.param("label_embedding", normal, (self.num_classes + 1, width))
        init = _anchor_init(self.random_refpoints_xy)
        anchors = self.param("anchors", init, (self.num_queries, 4))
        content = jnp.pad(table[-1], (0, int(self.indicator)))  # "no object", indicator 0
        content = jnp.broadcast_to(content, (self.num_queries, self.hidden_dim))
        if self.num_patterns:
            shape = (self.num_patterns, self.hidden_dim)
            patterns = self.param("patterns", self.pattern_init, shape)
            content = (content + patterns[:, None]).reshape(-1, self.hidden_dim)
            anchors = jnp.tile(anchors, (self.num_patterns, 1))
        batch = levels.tokens.shape[0]
        content = jnp.broadcast_to(content, (batch, *content.shape))
        anchors = jnp.broadcast_to(anchors, (batch, *anchors.shape))
        return with_denoising(
            content,
            anchors,
            table,
            dn,
            indicator=self.indicator,
            attend_padding=attend_padding,
        )


class LearnedQueries(nn.Module):
    """Learned anchors, each with a learned content, as in DN-Deformable-DETR and DINO.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      num_queries: N.
      indicator: the last channel tells denoising queries (1) from matching queries (0).
    """

    num_classes: int
    hidden_dim: int
    num_queries: int
    indicator: bool = False

    @nn.compact
    def __call__(
        self, levels: Levels, dn: Denoising | None, *, attend_padding: bool = False
    ) -> Queries:
        """Makes the queries of a batch, see `with_denoising`; `levels` give its size alone."""
        normal, width = nn.initializers.normal(1.0), self.hidden_dim - self.indicator
        table = self.param("label_embedding", normal, (self.num_classes + 1, width))
        anchors = self.param("anchors", _anchor_init(False), (self.num_queries, 4))
        content = self.param("content", normal, (self.num_queries, width))
        content = jnp.pad(content, ((0, 0), (0, int(self.indicator))))
        batch = levels.tokens.shape[0]
        content = jnp.broadcast_to(content, (batch, *content.shape))
        anchors = jnp.broadcast_to(anchors, (batch, *anchors.shape))
        return with_denoising(
            content,
            anchors,
            table,
            dn,
            indicator=self.indicator,
            attend_padding=attend_padding,
        )
