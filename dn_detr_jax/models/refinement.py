"""The loop of every decoder: a layer, then a refinement of the anchors for the next one.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
appendix A.4, and Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR
2022, section 4.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dn_detr_jax.arrays import Float
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.models.queries import Queries


def refine(
    decode: Callable[[int, jax.Array, jax.Array], jax.Array],
    queries: Queries,
    num_layers: int,
    box_offsets: Callable[[int, jax.Array], jax.Array],
    *,
    norm: Callable[[jax.Array], jax.Array] | None = None,
    look_forward: bool,
) -> tuple[Float[jax.Array, "L B Q D"], Float[jax.Array, "L B Q 4"]]:
    """Applies decoder layers, and refines the anchors after each of them but the last.

    Args:
      decode: (layer, content [B, Q, D], anchors [B, Q, 4] cxcywh) -> content.
      queries: content and anchors of the first layer.
      num_layers: L.
      box_offsets: (layer, content) -> float32 [B, Q, 4] in logit space.
      norm: of the returned states; None: none.
      look_forward: gradients flow through the returned boxes into the layer before (the "look
        forward twice" of DINO, section 3.5; DAB-DETR does the same). They never flow through the
        anchors that are handed from layer to layer.

    Returns:
      States [L, B, Q, D], and the float32 [L, B, Q, 4] cxcywh boxes that a layer's predictions are
      relative to.
    """
    x, reference = queries.content, jax.nn.sigmoid(queries.anchors)
    states, references = [], [reference]
    for i in range(num_layers):
        x = decode(i, x, reference)
        states.append(x if norm is None else norm(x))
        if i < num_layers - 1:
            refined = jax.nn.sigmoid(box_offsets(i, x) + inverse_sigmoid(reference))
            reference = jax.lax.stop_gradient(refined)
            references.append(refined if look_forward else reference)
    return jnp.stack(states), jnp.stack(references)
