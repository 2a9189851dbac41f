"""Writes the content of a COCO file in the formats of YOLO and Pascal VOC, for tests."""

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from coco_directory import write_split


def objects_by_image(content: dict[str, Any]) -> dict[int, list[dict]]:
    """The annotations of each image, by its id, in the order of the file."""
    found: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def write_yolo(directory: Path, splits: dict[str, dict[str, Any]], outlines: bool = False) -> Path:
    """Writes `data.yaml`, `images/` and `labels/`; class numbers are positions of categories."""
    categories = next(iter(splits.values()))["categories"]
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    lines = ["path: .", *(f"{name}: images/{name}" for name in splits)]
    names = [category["name"] for category in categories]
    (directory / "data.yaml").parent.mkdir(parents=True, exist_ok=True)
    lines += [f"nc: {len(names)}", f"names: {json.dumps(names)}"]
    (directory / "data.yaml").write_text("\n".join(lines) + "\n")
    for seed, (name, content) in enumerate(splits.items()):
        write_split(directory / "unused.json", directory / "images" / name, content, seed)
        (directory / "unused.json").unlink()
        by_image = objects_by_image(content)
        for image in content["images"]:
            found = by_image[image["id"]]
            text = "".join(
                yolo_line(numbers[o["category_id"]], o["bbox"], image, outlines) for o in found
            )
            path = directory / "labels" / name / Path(image["file_name"]).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            if found:  # an image without objects has no file
                path.write_text(text)
    return directory


def yolo_line(number: int, bbox: list[float], image: dict, outline: bool) -> str:
    """Returns a line of an object; as an outline, the four corners of its box."""
    left, top, width, height = bbox
    across, down = image["width"], image["height"]
    values = [(left + width / 2) / across, (top + height / 2) / down, width / across, height / down]
    if outline:
        right, bottom = left + width, top + height
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        values = [share for x, y in corners for share in (x / across, y / down)]
    return " ".join([str(number), *(f"{value:.8f}" for value in values)]) + "\n"


def voc_xml(image: dict, objects: list[dict], names: dict[int, str]) -> str:
    """Returns the XML file of an image; pixels are numbered from 1."""
    lines = ["<annotation>", f"  <filename>{escape(image['file_name'])}</filename>", "  <size>"]
    lines += [f"    <{side}>{image[side]}</{side}>" for side in ("width", "height")]
    lines += ["    <depth>3</depth>", "  </size>"]
    for found in objects:
        left, top, width, height = found["bbox"]
        lines += ["  <object>", f"    <name>{escape(names[found['category_id']])}</name>"]
        lines += [f"    <difficult>{found['iscrowd']}</difficult>", "    <bndbox>"]
        corners = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
        lines += [f"      <{side}>{value:.6f}</{side}>" for side, value in corners.items()]
        lines += ["    </bndbox>", "  </object>"]
    return "\n".join([*lines, "</annotation>", ""])


def write_voc(directory: Path, splits: dict[str, dict[str, Any]]) -> Path:
    """Writes `Annotations/`, `JPEGImages/` and `ImageSets/Main/`."""
    for seed, (name, content) in enumerate(splits.items()):
        write_split(directory / "unused.json", directory / "JPEGImages", content, seed)
        (directory / "unused.json").unlink()
        names = {category["id"]: category["name"] for category in content["categories"]}
        (directory / "Annotations").mkdir(exist_ok=True)
        lists = directory / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        stems = []
        for image in content["images"]:
            stem = Path(image["file_name"]).stem
            text = voc_xml(image, objects_by_image(content)[image["id"]], names)
            (directory / "Annotations" / f"{stem}.xml").write_text(text)
            stems.append(stem)
        (lists / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return directory
