"""Contrastive denoising as in the official DN-DETR code, for the comparison with it.

There a negative has the content "no object", which names the answer. DINO's own code and this
package give it the label of its object.

The official code also has a slip. It lists the objects of a batch image by image, each image's
positives followed by its negatives. It gives the larger noise to the second half of the whole list
and takes the boxes of the first half for its loss; its class targets are right. That changes
nothing if only one image has objects. This package treats every image by itself.

The comparison puts both into the queries of this package.
"""

import jax.numpy as jnp
import numpy as np

from dn_detr_jax import denoising


def with_halves_of_the_batch(
    dn: denoising.Denoising,
    noise: denoising.Noise,
    rows: tuple[np.ndarray, np.ndarray],
    groups: int,
    *,
    label_noise: float,
    box_noise: float,
) -> denoising.Denoising:
    """Contrastive queries with the contents and the slip of the official code, see above."""
    count = len(rows[0]) // groups
    second_half = np.zeros(dn.valid.shape, bool)
    second_half[rows] = np.tile(np.arange(count) >= count // 2, groups)
    negative = jnp.asarray(second_half)
    labels = denoising.add_label_noise(dn.target_labels, noise, label_noise)
    return dn.replace(
        labels=jnp.where(negative, denoising.NO_OBJECT, labels),
        boxes=denoising.add_contrastive_box_noise(dn.target_boxes, noise, box_noise, negative),
        negative=negative,
    )
