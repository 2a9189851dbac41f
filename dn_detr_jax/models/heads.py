"""Prediction heads: classes and boxes of the states of every decoder layer."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dn_detr_jax.arrays import Array, Float
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.models.initializers import prior_probability_bias, torch_default_kernel
from dn_detr_jax.models.layers import MLP, Linear


def class_head(num_classes: int, dtype: DTypeLike, name: str | None = None) -> Linear:
    """Makes a class head whose initial scores are 0.01."""
    return Linear(
        num_classes,
        prior_probability_bias(),
        torch_default_kernel,
        dtype=dtype,
        out_dtype=jnp.float32,
        name=name,
    )


def box_head(
    hidden_dim: int, dtype: DTypeLike, name: str | None = None, *, initial_size: float | None = 0.0
) -> MLP:
    """Makes a box head whose initial offsets are 0, those of width and height `initial_size`.

    None: all of them are random.
    """
    start = None if initial_size is None else (0.0, 0.0, initial_size, initial_size)
    features = (hidden_dim, hidden_dim, 4)
    return MLP(features, torch_default_kernel, last_constant=start, dtype=dtype, name=name)


def _outputs(
    logits: Float[Array, "L B Q K"],
    offsets: Float[Array, "L B Q 4"],
    references: Float[Array, "L B Q 4"],
) -> dict[str, Float[jax.Array, "L B Q _"]]:
    boxes = jax.nn.sigmoid(offsets + inverse_sigmoid(references))
    return {"pred_logits": logits, "pred_boxes": boxes}


class SharedHeads(nn.Module):
    """One class head and one box head for all decoder layers.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      dtype: of the compute.
      start_at_anchors: the initial offsets of boxes are 0; False: they are random.
    """

    num_classes: int
    hidden_dim: int
    dtype: DTypeLike = jnp.float32
    start_at_anchors: bool = True

    def setup(self):
        """Makes the heads."""
        self.class_head = class_head(self.num_classes, self.dtype)
        self.box_head = box_head(
            self.hidden_dim, self.dtype, initial_size=0.0 if self.start_at_anchors else None
        )

    def box_offsets(
        self, layer: int, x: Float[Array, "*queries D"]
    ) -> Float[jax.Array, "*queries 4"]:
        """Offsets of boxes in logit space, [..., D] to float32 [..., 4]."""
        del layer
        return self.box_head(x)

    def __call__(
        self, states: Float[Array, "L B Q D"], references: Float[Array, "L B Q 4"]
    ) -> dict[str, Float[jax.Array, "L B Q _"]]:
        """Predicts classes and boxes.

        Args:
          states: [L, B, Q, D] of all decoder layers.
          references: float32 [L, B, Q, 4] cxcywh, which the boxes are predicted relative to.

        Returns:
          `pred_logits` float32 [L, B, Q, C] and `pred_boxes` float32 [L, B, Q, 4] cxcywh.
        """
        logits = self.class_head(states)
        return _outputs(logits, self.box_head(states), references)


class LayerHeads(nn.Module):
    """A class head and a box head for each decoder layer, called like `SharedHeads`.

    Attributes:
      num_layers: L.
      num_classes: C.
      hidden_dim: D.
      dtype: of the compute.
      initial_size: initial offset of width and height in the first layer, in logit space; boxes
        start smaller than their anchors by it.
    """

    num_layers: int
    num_classes: int
    hidden_dim: int
    dtype: DTypeLike = jnp.float32
    initial_size: float = 0.0

    def setup(self):
        """Makes the heads."""
        sizes = [self.initial_size, *[0.0] * (self.num_layers - 1)]
        self.class_head = [class_head(self.num_classes, self.dtype) for _ in sizes]
        self.box_head = [box_head(self.hidden_dim, self.dtype, initial_size=x) for x in sizes]

    def box_offsets(
        self, layer: int, x: Float[Array, "*queries D"]
    ) -> Float[jax.Array, "*queries 4"]:
        """See `SharedHeads.box_offsets`."""
        return self.box_head[layer](x)

    def __call__(
        self, states: Float[Array, "L B Q D"], references: Float[Array, "L B Q 4"]
    ) -> dict[str, Float[jax.Array, "L B Q _"]]:
        """See `SharedHeads.__call__`."""
        logits = [head(x) for head, x in zip(self.class_head, states, strict=True)]
        offsets = [head(x) for head, x in zip(self.box_head, states, strict=True)]
        return _outputs(jnp.stack(logits), jnp.stack(offsets), references)
