"""The batches of the loader."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from dn_detr_jax.data import transforms
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.digit_scenes.scenes import draw_scene
from dn_detr_jax.data.loader import eval_batches, eval_plan, train_batches, train_plan
from dn_detr_jax.data.records import Example
from dn_detr_jax.errors import DataError


@pytest.fixture
def train(digits_config):
    return open_dataset(digits_config.data, "train")


@pytest.fixture
def validation(digits_config):
    return open_dataset(digits_config.data, "validation")


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batches_hold_the_images_and_their_objects(train, digits_config):
    """Compares with newly drawn scenes and a plain description of the format."""
    batches = list(train_batches(train, digits_config, 0, 12))
    seen = []
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        assert (height, width) in digits_config.data.canvases
        arrays = {key: value for key, value in batch.items() if isinstance(value, np.ndarray)}
        dtypes = {key: value.dtype.name for key, value in arrays.items()}
        assert dtypes == {
            "image": "uint8",
            "size": "int32",
            "labels": "int32",
            "boxes": "float32",
            "valid": "bool",
            "image_id": "int32",
        }
        assert batch["labels"].shape == batch["valid"].shape == (8, 8)
        assert batch["boxes"].shape == (8, 8, 4) and batch["dropped_objects"] == 0
        assert batch["bad_images"] == 0
        for row, image_id in enumerate(batch["image_id"]):
            seen.append(int(image_id))
            scene = draw_scene(0, "train", int(image_id))
            h, w = batch["size"][row]
            assert not batch["image"][row, h:].any() and not batch["image"][row, :, w:].any()
            geometry = transforms.eval_geometry(
                np.array([scene.image.shape[:2]]), int(min(h, w)), 128
            ).at(0)
            pixels, boxes, labels = transforms.apply(
                scene.image, scene.boxes, scene.labels, geometry
            )
            np.testing.assert_array_equal(batch["image"][row, :h, :w], pixels)
            count = len(labels)
            assert batch["valid"][row].tolist() == [True] * count + [False] * (8 - count)
            np.testing.assert_array_equal(batch["labels"][row, :count], labels)
            cx, cy, bw, bh = batch["boxes"][row, :count].T * np.array([[w], [h], [w], [h]])
            corners = np.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], -1)
            np.testing.assert_allclose(corners, boxes, atol=1e-4)
            assert not batch["boxes"][row, count:].any() and not batch["labels"][row, count:].any()
    assert sorted(seen) == list(range(96))  # 12 steps of 8 are one epoch of 96


def test_resuming_from_a_step_and_splitting_over_processes(train, digits_config):
    whole = list(train_batches(train, digits_config, 0, 20))
    resumed = list(train_batches(train, digits_config, 14, 6))
    for a, b in zip(whole[14:], resumed, strict=True):
        assert_equal_batches(a, b)
    parts = [list(train_batches(train, digits_config, 9, 5, p, 2)) for p in range(2)]
    for batch, first, second in zip(whole[9:14], *parts, strict=True):
        for key in ("image", "size", "labels", "boxes", "valid", "image_id"):
            np.testing.assert_array_equal(batch[key], np.concatenate([first[key], second[key]]))


def test_threads_change_nothing(train, digits_config):
    one = list(train_batches(train, digits_config, 0, 6))
    digits_config.data.threads, digits_config.data.prefetch = 1, 1
    for a, b in zip(one, train_batches(train, digits_config, 0, 6), strict=True):
        assert_equal_batches(a, b)


def test_a_worker_process_changes_nothing_and_ends(train, digits_config):
    expected = list(train_batches(train, digits_config, 3, 4))
    before = shared_memory()
    digits_config.data.workers = 1
    iterator = train_batches(train, digits_config, 3, 100)
    for batch in expected:
        assert_equal_batches(batch, next(iterator))
    iterator.close()  # in the middle, with prefetched batches
    import multiprocessing

    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    del batch, iterator
    left = shared_memory() - before  # other programs remove theirs too
    while left & shared_memory() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left & shared_memory()


def shared_memory():
    """Returns the names of Python's segments, none without the folder."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("psm_*")} if folder.is_dir() else set()


