"""Draws the figure of docs/augmentation.md.

    python docs/draw_augmentation.py docs/images/augmentation.png

Each row shows four images under one setting of `data.augment`, with their boxes. The images are
drawn scenes: a house, trees, a sun.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from dn_detr_jax.config import augment_preset, base_config
from dn_detr_jax.data.augmentation import augmented
from dn_detr_jax.data.mosaic import Scene
from dn_detr_jax.data.transforms import draw_geometry
from dn_detr_jax.visualize.boxes import draw_boxes
from dn_detr_jax.visualize.fonts import font
from dn_detr_jax.visualize.save import save_png

NAMES = ("house", "tree", "sun")
CELL, LABEL = 176, 150  # pixels: of an image, and left of a row
ROWS = {
    "the default": {},
    "vertical_flip, rotate": {"vertical_flip": 0.5, "rotate": 0.75, "crop": 0.0},
    "zoom_out": {"zoom_out": 1.0, "crop": 0.0},
    "iou_crop": {"iou_crop": 1.0},
    "scale (0.1, 2.0)": {"scale": (0.1, 2.0), "crop": 0.0},
    "mosaic": {"mosaic": 1.0},
    "brightness 0.3": {"brightness": 0.3, "crop": 0.0},
    "contrast 0.5": {"contrast": 0.5, "crop": 0.0},
    "saturation 0.7": {"saturation": 0.7, "crop": 0.0},
    "hue 0.05": {"hue": 0.05, "crop": 0.0},
    "conservative": augment_preset("conservative"),
    "aggressive": augment_preset("aggressive"),
    "aerial": augment_preset("aerial"),
}


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws a house, two trees and a sun at random places."""
    image = Image.new("RGB", (320, 240), "#9cc7e8")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 150, 320, 240), fill="#8aa05a")
    x, y, side = rng.integers((10, 70, 70), (60, 100, 100)).tolist()
    draw.rectangle((x, y + side // 2, x + side - 1, y + side + 39), fill="#c9583d")
    draw.polygon([(x, y + side // 2), (x + side // 2, y), (x + side - 1, y + side // 2)], "#704030")
    boxes, labels = [(x, y, x + side, y + side + 40)], [0]
    for left in (170, 245):
        a, b, width = rng.integers((0, 90, 40), (15, 120, 60)).tolist()
        a += left
        draw.rectangle((a + width // 2 - 5, b + width, a + width // 2 + 4, b + 99), fill="#5b4028")
        draw.ellipse((a, b, a + width - 1, b + width + 9), fill="#2f6b3a")
        boxes.append((a, b, a + width, b + 100))
        labels.append(1)
    a, b = rng.integers((120, 5), (280, 40)).tolist()
    draw.ellipse((a, b, a + 35, b + 35), fill="#f7d44a")
    return Scene(np.array(image), np.array([*boxes, (a, b, a + 36, b + 36)]), [*labels, 2])


def draw_row(settings: dict) -> Image.Image:
    """Draws four images under a setting; no canvas is larger than a cell."""
    augment = base_config().data.augment
    augment.update(short_sides=(120, 128, 132), max_long_side=CELL)
    augment.update(crop_resize=(150, 180), crop_size=(110, 160))
    augment.update(settings)
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(4)]
    sizes = np.array([scene.image.shape[:2] for scene in scenes])
    drawn = draw_geometry(np.random.default_rng(5), sizes, augment)
    row = Image.new("RGB", (4 * (CELL + 8), CELL + 8), "white")
    for i, scene in enumerate(scenes):
        others = scenes[i + 1 :] + scenes[:i]
        canvas = np.zeros((CELL, CELL, 3), np.uint8)
        rng = np.random.default_rng(i)
        scene = augmented(rng, scene, drawn.at(i), augment, lambda _, o=others: o, canvas)
        texts = [NAMES[label] for label in scene.labels]
        shown = draw_boxes(canvas, scene.boxes, np.asarray(scene.labels), texts)
        row.paste(Image.fromarray(shown), (i * (CELL + 8), 4))
    return row


def main() -> None:
    """Writes the figure."""
    figure = Image.new("RGB", (LABEL + 4 * (CELL + 8), len(ROWS) * (CELL + 8)), "white")
    draw = ImageDraw.Draw(figure)
    for number, (name, settings) in enumerate(ROWS.items()):
        top = number * (CELL + 8)
        draw.text((6, top + CELL // 2), name, fill="black", font=font(13), anchor="lm")
        figure.paste(draw_row(settings), (LABEL, top))
    save_png(np.asarray(figure.quantize(128).convert("RGB")), sys.argv[1])


if __name__ == "__main__":
    main()
