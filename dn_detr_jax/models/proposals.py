"""Queries at the best proposals of the encoder: the two stages of DINO.

Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
ICLR 2023, section 3.4: the anchors of the queries are proposals, their contents are learned. The
proposals are those of Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object
Detection", ICLR 2021, appendix A.4: a box at every token, refined by the encoder's own heads.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Bool, Float, Int
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.models.heads import box_head, class_head
from dn_detr_jax.models.layers import Linear, layer_norm
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.queries import Queries, with_denoising

_SIDE = 0.05  # of proposals of the finest level; it doubles from level to level
_MARGIN = 0.01  # proposals whose coordinates are nearer to 0 or 1 are not used
_NO_OBJECT_LOGIT = -1e4  # its loss and gradient are 0


def token_boxes(levels: Levels) -> tuple[Float[jax.Array, "B T 4"], Bool[jax.Array, "B T"]]:
    """Makes a box at every token.

    Returns:
      float32 [B, T, 4] cxcywh in logit space, infinite where there is no box, and bool [B, T]:
      there is a box. Padded tokens and those near the border have none.
    """
    sides = np.concatenate(
        [np.full(height * width, _SIDE * 2**i) for i, (height, width) in enumerate(levels.shapes)]
    )
    centers = levels.centers()
    sizes = jnp.broadcast_to(sides.astype(np.float32)[:, None], centers.shape)
    boxes = jnp.concatenate([centers, sizes], axis=-1)
    usable = jnp.all((boxes > _MARGIN) & (boxes < 1 - _MARGIN), axis=-1) & levels.valid
    logits = jnp.log(boxes / (1 - boxes))
    return jnp.where(usable[..., None], logits, jnp.inf), usable


class SelectedProposals(nn.Module):
    """Queries at the proposals with the highest scores, each with a learned content.

    The heads of the proposals have the number of decoder layers as their index.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      num_queries: N.
      num_layers: L of the decoder.
      score: "class": the highest logit, trained by the classes of the selected proposals, as in
        DINO; "objectness": logit 0, trained as "some object" by all proposals, as in the DINO of
        the official DN-DETR code.
      indicator: the content of denoising queries has a last channel of ones.
      mask_padding: results do not depend on the canvas; False: they do, as in PyTorch.
      dtype: of the compute.
    """

    num_classes: int
    hidden_dim: int
    num_queries: int
    num_layers: int
    score: Literal["class", "objectness"] = "class"
    indicator: bool = False
    mask_padding: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, levels: Levels, dn: Denoising | None, *, attend_padding: bool = False
    ) -> Queries:
        """Selects proposals, see `with_denoising`.

        The outputs of the queries are those that `criterion.parts_with_proposals` reads.
        """
        boxes, usable = token_boxes(levels)
        tokens = jnp.where(usable[..., None], levels.tokens, 0)
        hidden = ~levels.valid if self.mask_padding else jnp.zeros_like(usable)
        # A small canvas may have fewer tokens than there are queries.
        missing = ((0, 0), (0, max(0, self.num_queries - tokens.shape[1])))
        tokens = jnp.pad(tokens, (*missing, (0, 0)))
        boxes = jnp.pad(boxes, (*missing, (0, 0)), constant_values=jnp.inf)
        hidden = jnp.pad(hidden, missing, constant_values=True)

        zeros, exact = nn.initializers.zeros, jnp.float32
        name = "proposal_proj"
        x = Linear(self.hidden_dim, zeros, dtype=self.dtype, out_dtype=exact, name=name)(tokens)
        x = layer_norm("proposal_norm")(x)
        logits = class_head(self.num_classes, self.dtype, f"class_head_{self.num_layers}")(x)
        offsets = box_head(self.hidden_dim, self.dtype, f"box_head_{self.num_layers}")

        by_class = self.score == "class"
        scores = logits.max(axis=-1) if by_class else logits[..., 0]
        self.sow("intermediates", "encoder_scores", scores)
        scores = jnp.where(hidden, -jnp.inf, jax.lax.stop_gradient(scores))
        selected = self.select(scores)
        self.sow("intermediates", "selected", selected)

        def take(y):
            return jnp.take_along_axis(y, selected[..., None], axis=1)

        if by_class:
            predicted = anchors = offsets(take(x)) + take(boxes)
            outputs = {"encoder_logits": take(logits)}
        else:
            predicted = offsets(x) + boxes
            anchors = take(predicted)
            outputs = {"objectness_logits": jnp.where(hidden[..., None], _NO_OBJECT_LOGIT, logits)}
        outputs["encoder_boxes"] = jax.nn.sigmoid(predicted)
        return self._queries(jax.lax.stop_gradient(anchors), dn, attend_padding).replace(
            outputs={name: value[None] for name, value in outputs.items()}
        )

    def select(self, scores: Float[Array, "B T"]) -> Int[jax.Array, "B N"]:
        """Returns the tokens with the highest scores, in descending order."""
        return jax.lax.top_k(scores, self.num_queries)[1]

    def _queries(
        self, anchors: Float[Array, "B N 4"], dn: Denoising | None, attend_padding: bool
    ) -> Queries:
        normal, width = nn.initializers.normal(1.0), self.hidden_dim - self.indicator
        table = self.param("label_embedding", normal, (self.num_classes + 1, width))
        content = self.param("content", normal, (self.num_queries, self.hidden_dim))
        content = jnp.broadcast_to(content, (anchors.shape[0], *content.shape))
        options = {"indicator": self.indicator, "attend_padding": attend_padding}
        return with_denoising(content, anchors, table, dn, **options)
