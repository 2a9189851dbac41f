"""Figures of a run: detections, and the denoising queries of a training image."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.boxes import cxcywh_to_xyxy
from dn_detr_jax.data.datasets import Dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.data.plan import process_rows
from dn_detr_jax.evaluation.evaluator import Detect
from dn_detr_jax.models.registry import num_matching_queries
from dn_detr_jax.sharding import put_batch
from dn_detr_jax.visualize.boxes import LabeledImage, render_noised_boxes
from dn_detr_jax.visualize.plots import render_attention_mask
from dn_detr_jax.visualize.save import save_png


def _in_pixels(boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Normalized cxcywh [..., 4] to xyxy in pixels of an image of `size` (height, width)."""
    height, width = size
    return np.asarray(cxcywh_to_xyxy(jnp.asarray(boxes))) * np.array([width, height, width, height])


def _valid_part(batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    height, width = batch["size"][row]
    return batch["image"][row, :height, :width]


def detected(
    params: dict, detect: Detect, dataset: Dataset, config: ConfigDict, mesh: Mesh
) -> list[LabeledImage]:
    """Returns the first `config.eval.pictures` images of a split with predicted and true boxes.

    Every process returns all of them: it reads all, and puts its own rows on its devices.
    """
    subset = np.arange(min(config.eval.pictures, len(dataset)))
    rows = process_rows(config.eval.batch_size, jax.process_index(), jax.process_count())
    shown = []
    for batch in eval_batches(dataset, config, subset=subset):
        del batch["dropped_objects"], batch["bad_images"]
        own = {name: values[rows] for name, values in batch.items()}
        found = jax.device_get(detect(params, put_batch(own, mesh)))
        for row in np.flatnonzero(batch["image_id"] >= 0).tolist():
            size, real = batch["size"][row], batch["valid"][row]
            shown.append(
                LabeledImage(
                    image=_valid_part(batch, row),
                    pred_boxes=_in_pixels(found["boxes"][row], size),
                    pred_labels=found["labels"][row],
                    pred_scores=found["scores"][row],
                    true_boxes=_in_pixels(batch["boxes"][row, real], size),
                    true_labels=batch["labels"][row, real],
                    image_id=int(batch["image_id"][row]),
                )
            )
    return sorted(shown, key=lambda image: image.image_id)


def typical_image(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the image with the median number of objects, of those with any, as a batch of one."""
    counts = batch["valid"].sum(axis=1)
    order = np.argsort(counts, kind="stable")
    with_objects = order[counts[order] > 0]
    row = int(with_objects[len(with_objects) // 2]) if len(with_objects) else 0
    return {name: values[row : row + 1] for name, values in batch.items()}


def denoising_groups(
    batch: dict[str, np.ndarray],
    dn: denoising.Denoising,
    config: ConfigDict,
    class_names: list[str],
) -> dict[str, np.ndarray]:
    """Draws the noised boxes of each group over their image, and the attention mask, in RGB.

    With contrastive denoising only the boxes of the positives are drawn.

    Args:
      batch: of one image.
      dn: its denoising queries.
      config: whole configuration.
      class_names: by label.
    """
    num_queries = num_matching_queries(config.model)
    mask = denoising.attention_mask(dn, num_queries, attend_padding=config.dn.attend_padding)
    drawn = {
        "attention_mask": render_attention_mask(
            np.asarray(mask[0]), np.asarray(dn.group[0]), np.asarray(dn.valid[0])
        )
    }
    shown = np.asarray(dn.valid[0] & ~dn.negative[0])
    if shown.any():
        size, groups = batch["size"][0], len(np.unique(np.asarray(dn.group[0])[shown]))

        def by_group(x):  # [1, S, ...] -> [G, n, ...]
            return np.asarray(x[0])[shown].reshape(groups, -1, *x.shape[2:])

        drawn["noised_boxes"] = render_noised_boxes(
            _valid_part(batch, 0),
            _in_pixels(by_group(dn.target_boxes)[0], size),
            _in_pixels(by_group(dn.boxes), size),
            by_group(dn.target_labels)[0],
            by_group(dn.labels),
            class_names,
        )
    return drawn


def save(images: dict[str, np.ndarray], folder: Path) -> None:
    """Writes {name: RGB} as `name.png` into a folder, which is made if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        save_png(image, folder / f"{name}.png")