def test_evaluation_pads_the_last_batch_of_each_canvas(validation, digits_config):
    batches = list(eval_batches(validation, digits_config))
    assert len(batches) == len(eval_plan(validation, digits_config))
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert sorted(ids[ids >= 0]) == list(range(40)) and (ids < 0).any()
    for batch in batches:
        empty = batch["image_id"] < 0
        assert batch["image"].shape[0] == 8
        assert (batch["size"][empty] == 1).all()
        assert not batch["valid"][empty].any() and not batch["image"][empty].any()


def test_evaluation_has_as_many_batches_in_every_process(validation, digits_config):
    whole = list(eval_batches(validation, digits_config))
    parts = [list(eval_batches(validation, digits_config, p, 4)) for p in range(4)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        ids = np.concatenate([share["image_id"] for share in shares])
        np.testing.assert_array_equal(batch["image_id"], ids)


def test_evaluation_of_a_subset(validation, digits_config):
    batches = list(eval_batches(validation, digits_config, subset=np.array([31, 4])))
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert sorted(ids[ids >= 0]) == [4, 31]


def test_more_objects_than_slots_keeps_some_and_counts_the_rest(train, digits_config):
    full = list(train_batches(train, digits_config, 0, 24))
    digits_config.data.max_objects = 3
    few = list(train_batches(train, digits_config, 0, 24))
    lost, kept_of_image = 0, {}
    for step, (a, b) in enumerate(zip(full, few, strict=True)):
        counts = a["valid"].sum(1)
        np.testing.assert_array_equal(b["valid"].sum(1), np.minimum(counts, 3))
        assert b["dropped_objects"] == np.maximum(counts - 3, 0).sum()
        lost += b["dropped_objects"]
        for row in range(8):
            chosen = {tuple(box) for box in b["boxes"][row][b["valid"][row]].round(5).tolist()}
            assert chosen <= {tuple(box) for box in a["boxes"][row].round(5).tolist()}
            kept_of_image.setdefault((int(a["image_id"][row])), {})[step // 12] = b["labels"][
                row
            ].tolist()
    assert lost > 0
    assert any(kept[0] != kept[1] for kept in kept_of_image.values())  # not always the same ones


class BrokenSource:
    """A source with damaged images, and one without a file."""

    def __init__(self, source, damaged, missing=-1):
        self.source, self.missing = source, missing
        self.damaged = np.atleast_1d(damaged).tolist()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index) -> Example:
        example = self.source[index]
        if index in self.damaged:
            return dataclasses.replace(example, image=b"damaged")
        if index == self.missing:
            raise OSError("disk error")
        return example


@pytest.mark.parametrize(
    "broken,workers,message",
    [
        ((7, -1), 0, "no readable image"),
        ((-1, 7), 0, "disk error"),
        ((7, -1), 1, "no readable image"),
    ],
)
def test_an_unreadable_image_is_named(validation, digits_config, broken, workers, message):
    digits_config.data.workers = workers
    source = BrokenSource(validation.source, *broken)
    dataset = dataclasses.replace(validation, source=source)
    with pytest.raises(ValueError, match=rf"image 7 of .*digits_tiny, validation.*{message}"):
        list(eval_batches(dataset, digits_config))


