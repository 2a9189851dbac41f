"""Packing survives a kill, happens once, and detects new annotations."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from coco_directory import document, write_split
from PIL import ExifTags, Image

from dn_detr_jax.config import base_config
from dn_detr_jax.data import images, packing, shards
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import eval_batches
from dn_detr_jax.errors import DataError

COUNT = 40


@pytest.fixture
def coco_dir(tmp_path, monkeypatch):
    """Writes forty images, to be packed in ten shards."""
    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", 4)
    write_split(tmp_path / "train.json", tmp_path / "train", document(COUNT))
    return tmp_path


def data_config(directory, **values):
    config = base_config().data
    config.dir = str(directory)
    config.update(values)
    return config


def contents(dataset):
    """Returns all bytes of the examples."""
    examples = [dataset.source[i] for i in range(len(dataset))]
    return [(e.image_id, e.image, e.boxes.tolist(), e.labels.tolist()) for e in examples]


def packed_folders(directory):
    return sorted(path for path in (directory / "packed").iterdir() if path.is_dir())


def pack_elsewhere(directory, until=None):
    """Starts a process that packs, and pauses after its first shard until a file exists."""
    code = f"""
import logging, pathlib, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("absl").setLevel(logging.WARNING)
from dn_detr_jax.config import base_config
from dn_detr_jax.data import datasets, shards
shards.IMAGES_PER_SHARD = 4
write = shards._write_shard
def write_then_wait(path, *args):
    write(path, *args)
    while {str(until)!r} != "None" and not pathlib.Path({str(until)!r}).exists():
        time.sleep(0.01)
