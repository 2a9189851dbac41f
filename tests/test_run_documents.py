"""The commands in the code blocks of the documents run, each kind once, at a small size.

Those below a comment "# needs ..." and those of pip are only parsed, by `test_documented_commands`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import test_own_data
from coco_directory import write_coco
from data import tiny_finetune, tiny_processes
from test_documented_commands import COMMANDS, python_words
from tiny_detector import random_params

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.checkpoints.run_config import read_categories
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.models.registry import abstract_params, build_model

ROOT = Path(__file__).parent.parent
# Tests that run the same program, because it needs more than a folder of files.
ELSEWHERE = {
    "train.py --coordinator_address": "test_processes.py::test_two_processes_train_what_one_trains",
    "make test": "test_commands.py::test_every_command_has_help_without_jax",  # by running at all
    "inspect --workdir": "test_inspection.py::test_the_page_stands_alone_and_shows_names_as_text",
    "serve": "test_serve.py::test_the_command_serves_until_a_signal",
    "check-reference": "test_reference.py::test_command_prints_one_json_object",
    "benchmarks.study": "test_study.py::test_a_training_is_kept_and_not_repeated",
    "benchmarks.deformable": "test_benchmarks.py::test_deformable_sampling_is_compared",
    "benchmarks.train_step": "test_benchmarks.py::test_the_step_is_timed",
}

TINY_FINETUNE = str(ROOT / "tests" / "data" / "tiny_finetune.py")
CONFIG = str(ROOT / "tests" / "data" / "tiny_processes.py")
# What stands for the files and the sizes that the commands name, in the folder where they run.
SMALL = {
    "configs/digits.py": CONFIG,
    "configs/digits_quick.py": CONFIG,
    "digits": CONFIG,
    "runs/plain": "runs/digits",
    "data/trees/photographs/val": "data_of_trees",
}
MEASURED = ["--canvas=32x32", "--batch_size=1", "--rounds=1", "--steps=1"]
SHORT = ["--config.train.duration=40 steps", "--config.model.encoder_layers=0"]
# Arguments that replace or join those of a program.
ADDED = {
    "benchmarks.matching": [
        f"--config={CONFIG}", *MEASURED, "--objects_each=2", "--step_batch_size=1"
    ],
    "benchmarks.memory": [f"--config={CONFIG}", *MEASURED[:2], "--dtype=float32"],
    "benchmarks.layers": [f"--config={CONFIG}", *MEASURED[:3]],
    "benchmarks.start": ["--starts=1"],
    "benchmarks.survival": ["--signals=1", "--kind=SIGTERM", "--others=0", *SHORT],
    "benchmarks.host_memory": ["--samples=40", "--config.train.log_every=1 steps", *SHORT],
}  # fmt: skip
LINUX_ONLY = {"benchmarks.start", "benchmarks.survival", "benchmarks.host_memory"}

# The import of a file in official names, as docs/training.md has it; r50.pth comes before.
IMPORT = ["-m", "dn_detr_jax", "import", "r50.pth", "--out=imported", f"--config={TINY_FINETUNE}"]
IMPORT += ["--config.model.num_classes=0", "--config.model.encoder_layers=1"]
IMPORT += [f"--config.model.backbone.{key}" for key in ("norm=frozen_batch_norm", "stem=standard")]

# Runs commands, a JSON list of words each, in processes that share their imports, and prints the
# status of each.
DRIVER = """
import json, os, runpy, sys
import dn_detr_jax.training.loop, dn_detr_jax.training.report, dn_detr_jax.training.preview
import dn_detr_jax.data.check, dn_detr_jax.inference.export, dn_detr_jax.inference.image_files
root = sys.argv[1]
for line in sys.stdin:
    words = json.loads(line)
    print("RUN", line, end="", file=sys.stderr, flush=True)
    child = os.fork()
    if not child:
        os.dup2(2, 1)  # stdout is for the statuses
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [os.path.join(root, words[0]), *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def program(words):
    """The name of what the words for Python start."""
    if words[:2] == ["-m", "dn_detr_jax"]:
        return words[2]
    return words[words[0] == "-m"]


def kind(words):
    """The program, its flags, and whether it reads a video; not the changes to the config."""
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    flags = frozenset(name for name in named if not name.startswith("--config."))
    return program(words), flags, any(word.endswith(".mp4") for word in words)


def elsewhere(found, words):
    names = [" ".join(found.words[:2]), program(words or [""])]
    names += [f"{program(words or [''])} {word.partition('=')[0]}" for word in words or ()]
    return next((ELSEWHERE[name] for name in names if name in ELSEWHERE), None)


def test_the_other_tests_exist():
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def to_run():
    """Returns the place and the words for Python of the first command of each kind.

    Left out are docs/own_data.md, whose commands `test_own_data` runs, and the kinds of those, but
    for the training.
    """
    own = [["-m", "dn_detr_jax", *words] for words in test_own_data.documented_commands()]
    kinds = {kind(words): None for words in own}
    for found in COMMANDS:
        words = python_words(found)
        if found.place.startswith("docs/own_data.md"):
            continue
        if found.partial or found.needs or found.words[0] == "pip" or elsewhere(found, words):
            continue
        assert words, f"{found.place}: {found.words}"
        if program(words) in LINUX_ONLY and sys.platform != "linux":
            continue
        kinds.setdefault(kind(words), (found.place, words))
    return list(filter(None, kinds.values()))


def small(words, folder):
    """Replaces files and sizes by small ones; the data lies in a folder, also for other folders."""
    added, smaller = ADDED.get(program(words), []), SMALL | {"data": str(folder / "data")}
    names = {word.partition("=")[0] for word in added}
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.partition("=")[0] in names:
            skip = "=" not in word
        else:
            name, equals, value = word.rpartition("=")
            kept.append(f"{name}{equals}{smaller.get(value, value)}")
    if CONFIG in str(kept) and not program(words).startswith("benchmarks."):
        kept.append("--config.data.dir=data")
    start = 2 if words[0] == "-m" else 1
    return kept[:start] + added + kept[start:]


def save_params(workdir, config, categories):
    """Makes a work directory with random parameters."""
    names = [Category(label, f"class {label}") for label in range(categories)]
    with Checkpoints(workdir, config, categories=names) as checkpoints:
        checkpoints.save(1, {"params": random_params(abstract_params(build_model(config.model)))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_dir):
    """What the commands find where they run: data, images, a video and work directories."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "data").symlink_to(digits_dir)
    write_coco(folder / "mydata", train=8)
    photographs = folder / "scenes", folder / "data_of_trees"
    for images in photographs:
        shutil.copytree(next((folder / "mydata").rglob("*.jpg")).parent, images)
    config = tiny_processes.get_config()
    config.data.dir = str(digits_dir)
    for name in ("runs/deformable", "runs/trees"):
        save_params(folder / name, config, 10)
    config = tiny_finetune.get_config()
    config.data.dir, config.model.num_classes = str(folder / "mydata"), 3
    config.model.update(encoder_layers=1)
    config.model.backbone.update(norm="frozen_batch_norm", stem="standard")
    open_dataset(config.data, "train")  # packs the images, as a training does
    save_params(folder / "runs/r50", config, 3)
    writer = cv2.VideoWriter(
        str(folder / "street.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (128, 96)
    )
    for value in range(3):
        writer.write(np.full((96, 128, 3), 40 * value, np.uint8))
    writer.release()
    return folder


@pytest.mark.slow
def test_commands_run(folder):
    """Catches a command that parses and then fails."""
    commands = to_run()
    assert len(commands) > 10
    commands.append(("docs/training.md", IMPORT))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT)],
        input="".join(f"{json.dumps(small(words, folder))}\n" for _, words in commands),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    statuses = done.stdout.split()
    print(statuses, done.stderr)
    wrong = [place for (place, _), status in zip(commands, statuses, strict=True) if status != "0"]
    assert not wrong, done.stderr
    figures = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert {"curves.png", "noise/noised_boxes.png", "noise/attention_mask.png"} <= figures
    assert read_categories(folder / "imported") is not None