def test_an_unreadable_image_makes_way_for_the_next_of_its_batch(train, digits_config, caplog):
    """Compares rows with those of the whole data set, for each split of a batch."""
    plan = train_plan(train, digits_config)
    damaged = plan.batch(0).indices[[1, 2, 7]]  # the next of row 7 is row 0, of rows 1 and 2 row 3
    broken = dataclasses.replace(train, source=BrokenSource(train.source, damaged))
    with pytest.raises(DataError, match="no readable image"):
        list(train_batches(broken, digits_config, 0, 1))
    whole = list(train_batches(train, digits_config, 0, 14))
    digits_config.data.skip_bad = True
    batches = list(train_batches(broken, digits_config, 0, 14))
    named = [record.message for record in caplog.records if "going on without" in record.message]
    assert len(named) == 3  # once for each, in two epochs
    assert all(any(f"image {i} of" in message for message in named) for i in damaged)
    for step, (batch, expected) in enumerate(zip(batches, whole, strict=True)):
        bad = np.isin(plan.batch(step).indices, damaged)
        assert batch["bad_images"] == bad.sum()
        rows = [next(r % 8 for r in range(row, row + 8) if not bad[r % 8]) for row in range(8)]
        for key in ("image", "size", "labels", "boxes", "valid", "image_id"):
            np.testing.assert_array_equal(batch[key], expected[key][rows], err_msg=key)
    parts = [list(train_batches(broken, digits_config, 0, 14, p, 2)) for p in range(2)]
    for batch, *shares in zip(batches, *parts, strict=True):
        ids = np.concatenate([share["image_id"] for share in shares])
        np.testing.assert_array_equal(batch["image_id"], ids)
        assert batch["bad_images"] == sum(share["bad_images"] for share in shares)


def test_a_batch_without_any_readable_image_is_an_error(train, digits_config):
    digits_config.data.skip_bad = True
    damaged = train_plan(train, digits_config).batch(0).indices
    broken = dataclasses.replace(train, source=BrokenSource(train.source, damaged))
    with pytest.raises(DataError, match="none of the 8 images of a batch can be read"):
        list(train_batches(broken, digits_config, 0, 1))


def test_evaluation_leaves_the_row_of_an_unreadable_image_empty(validation, digits_config):
    digits_config.data.skip_bad = True
    broken = dataclasses.replace(validation, source=BrokenSource(validation.source, [7, 8]))
    batches = list(eval_batches(broken, digits_config))
    assert sum(batch["bad_images"] for batch in batches) == 2
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert sorted(ids[ids >= 0]) == [i for i in range(40) if i not in (7, 8)]
    for batch in batches:
        empty = batch["image_id"] < 0
        assert not batch["valid"][empty].any() and not batch["image"][empty].any()


def test_a_mistake_in_the_program_is_no_unreadable_image(train, digits_config):
    """Catches `skip_bad` hiding the error."""

    class Wrong:
        def __getitem__(self, index):
            raise TypeError("a mistake")

    digits_config.data.skip_bad = True
    broken = dataclasses.replace(train, source=Wrong())
    with pytest.raises(TypeError, match="a mistake"):
        list(train_batches(broken, digits_config, 0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([3, 10], np.int32)}, r"labels are \[3, 10\], not 0 to 9"),
        ({"labels": np.array([-1, 2], np.int32)}, r"labels are \[-1, 2\]"),
        ({"boxes": np.float32([[1, 2, 9, 9], [1, 2, np.inf, 9]])}, "a box that is not finite"),
        ({"boxes": np.float32([[np.nan, 2, 9, 9], [1, 2, 8, 9]])}, "a box that is not finite"),
    ],
)
def test_objects_that_can_not_be_are_named(train, digits_config, change, message):
    """Catches a label beyond the classes in a custom source, which would train nothing."""

    class Own:
        def __init__(self, wrong):
            self.wrong = wrong

        def __getitem__(self, index):
            good = {"boxes": np.float32([[1, 2, 9, 9], [1, 2, 8, 9]]), "labels": np.int32([3, 9])}
            changed = good | change if index == self.wrong else good
            return dataclasses.replace(train.source[index], **changed)

    index = int(train_plan(train, digits_config).batch(0).indices[3])
    wrong, fine = (dataclasses.replace(train, source=Own(i)) for i in (index, -1))
    with pytest.raises(DataError, match=rf"image {train.image_ids[index]} of .*train.*{message}"):
        list(train_batches(wrong, digits_config, 0, 1))
    assert len(list(train_batches(fine, digits_config, 0, 1))) == 1


def test_closing_ends_the_threads(train, digits_config):
    def readers():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = len(readers())
    iterator = train_batches(train, digits_config, 0, 10**9)
    next(iterator)
    assert len(readers()) > before
    iterator.close()
    deadline = time.monotonic() + 10
    while len(readers()) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(readers()) == before


