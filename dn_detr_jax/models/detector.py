"""The detector of the whole family, as a composition of independent parts.

A variant chooses the parts; none of them knows the classes of the others. They hand on small
structs: a backbone returns a tuple of feature maps, a pyramid and an encoder return `Levels`, a
module for queries returns `Queries`, a decoder returns states and references.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float, Int
from dn_detr_jax.denoising import Denoising


class Detector(nn.Module):
    """A DETR: backbone, pyramid, encoder, queries, decoder and heads.

    Backbone, encoder and decoder have their parameters under their names; those of pyramid, queries
    and heads stand beside them.

    Attributes:
      backbone: (image, size, train) -> feature maps [B, h, w, C], finest first.
      pyramid: (features, size, canvas) -> `Levels`.
      encoder: (levels, train) -> `Levels`, the memory.
      queries: (levels, dn, attend_padding) -> `Queries`.
      decoder: (queries, levels, box_offsets, train) -> states [L, B, Q, D] and the boxes
        [L, B, Q, 4] that predictions are relative to.
      heads: (states, references) -> `pred_logits` and `pred_boxes`; its `box_offsets(layer, x)`
        refines boxes from layer to layer.
      dtype: of the images that the backbone gets.
    """

    backbone: nn.Module
    pyramid: nn.Module
    encoder: nn.Module
    queries: nn.Module
    decoder: nn.Module
    heads: nn.Module
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Puts the parameters of pyramid, queries and heads at the top level."""
        for part in (self.pyramid, self.queries, self.heads):
            nn.share_scope(self, part)

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        size: Int[Array, "B 2"],
        dn: Denoising | None = None,
        *,
        attend_padding: bool = False,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        """Detects objects.

        Args:
          image: float [B, H, W, 3], see `images.normalize_images`.
          size: int [B, 2], valid height and width.
          dn: denoising queries with S slots, in training.
          attend_padding: see `denoising.attention_mask`.
          train: dropout is active, in the backbone that of whole residuals.

        Returns:
          `pred_logits` float32 [L, B, S + N, C] and `pred_boxes` float32 [L, B, S + N, 4], cxcywh
          relative to the valid size, of every decoder layer; denoising slots come first. And what
          the queries have predicted, see `Queries.outputs`.
        """
        features = self.backbone(image.astype(self.dtype), size, train=train)
        levels = self.pyramid(features, size, image.shape[1:3])
        memory = self.encoder(levels, train=train)
        queries = self.queries(memory, dn, attend_padding=attend_padding)
        states, references = self.decoder(queries, memory, self.heads.box_offsets, train=train)
        self.sow("intermediates", "hs", states)
        self.sow("intermediates", "references", references)
        return self.heads(states, references) | queries.outputs
