"""Cutting a data set into tiles: pixels and objects of every tile are those of the image."""

import json

import numpy as np
import pytest
from coco_directory import CATEGORIES, photograph
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import write_voc, write_yolo
from PIL import Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data.check import check
from dn_detr_jax.data.cutting import Tiling, cut, cut_boxes, tile_edges
from dn_detr_jax.errors import DataError

SIZE = (70, 100)
NAMES = {"train": "train", "validation": "val"}


def data_config(directory, **values):
    config = base_config().data
    config.update(name="coco", dir=str(directory), **values)
    return config


def content(names, boxes, crowd=()):
    """A COCO file of images of `SIZE`, each with the same objects."""
    images = [
        {"id": 5 + i, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for i, name in enumerate(names)
    ]
    annotations = [
        {"image_id": image["id"], "bbox": list(box), "area": box[2] * box[3] / 2}
        | {"category_id": CATEGORIES[k % 3]["id"], "iscrowd": int(k in crowd)}
        for image in images
        for k, box in enumerate(boxes)
    ]
    for number, found in enumerate(annotations):
        found["id"] = number
    return {"images": images, "annotations": annotations, "categories": list(CATEGORIES)}


def write(directory, splits):
    """Writes a directory in the format of COCO; images are PNG files, so that pixels stay."""
    for seed, (name, found) in enumerate(splits.items()):
        path = directory / "annotations" / f"instances_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        for number, image in enumerate(found["images"]):
            file = directory / name / image["file_name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = photograph(*SIZE, seed=10 * seed + number)
            Image.fromarray(pixels).save(file)
    return directory


def read(folder, split):
    """Returns the tiles of a split: file name -> (size, objects)."""
    name = NAMES[split]
    found = json.loads((folder / "annotations" / f"instances_{name}.json").read_text())
    tiles = {image["id"]: image for image in found["images"]}
    objects = {image_id: [] for image_id in tiles}
    for annotation in found["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    return {
        image["file_name"]: ((image["height"], image["width"]), objects[image_id])
        for image_id, image in tiles.items()
    }


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_cut_boxes_agree_with_counted_pixels(data):
    """Catches shifted boxes, and shares of the whole box where a part lies outside the image."""
    height, width = (data.draw(st.integers(5, 30)) for _ in range(2))
    left, top = data.draw(st.integers(-6, width - 1)), data.draw(st.integers(-6, height - 1))
    box = (left, top, data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    edges = np.array(
        [x, y, data.draw(st.integers(x + 1, width)), data.draw(st.integers(y + 1, height))]
    )
    drawn = np.zeros((height, width), bool)
    drawn[max(top, 0) : max(top + box[3], 0), max(left, 0) : max(left + box[2], 0)] = True
    part = drawn[edges[1] : edges[3], edges[0] : edges[2]]

    (cut_box,), (share,) = cut_boxes(np.array([box], float), edges, (height, width))
    assert share == pytest.approx(part.sum() / max(drawn.sum(), 1))
    if part.any():
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        expected = [columns[0], rows[0], len(columns), len(rows)]
        assert cut_box.tolist() == expected


def test_boxes_that_are_not_finite_are_in_no_tile():
    boxes = np.array([[np.nan, 0, 5, 5], [1e308, 0, 1e308, 5], [0, 0, np.inf, 5]])
    _, shares = cut_boxes(boxes, np.array([0, 0, 10, 10]), (20, 20))
    assert shares.tolist() == [0, 0, 0.5]


def test_tiles_have_the_pixels_and_objects_of_their_place(tmp_path):
    """Catches tiles, boxes and areas that are not of the same place, and images that are lost."""
    boxes = [(2, 3, 20, 10), (30.5, 12.25, 25, 30), (80, 50, 19, 19), (0, 0, 100, 70)]
    write(
        tmp_path / "a",
        {"train": content(["x/1.png", "2.png"], boxes), "val": content(["3.png"], [])},
    )
    splits = cut(data_config(tmp_path / "a"), tmp_path / "tiles", Tiling(40, 0.3, 0.5))

    assert [(split.name, split.images) for split in splits] == [("train", 2), ("validation", 1)]
    edges = tile_edges(SIZE, 40, 0.3)
    tiles = read(tmp_path / "tiles", "train")
    assert len(tiles) == len(splits[0].tiles.image_ids) == 2 * len(edges)
    for seed, stem in enumerate(("x/1", "2")):
        image, whole = photograph(*SIZE, seed=seed), [0] * len(boxes)
        for left, top, right, bottom in edges.tolist():
            size, objects = tiles[f"{stem}_{left}_{top}.png"]
            pixels = np.asarray(
                Image.open(tmp_path / "tiles" / "train" / f"{stem}_{left}_{top}.png")
            )
            assert size == pixels.shape[:2] == (bottom - top, right - left)
            np.testing.assert_array_equal(pixels, image[top:bottom, left:right])
            for found in objects:
                x, y, width, height = found["bbox"]
                assert min(x, y) >= 0 and x + width <= size[1] and y + height <= size[0]
                (k,) = (
                    k
                    for k, box in enumerate(boxes)
                    if CATEGORIES[k % 3]["id"] == found["category_id"]
                    and max(box[0], left) == left + x
                    and max(box[1], top) == top + y
                    and min(box[0] + box[2], right) == left + x + width
                )
                share = width * height / (boxes[k][2] * boxes[k][3])
                assert found["area"] == pytest.approx(boxes[k][2] * boxes[k][3] / 2 * share)
                assert found["iscrowd"] == (share < 0.5)
                whole[k] += share == 1
        # What is at most as large as the overlap is whole in a tile; what fits into none is not.
        assert whole[0] >= 1 and whole[3] == 0
    assert read(tmp_path / "tiles", "validation") == {
        f"3_{left}_{top}.png": ((bottom - top, right - left), [])
        for left, top, right, bottom in edges.tolist()
    }


def test_what_is_left_of_an_object_is_neither_learned_nor_missed(tmp_path):
    """Catches slivers as training targets, and crowd regions that become objects."""
    boxes = [(0, 0, 50, 10), (35, 20, 10, 10), (5, 50, 10, 10)]
    found = content(["1.png"], boxes, crowd=(2,))
    write(tmp_path / "a", {"train": found, "val": found})
    cut(data_config(tmp_path / "a"), tmp_path / "tiles", Tiling(50, 0.0, 0.9))
    tiles = read(tmp_path / "tiles", "train")
    assert list(tiles) == ["1_0_0.png", "1_50_0.png", "1_0_20.png", "1_50_20.png"]
    ignored = {
        name: [(found["bbox"], found["iscrowd"]) for found in objects]
        for name, (_, objects) in tiles.items()
    }
    assert ignored["1_0_0.png"] == [([0, 0, 50, 10], 0), ([35, 20, 10, 10], 0)]
    assert ignored["1_0_20.png"] == [([35, 0, 10, 10], 0), ([5, 30, 10, 10], 1)]
    assert ignored["1_50_0.png"] == ignored["1_50_20.png"] == []

    cut(data_config(tmp_path / "a"), tmp_path / "others", Tiling(40, 0.0, 0.9))
    _, objects = read(tmp_path / "others", "train")["1_0_0.png"]
    assert [(found["bbox"], found["iscrowd"]) for found in objects] == [
        ([0, 0, 40, 10], 1),  # 80% of it
        ([35, 20, 5, 10], 1),  # half of it
    ]


def test_every_format_gives_the_same_tiles_which_can_be_trained_on(tmp_path):
    """Catches a reader that is left out, and tiles that this package can't read itself."""
    boxes = [(2, 3, 20, 10), (30, 12, 24, 30)]
    splits = {"train": content(["1.jpg"], boxes), "val": content(["2.jpg"], boxes)}
    read_back = []
    for write_format in (write_voc, write_yolo):
        directory = tmp_path / write_format.__name__
        directory.mkdir()
        write_format(directory, splits)
        cut(data_config(directory), directory / "tiles", Tiling(60))
        checked = check(data_config(directory / "tiles"), decode=True)
        assert [(dict(s.findings.errors), len(s.paths)) for s in checked] == [({}, 4), ({}, 4)]
        read_back.append([split.annotations.bboxes for split in checked])
    for voc, yolo in zip(*read_back, strict=True):
        np.testing.assert_allclose(voc, yolo, atol=1e-4)


def test_a_divided_data_set_is_divided_by_image(tmp_path):
    """Catches tiles of one image in both splits, which makes AP too high."""
    write(tmp_path / "a", {"train": content([f"{i}.png" for i in range(4)], [(1, 1, 9, 9)])})
    config = data_config(tmp_path / "a", prepare_split=0.5)
    cut(config, tmp_path / "tiles", Tiling(60))
    images = [{name.split("_")[0] for name in read(tmp_path / "tiles", s)} for s in NAMES]
    assert images[0] | images[1] == set("0123") and not images[0] & images[1]
    # Without a share there is no validation split to cut.
    (split,) = cut(data_config(tmp_path / "a"), tmp_path / "other", Tiling(60))
    assert split.name == "train" and not (tmp_path / "other" / "val").exists()


def test_every_image_has_tiles_of_its_own_inside_the_folder(tmp_path):
    """Catches tiles that replace others, and names that lead out of the folder."""
    names = ["1.png", "1.bmp", "1_2.png", "../train/1.jpg", "../other/3.png"]
    write(tmp_path / "a", {"train": content(names, [(1, 1, 9, 9)])})
    cut(data_config(tmp_path / "a"), tmp_path / "tiles", Tiling(100))
    stems = {"1", "1_2", "1_2_2", "train/1", "other/3"}
    assert set(read(tmp_path / "tiles", "train")) == {f"{stem}_0_0.png" for stem in stems}
    assert len(list((tmp_path / "tiles" / "train").rglob("*.png"))) == 5
    assert not list((tmp_path / "a").rglob("*_0_0.png"))


def test_a_folder_that_exists_stays_as_it_is(tmp_path):
    write(tmp_path / "a", {"train": content(["1.png"], [(1, 1, 9, 9)])})
    (tmp_path / "tiles").mkdir()
    with pytest.raises(DataError, match="tiles exists: delete it, or name another folder"):
        cut(data_config(tmp_path / "a"), tmp_path / "tiles", Tiling(60))
    assert list((tmp_path / "tiles").iterdir()) == []


def test_an_error_leaves_nothing_behind(tmp_path):
    """Catches half a data set that looks like a whole one."""
    write(tmp_path / "a", {"train": content(["1.png", "2.png"], [(1, 1, 9, 9)])})
    (tmp_path / "a" / "train" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png: .*no readable image"):
        cut(data_config(tmp_path / "a"), tmp_path / "tiles", Tiling(60))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [((0,), "tile is 0"), ((9, 0.95), "overlap is 0.95"), ((9, 0.2, 0.0), "visible is 0.0")],
)
def test_values_out_of_range(values, message):
    with pytest.raises(DataError, match=message):
        Tiling(*values)