def test_a_program_that_fails_while_reading_ends(digits_dir):
    """Covers an open iterator with batches still being prefetched."""
    code = f"""
from dn_detr_jax.config import base_config
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import train_batches
c = base_config()
c.data.name, c.data.dir, c.data.canvases = "digits_tiny", {str(digits_dir)!r}, ((128, 128),)
c.data.augment.short_sides, c.data.augment.max_long_side, c.data.augment.crop = (96,), 128, 0.0
batches = train_batches(open_dataset(c.data, "train"), c, 0, 10**9)
next(batches)
raise SystemExit(3)
"""
    run = subprocess.run([sys.executable, "-c", code], timeout=60, env=dict(os.environ))
    assert run.returncode == 3


def test_workers_need_shared_memory_for_their_batches(train, digits_config, monkeypatch):
    """Catches a full /dev/shm, which kills a worker with an unexplained signal."""
    digits_config.data.canvases, digits_config.data.workers = ((128, 128), (192, 128)), 2
    needed = 9 * 8 * 192 * 128 * 3

    def with_free(free):
        monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=free))
        train_batches(train, digits_config, 0, 1).close()

    with_free(needed)
    with pytest.raises(ValueError, match=r"data\.workers is 2: .* 5 MB of /dev/shm.*--shm-size"):
        with_free(needed - 1)
    digits_config.data.workers = 0
    with_free(0)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("train.batch_size", 9, r"train\.batch_size is 9, expected a positive multiple of the 2"),
        ("train.batch_size", 98, r"train\.batch_size is 98, but the training split has 96"),
        ("data.canvases", (), r"data\.canvases is \(\), expected pairs"),
        ("data.canvases", ((64, 64),), r"data\.canvases \(\(64, 64\),\) are too small: image \d+"),
        ("data.max_objects", 0, r"data\.max_objects is 0"),
        ("data.workers", -1, r"data\.workers is -1"),
        ("data.augment.flip", 1.5, r"data\.augment\.flip is 1\.5"),
        ("data.augment.short_sides", (), r"data\.augment\.short_sides is \(\)"),
        ("data.augment.crop_size", (9, 3), r"data\.augment\.crop_size is \(9, 3\)"),
        ("seed", -1, r"seed is -1"),
    ],
)
def test_wrong_values_are_named_before_any_work(train, digits_config, key, value, message):
    *sections, name = key.split(".")
    section = digits_config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    with pytest.raises(ValueError, match=message):
        train_batches(train, digits_config, 0, 1, 0, 2)


_WITH_WORKERS = """
import sys
from dn_detr_jax.config import base_config
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.data.loader import train_batches
if __name__ == "__main__":
    c = base_config()
    c.data.name, c.data.dir, c.data.canvases = "digits_tiny", sys.argv[1], ((128, 128),)
    c.data.augment.short_sides, c.data.augment.max_long_side, c.data.augment.crop = (96,), 128, 0.0
    c.data.workers, c.train.batch_size = 1, 8
    batches = train_batches(open_dataset(c.data, "train"), c, 0, 10**9)
    for _ in batches:
        print("batch", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_workers_outlive_sigterm_but_not_their_parent(digits_dir, tmp_path):
    """Catches workers, and their shared memory, that a killed training leaves behind; and a
    SIGTERM for all processes of a job that takes the workers from a training about to save."""
    script = tmp_path / "program.py"
    script.write_text(_WITH_WORKERS)
    with subprocess.Popen(
        [sys.executable, str(script), str(digits_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as process:
        assert process.stdout.readline() == "batch\n"
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(pid) for task in tasks for pid in task.read_text().split()]
        command = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        (worker,) = (pid for pid in children if "spawn_main" in command[pid])
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)  # Ctrl-C, which a terminal sends to all processes
        for _ in range(20):  # more than are prefetched
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "batch\n"
        maps = Path(f"/proc/{process.pid}/maps").read_text()  # other programs share memory, too
        mine = {name for name in shared_memory() if f"/{name}" in maps}
        assert mine
        process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() or mine & shared_memory():
        assert time.monotonic() < deadline
        time.sleep(0.05)
