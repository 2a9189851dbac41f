"""Small directories in the format of COCO, made of drawn images, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = ({"id": 7, "name": "fish"}, {"id": 3, "name": "cat"}, {"id": 5, "name": "dog"})


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns a smooth image with some grain, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (3, 4, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (height, width, 3))
    return np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)


def document(
    count: int = 6, seed: int = 0, categories: Sequence[dict[str, Any]] = CATEGORIES
) -> dict[str, Any]:
    """Returns an annotation file of `count` images; the last one has no objects."""
    rng = np.random.default_rng([seed, count])
    images, annotations = [], []
    for i in range(count):
        height, width = (int(v) for v in rng.integers(40, 64, 2))
        image_id = 500 - 7 * i
        name = f"{image_id:04d}.jpg"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for _ in range(0 if i == count - 1 else int(rng.integers(1, 5))):
            left, top = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
            box = [left, top, rng.uniform(1, width / 2), rng.uniform(1, height / 2)]
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": image_id,
                    "category_id": int(rng.choice([category["id"] for category in categories])),
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3] * 0.7, 4),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    rng.shuffle(annotations)
    return {"images": images, "annotations": annotations, "categories": list(categories)}


def write_split(annotations: Path, images: Path, content: dict[str, Any], seed: int = 0) -> None:
    """Writes an annotation file, and draws its images."""
    annotations.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(content))
    for number, image in enumerate(content["images"]):
        pixels = photograph(image["height"], image["width"], 1000 * seed + number)
        path = images / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_coco(
    directory: Path,
    train: int = 6,
    validation: int = 4,
    categories: Sequence[dict[str, Any]] = CATEGORIES,
) -> Path:
    """Writes a directory in the layout of COCO 2017."""
    for number, (name, count) in enumerate({"train2017": train, "val2017": validation}.items()):
        path = directory / "annotations" / f"instances_{name}.json"
        write_split(path, directory / name, document(count, number, categories), number)
    return directory
