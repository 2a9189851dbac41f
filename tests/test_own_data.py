"""The commands of docs/own_data.md, one after the other, for each format of annotations."""

import itertools
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from coco_directory import document, write_split
from data import tiny_finetune
from other_formats import write_voc, write_yolo
from tiny_detector import random_params

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.models.registry import abstract_params, build_model

ROOT = Path(__file__).parent.parent


def with_objects_anywhere(content):
    """Gives each image objects of several sizes and places: even a bad detector finds some."""
    places = itertools.product(content["images"], (0.3, 0.6), (0.3, 0.6), (0.35, 0.5, 0.6))
    objects = []
    for number, (image, left, top, size) in enumerate(places):
        shares = [left - size / 4, top - size / 4, size, size]
        sides = [image["width"], image["height"]] * 2
        box = [share * side for share, side in zip(shares, sides, strict=True)]
        category = content["categories"][number % 3]["id"]
        objects.append({"bbox": box, "image_id": image["id"], "category_id": category})
        objects[-1].update(id=number, area=box[2] * box[3], iscrowd=0)
    return content | {"annotations": objects}


SPLITS = {"train": document(8, seed=4), "val": with_objects_anywhere(document(4, seed=5))}

# Runs commands, a JSON list of arguments each, in processes that share their imports. Ends with the
# first that fails.
DRIVER = """
import json, os, sys
import dn_detr_jax.training.loop, dn_detr_jax.training.report, dn_detr_jax.training.preview
import dn_detr_jax.data.check, dn_detr_jax.data.canvases
import dn_detr_jax.inference.export, dn_detr_jax.inference.image_files
from dn_detr_jax.commands import dispatch
for line in sys.stdin:
    arguments = json.loads(line)
    print("RUN", line, end="", flush=True)
    child = os.fork()
    if not child:
        sys.argv = ["dn-detr", *arguments]
        try:
            dispatch.main()
        finally:
            if "tensorflow_datasets" in sys.modules:  # which this data does without
                os._exit(99)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{line}: {status}")
"""


def documented_commands():
    """Returns the arguments of each command of the document, without `python -m dn_detr_jax`."""
    text = (ROOT / "docs" / "own_data.md").read_text().replace("\\\n", " ")
    commands = []
    for line in re.findall(r"^ {4}(python .*)$", text, re.MULTILINE):
        _, *words = shlex.split(line)
        words = ["train", *words[1:]] if words[0] == "train.py" else words[2:]
        commands.append(words)
    return commands


def test_the_document_leads_from_the_check_to_the_export():
    """Catches commands that are not found, so that nothing is run."""
    found = documented_commands()
    names = ["check", "canvases", "cut", "preview", "import"]
    names += ["train", "train", "predict", "export"]
    assert [words[0] for words in found] == names
    assert "--eval_only" in found[6]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same images and objects in three formats."""
    coco = tmp_path_factory.mktemp("coco")
    for seed, (name, content) in enumerate(SPLITS.items()):
        file = coco / "annotations" / f"instances_{name}.json"
        write_split(file, coco / name, content, seed)
    yolo = write_yolo(tmp_path_factory.mktemp("yolo"), SPLITS)
    return {"coco": coco, "yolo": yolo, "voc": write_voc(tmp_path_factory.mktemp("voc"), SPLITS)}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A work directory as of an import: the tiny model for other classes."""
    config = tiny_finetune.get_config()
    config.model.num_classes = 5
    workdir = tmp_path_factory.mktemp("official")
    categories = [Category(i, f"class {i}") for i in range(5)]
    with Checkpoints(workdir, config, categories=categories) as checkpoints:
        checkpoints.save(1, {"params": random_params(abstract_params(build_model(config.model)))})
    return workdir


def run(commands, folder, official, workdir, out):
    """Runs commands of the document and returns their output by command."""
    small = {
        "mydata": folder,
        "configs/finetune.py": ROOT / "tests" / "data" / "tiny_finetune.py",
        "runs/official": official,
        "runs/mine": workdir,
        "some_folder": sorted(folder.rglob("*.jpg"))[0].parent,
        "tiles": out / "tiles",
        "seen": out / "seen",
        "detections": out / "detections",
        "detector.zip": out / "detector.zip",
    }
    lines = []
    for words in commands:
        pairs = [word.rpartition("=") for word in words]
        words = [f"{key}{equals}{small.get(value, value)}" for key, equals, value in pairs]
        lines.append(json.dumps(words))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^RUN .*\n", done.stdout, flags=re.MULTILINE)[1:]
    return parts


@pytest.mark.slow
def test_the_path_of_the_document_in_each_format(folders, official, tmp_path):
    """Catches a documented command that fails, and formats that give different results.

    The training is that of the data in the format of COCO; the others are evaluated with it.
    """
    commands = [words for words in documented_commands() if words[0] != "import"]
    metrics = {}
    for kind, folder in folders.items():
        out = tmp_path / kind
        out.mkdir()
        chosen = commands
        if kind != "coco":
            chosen = [w for w in commands if w[0] == "check" or "--eval_only" in w]
        printed = run(chosen, folder, official, tmp_path / "run", out)
        assert "This can be trained on" in printed[0]
        (record,) = (tmp_path / "run" / "evaluations").glob("*.json")
        metrics[kind] = json.loads(record.read_text())["metrics"]
        record.unlink()
        if kind == "coco":
            assert len(list((out / "tiles" / "train").iterdir())) == 8
            assert len(list((out / "seen").iterdir())) == 16
            trained, evaluated = (text.split("pictures ")[0] for text in printed[4:6])
            assert "AP" in trained and trained == evaluated
            assert json.loads((out / "detections" / "images.json").read_text())
            with zipfile.ZipFile(out / "detector.zip") as archive:
                metadata = json.loads(archive.read("metadata.json"))
            names = [entry["name"] for entry in metadata["classes"]]
            assert names == ["cat", "dog", "fish"]
    assert metrics["coco"]["AR100"] > 0
    for kind in ("yolo", "voc"):
        assert metrics[kind] == pytest.approx(metrics["coco"], abs=1e-4, nan_ok=True)
