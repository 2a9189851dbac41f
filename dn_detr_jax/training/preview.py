"""Training images as files, as the model gets them."""

import contextlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.boxes import cxcywh_to_xyxy
from dn_detr_jax.data.datasets import Dataset
from dn_detr_jax.data.loader import train_batches
from dn_detr_jax.visualize.boxes import draw_boxes
from dn_detr_jax.visualize.save import save_png


def write_preview(
    training: Dataset, config: ConfigDict, folder: Path, count: int, step: int = 0
) -> None:
    """Writes training images with their boxes, on their canvases.

    Args:
      training: the training split.
      config: whole configuration; zeros are replaced by the counts of the data.
      folder: made if it is missing.
      count: of images.
      step: of the training, whose images come first.

    Raises:
      ConfigError, DataError: as `train_batches`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [category.name for category in training.categories]
    rows = config.train.batch_size
    batches = train_batches(training, config, step, -(-count // rows))
    with contextlib.closing(batches):
        for number in range(count):
            row = number % rows
            if row == 0:
                batch = next(batches)
            valid, (height, width) = batch["valid"][row], batch["size"][row]
            boxes = np.asarray(cxcywh_to_xyxy(batch["boxes"][row][valid]))
            labels = batch["labels"][row][valid]
            drawn = draw_boxes(
                batch["image"][row],
                boxes * (width, height, width, height),
                labels,
                [names[label] or str(label) for label in labels],
            )
            image_id = int(batch["image_id"][row])
            name = f"step_{step + number // rows:06d}_row_{row:03d}_image_{image_id}.png"
            save_png(drawn, folder / name)