shards._write_shard = write_then_wait
c = base_config().data
c.dir = {str(directory)!r}
print(len(datasets.open_dataset(c, "train")))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_while_packing(directory):
    """Packs in another process, and kills it after its first shard."""
    process = pack_elsewhere(directory, until=directory / "never")
    wait_for_shards(directory, 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_shards(directory, count, process):
    deadline = time.monotonic() + 60
    while len(list(directory.glob("packed/*.partial/*array_record*-of-00010"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_images_are_packed_as_they_are(coco_dir):
    dataset = open_dataset(data_config(coco_dir), "train")
    for i, name in enumerate(dataset.annotations.file_names):
        assert dataset.source[i].image == (coco_dir / "train" / name).read_bytes()
    (folder,) = packed_folders(coco_dir)
    shards = list(folder.glob("*.array_record-*"))
    assert len(shards) == 10 and not list(folder.glob("*.partial"))


def test_a_killed_packing_is_continued(coco_dir, caplog):
    """Complete shards keep their inode; the records equal those of one uninterrupted packing."""
    kill_while_packing(coco_dir)
    (partial,) = packed_folders(coco_dir)
    # Killed while it wrote a shard, too.
    (partial / "coco_records-images.array_record-00009-of-00010.partial").write_bytes(b"half")
    before = {path.name: path.stat().st_ino for path in partial.glob("*-of-00010")}
    assert len(before) == 1
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(data_config(coco_dir), "train")
    assert "4 are there already" in caplog.text
    (folder,) = packed_folders(coco_dir)
    after = {path.name: path.stat().st_ino for path in folder.glob("*-of-00010")}
    assert len(after) == 10 and before.items() <= after.items()
    assert not list(folder.glob("*.partial"))
    at_once = data_config(coco_dir, packed_dir=str(coco_dir / "at_once"))
    assert contents(dataset) == contents(open_dataset(at_once, "train"))


def test_two_processes_at_once_pack_once(coco_dir):
    first = pack_elsewhere(coco_dir, until=coco_dir / "go")
    wait_for_shards(coco_dir, 1, first)
    second = pack_elsewhere(coco_dir)
    try:
        line = second.stderr.readline()
        assert "waiting for the process that packs" in line
        assert second.poll() is None
    finally:
        (coco_dir / "go").touch()
        results = [process.communicate(timeout=120) for process in (first, second)]
    assert [out for out, _ in results] == [f"{COUNT}\n"] * 2
    assert [log.count("packing 40 images") for _, log in results] == [1, 0]
    assert len(packed_folders(coco_dir)) == 1


def test_opening_again_reads_neither_annotations_nor_images(coco_dir, monkeypatch):
    first = contents(open_dataset(data_config(coco_dir), "train"))
    for path in (coco_dir / "train").iterdir():
        path.unlink()
    monkeypatch.setattr(json, "load", None)
    assert contents(open_dataset(data_config(coco_dir), "train")) == first


def test_a_packed_directory_may_move(coco_dir, monkeypatch):
    first = contents(open_dataset(data_config(coco_dir), "train"))
    moved = coco_dir.parent / f"{coco_dir.name}_moved"
    coco_dir.rename(moved)
    monkeypatch.setattr(packing, "_pack", None)
    assert contents(open_dataset(data_config(moved), "train")) == first


def test_new_annotations_are_packed_anew_and_replace_the_old(coco_dir, caplog):
    open_dataset(data_config(coco_dir), "train")
    (old,) = packed_folders(coco_dir)
    content = json.loads((coco_dir / "train.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (coco_dir / "train.json").write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(data_config(coco_dir), "train")
    assert "train.json has changed since it was packed: packing it again" in caplog.text
    (new,) = packed_folders(coco_dir)
    assert new != old
    assert len(dataset.source[0].labels) == 0 and dataset.annotations.counts.sum() > 0


def test_another_annotation_file_does_not_replace_the_first(coco_dir):
    """Catches experiments with different subsets that keep overwriting each other's records."""
    config = data_config(coco_dir)
    open_dataset(config, "train")
    content = document(2)
    write_split(coco_dir / "subset.json", coco_dir / "train", content)
    config.train.annotations = "subset.json"
    assert len(open_dataset(config, "train")) == 2
    assert len(packed_folders(coco_dir)) == 2


def test_what_a_killed_packing_of_old_annotations_left_is_removed(coco_dir):
    kill_while_packing(coco_dir)
    write_split(coco_dir / "train.json", coco_dir / "train", document(COUNT, seed=1))
    open_dataset(data_config(coco_dir), "train")
    (folder,) = packed_folders(coco_dir)
    assert folder.suffix != ".partial"


def test_a_shard_that_lacks_records_is_not_taken_for_complete(coco_dir, monkeypatch):
    """Catches an incomplete shard, as of a disk that loses data, before a training reads it."""

    class Forgetful(shards.ArrayRecordWriter):
        def write(self, record):
            if hashlib.sha256(record).digest()[0] > 128:
                super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", Forgetful)
        with pytest.raises(DataError, match=r"data\.packed_dir=.*has \d of 4 records"):
            open_dataset(data_config(coco_dir), "train")
    assert len(contents(open_dataset(data_config(coco_dir), "train"))) == COUNT


def test_a_full_disk_is_named(coco_dir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_shard", full)
    with pytest.raises(DataError, match=r"data\.packed_dir=.*No space left.*free some"):
        open_dataset(data_config(coco_dir), "train")


def test_a_folder_that_can_not_be_written_is_named(coco_dir):
    (coco_dir / "file").write_text("no folder")
    config = data_config(coco_dir, packed_dir=str(coco_dir / "file" / "packed"))
    with pytest.raises(DataError, match=r"data\.packed_dir='.*file/packed'.*--config\.data\.pack"):
        open_dataset(config, "train")


def test_an_image_that_vanishes_while_packing_is_named(coco_dir, monkeypatch):
    load = packing.load_split

    def load_and_remove(files, exif):
        loaded = load(files, exif)
        (coco_dir / "train" / loaded[0].file_names[30]).unlink()
        return loaded

    monkeypatch.setattr(packing, "load_split", load_and_remove)
    with pytest.raises(DataError, match=r"image .*train/\d+\.jpg can't be read"):
        open_dataset(data_config(coco_dir), "train")


def test_structural_errors_are_named_before_anything_is_packed(coco_dir):
    content = document(COUNT)
    for image in content["images"][:7]:
        (coco_dir / "train" / image["file_name"]).unlink()
    content["annotations"][0]["category_id"] = 44
    content["images"].append(content["images"][-1])
    (coco_dir / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        open_dataset(data_config(coco_dir), "train")
    message = str(error.value)
    assert "\n" not in message
    assert "image id that comes twice (1)" in message and "category_id 44" in message
    assert "(7)" in message and "and 2 more" in message and "dn_detr_jax check" in message
    assert not packed_folders(coco_dir)


def test_memory_of_packing_does_not_grow_with_the_images(coco_dir, monkeypatch):
    """Catches an unbounded number of files read ahead of the writer."""
    held = []

    class Counting(shards.collections.deque):
        def append(self, item):
            super().append(item)
            held.append(len(self))

    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", COUNT)
    monkeypatch.setattr(shards, "_AHEAD", 5)
    monkeypatch.setattr(shards.collections, "deque", Counting)
    dataset = open_dataset(data_config(coco_dir), "train")
    assert max(held) == 6
    assert dataset.image_ids.tolist() == [e[0] for e in contents(dataset)]
    assert np.unique(dataset.image_ids).size == COUNT


def inodes(directory):
    (folder,) = packed_folders(directory)
    return {path.name: path.stat().st_ino for path in folder.glob("*.array_record-*")}


def replace_image(path):
    """Replaces a JPEG by its negative."""
    with Image.open(path) as opened:
        pixels = 255 - np.asarray(opened)
    Image.fromarray(pixels).save(path)


def test_a_replaced_image_is_packed_anew_and_no_other_shard(coco_dir, caplog):
    """Catches a damaged image that stays packed after its file was replaced."""
    dataset = open_dataset(data_config(coco_dir), "train")
    before = inodes(coco_dir)
    path = coco_dir / "train" / dataset.annotations.file_names[9]
    replace_image(path)
    with caplog.at_level(logging.INFO):
        again = open_dataset(data_config(coco_dir), "train")
    assert f"1 images, such as {path}, have changed" in caplog.text
    assert again.source[9].image == path.read_bytes() != dataset.source[8].image
    assert [contents(again)[i] for i in range(8)] == [contents(dataset)[i] for i in range(8)]
    after = inodes(coco_dir)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["coco_records-images.array_record-00002-of-00010"]
    caplog.clear()
    open_dataset(data_config(coco_dir), "train")
    assert inodes(coco_dir) == after and not caplog.records


def test_a_new_time_alone_packs_nothing(coco_dir):
    """Catches repacking of a copied data set; content decides if size or time differ."""
    dataset = open_dataset(data_config(coco_dir), "train")
    before = inodes(coco_dir)
    for name in dataset.annotations.file_names[:3]:
        os.utime(coco_dir / "train" / name)
    assert contents(open_dataset(data_config(coco_dir), "train")) == contents(dataset)
    assert inodes(coco_dir) == before


def test_packed_by_an_earlier_version_is_compared_once(coco_dir, monkeypatch):
    """Covers folders without the stamps of their images: they are read, and changes detected."""
    dataset = open_dataset(data_config(coco_dir), "train")
    (folder,) = packed_folders(coco_dir)
    (folder / "files.npy").unlink()
    before = inodes(coco_dir)
    path = coco_dir / "train" / dataset.annotations.file_names[20]
    status = path.stat()
    replace_image(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as cp --preserve
    again = open_dataset(data_config(coco_dir), "train")
    assert again.source[20].image == path.read_bytes()
    assert sum(before[name] != inode for name, inode in inodes(coco_dir).items()) == 1
    monkeypatch.setattr(packing, "_changed", None)
    assert contents(open_dataset(data_config(coco_dir), "train")) == contents(again)


def test_a_kill_before_the_stamps_repeats_the_shard(coco_dir, monkeypatch):
    dataset = open_dataset(data_config(coco_dir), "train")
    path = coco_dir / "train" / dataset.annotations.file_names[0]
    replace_image(path)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "save_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_dataset(data_config(coco_dir), "train")
    assert open_dataset(data_config(coco_dir), "train").source[0].image == path.read_bytes()


def test_an_image_without_a_file_stays_when_its_shard_is_written_anew(coco_dir):
    first = contents(open_dataset(data_config(coco_dir), "train"))
    names = open_dataset(data_config(coco_dir), "train").annotations.file_names
    (coco_dir / "train" / names[5]).unlink()
    replace_image(coco_dir / "train" / names[6])
    again = contents(open_dataset(data_config(coco_dir), "train"))
    assert again[6][1] == (coco_dir / "train" / names[6]).read_bytes()
    assert [again[i] for i in range(COUNT) if i != 6] == [first[i] for i in range(COUNT) if i != 6]


def test_a_changed_image_and_a_folder_that_can_not_be_written_are_named(coco_dir, monkeypatch):
    """Covers a read-only folder by a failing lock, since root may write everywhere."""
    dataset = open_dataset(data_config(coco_dir), "train")
    path = coco_dir / "train" / dataset.annotations.file_names[0]

    def read_only(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packing, "_lock", read_only)
    os.utime(path)
    assert contents(open_dataset(data_config(coco_dir), "train")) == contents(dataset)
    replace_image(path)
    with pytest.raises(DataError, match=rf"{path} has changed .*packed_dir"):
        open_dataset(data_config(coco_dir), "train")


def test_nothing_is_packed_where_that_is_not_wanted(coco_dir):
    """Catches an evaluation that packs the training split."""
    config = data_config(coco_dir)
    with pytest.raises(DataError, match="not packed in"):
        open_dataset(config, "train", images="packed")
    assert not (coco_dir / "packed").exists()
    dataset = open_dataset(config, "train")
    replace_image(coco_dir / "train" / dataset.annotations.file_names[0])
    assert contents(open_dataset(config, "train", images="packed")) == contents(dataset)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_boxes_as_shown_lie_on_their_objects(tmp_path, orientation, annotated):
    """Covers both annotated sizes, of the stored and of the shown image."""
    shown = np.zeros((40, 60, 3), np.uint8)
    shown[5:15, 30:50] = 255  # the object
    box = [30, 5, 20, 10]
    stored = np.rot90(shown, {3: 2, 6: 1}[orientation])
    size = (shown if annotated == "shown" else stored).shape
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = document(1) | {
        "images": [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box}],
    }
    write_split(tmp_path / "train.json", tmp_path / "train", content)
    Image.fromarray(stored).save(tmp_path / "train" / "a.png", exif=exif)
    dataset = open_dataset(data_config(tmp_path, exif="as_shown"), "train")
    example = dataset.source[0]
    pixels = images.decode(example.image, tuple(dataset.sizes[0].tolist()), "as_shown")
    left, top, right, bottom = example.boxes[0].astype(int)
    assert pixels[top:bottom, left:right].min() == 255 and (pixels == 255).sum() == 200 * 3


def test_orientations_that_the_size_leaves_open_are_warned_of(coco_dir, caplog):
    path = next((coco_dir / "train").iterdir())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(path) as opened:
        opened.load()
        opened.save(path, exif=exif)
    open_dataset(data_config(coco_dir), "train")
    assert "1 images of" in caplog.text and "data.exif=as_shown" in caplog.text
    caplog.clear()
    open_dataset(data_config(coco_dir, exif="as_stored"), "train")
    assert "EXIF" not in caplog.text and len(packed_folders(coco_dir)) == 2


def test_errors_of_an_image_name_the_folder_that_it_was_read_from(coco_dir):
    """Catches an error that does not tell a damaged copy from a damaged file."""
    content = json.loads((coco_dir / "train.json").read_text())
    path = coco_dir / "train" / content["images"][0]["file_name"]
    path.write_bytes(path.read_bytes()[:200])
    config = base_config()
    config.data.update(dir=str(coco_dir), canvases=((96, 96),), max_objects=9)
    config.data.update(eval_short_side=40, eval_max_long_side=96)
    dataset = open_dataset(config.data, "train")
    (folder,) = packed_folders(coco_dir)
    with pytest.raises(DataError, match=rf"{path.name}, read from {folder}\) can't be read"):
        list(eval_batches(dataset, config))
