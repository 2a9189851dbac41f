"""AP of the same detector by the evaluation, by `predict --annotations` and by an exported file.

The data sets number images and classes at random. Their objects are the detections, moved a
little, so that random parameters give an AP between 0 and 1.
"""

import contextlib
import dataclasses
import io
import json

import fast_jit
import jax
import numpy as np
import pytest
from coco_directory import photograph
from data import tiny as tiny_config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_detector import random_params

from dn_detr_jax import evaluate
from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.data.images import decode
from dn_detr_jax.errors import CheckpointError, DataError
from dn_detr_jax.inference import image_files
from dn_detr_jax.inference.export import export
from dn_detr_jax.inference.exported import load_exported
from dn_detr_jax.inference.predictor import Predictor, predictor_of, read_run
from dn_detr_jax.models.registry import abstract_params, build_model

SIZE = 64, 96  # of the images and the canvas, so that nothing is resized
NAMES = ("square", "disc", "bar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes six images, two with an EXIF orientation, one in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for i in range(6):
        exif = Image.Exif()
        exif[0x0112] = {1: 3, 2: 2}.get(i, 1)
        name = f"{10 - i}.jpg" if i else "deep/10.jpg"
        Image.fromarray(photograph(*SIZE, seed=i)).save(folder / name, exif=exif)
    return folder


@pytest.fixture(scope="module")
def paths(folder):
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module")
def config():
    config = tiny_config.processes()
    config.data.update(
        name="coco",
        labels="contiguous",
        canvases=(SIZE,),
        eval_short_side=64,
        eval_max_long_side=96,
    )
    config.model.num_classes = len(NAMES)
    config.eval.update(batch_size=2, instability_images=0, pictures=0)
    config.compile.options = fast_jit.CONFIG
    return config


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """A run that numbers its classes 1, 2, 3."""
    workdir = tmp_path_factory.mktemp("run")
    params = random_params(abstract_params(build_model(config.model)))
    categories = [Category(i + 1, name) for i, name in enumerate(NAMES)]
    with Checkpoints(workdir, config, categories=categories) as checkpoints:
        checkpoints.save(1, {"params": params})
    return workdir


@pytest.fixture(scope="module")
def predictor(workdir):
    return predictor_of(read_run(workdir), batch_size=2)


@pytest.fixture(scope="module")
def detector(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "detector.zip"
    export(read_run(workdir), path, platforms=("cpu",), batch_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit.fast_jit)
        return load_exported(path)


@pytest.fixture(scope="module")
def objects(predictor, paths):
    """Returns boxes (left, top, width, height) and class names of the objects of each path."""
    rng = np.random.default_rng(0)
    found = []
    for path, pixels in ((p, decode(p.read_bytes())) for p in paths):
        everything = predictor.predict(pixels, threshold=0.0)
        corners = everything.boxes + rng.normal(0, 1.5, everything.boxes.shape)
        corners = np.clip(corners, 0, [*SIZE[::-1], *SIZE[::-1]])
        sizes = corners[:, 2:] - corners[:, :2]
        chosen = np.flatnonzero((sizes > 2).all(1))[:: 2 + len(path.stem)]
        found.append(
            [
                ([*corners[i, :2].tolist(), *sizes[i].tolist()], everything.class_names[i])
                for i in chosen
            ]
        )
    assert sum(map(len, found)) > 10
    return found


def write_annotations(directory, folder, paths, objects, rng):
    """Writes a data set with random ids of images and classes, classes in random order."""
    category_ids = rng.choice(np.arange(1, 100), len(NAMES), replace=False)
    category_ids[rng.integers(len(NAMES))] = 0  # an id, too
    ids = dict(zip(NAMES, category_ids.tolist(), strict=True))
    image_ids = rng.choice(10_000, len(paths), replace=False).tolist()
    images = [
        {
            "id": image_id,
            "file_name": path.relative_to(folder).as_posix(),
            "height": SIZE[0],
            "width": SIZE[1],
        }
        for image_id, path in zip(image_ids, paths, strict=True)
    ]
    annotations = [
        {"image_id": image_id, "category_id": ids[name], "bbox": box, "area": box[2] * box[3]}
        for image_id, part in zip(image_ids, objects, strict=True)
        for box, name in part
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation.update(id=number, iscrowd=0)
    content = {
        "images": [images[i] for i in rng.permutation(len(images))],
        "annotations": annotations,
        "categories": [{"id": ids[NAMES[i]], "name": NAMES[i]} for i in rng.permutation(3)],
    }
    directory.mkdir(exist_ok=True)
    file = directory / "val.json"
    file.write_text(json.dumps(content))
    return file


def coco_ap(annotations, results):
    """Returns the AP by pycocotools; `results` is a path or a list."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def ap_of_predict(file, paths, workdir, predictor, out):
    files, run = image_files.match_annotations(paths, file, read_run(workdir))
    renamed = Predictor(run.config, run.params, run.categories, batch_size=2)
    renamed._programs = predictor._programs
    failures = image_files.predict_files(renamed, files, out, 0.0, draw=False)
    assert failures == []
    return coco_ap(file, str(out / "detections.json"))


def ap_of_exported(file, folder, detector):
    content = json.loads(file.read_text())
    ids = {category["name"]: category["id"] for category in content["categories"]}
    results = []
    for image in content["images"]:
        pixels = decode((folder / image["file_name"]).read_bytes())
        prepared, size = detector.prepare(pixels)
        found = detector(prepared[None], size[None])
        results += detector.coco_results(found, 0, image["id"], pixels.shape[:2], ids)
    return coco_ap(file, results)


@pytest.mark.parametrize("seed", range(3))
def test_three_ways_to_an_ap_agree(
    seed, folder, paths, objects, config, workdir, predictor, detector, tmp_path
):
    """Catches ids taken from file names or positions, and classes matched by their ids."""
    rng = np.random.default_rng(seed)
    file = write_annotations(tmp_path / "data", folder, paths, objects, rng)
    config.data.dir = str(file.parent)
    config.data.validation.update(annotations=file.name, images=str(folder))
    expected = evaluate(config, workdir).metrics["AP"]
    assert 0.1 < expected < 0.95
    found = ap_of_predict(file, paths, workdir, predictor, tmp_path / "out")
    assert found == pytest.approx(expected, abs=1e-6)
    assert ap_of_exported(file, folder, detector) == pytest.approx(expected, abs=1e-6)


def test_images_and_classes_that_are_not_in_the_file_are_named(
    folder, paths, objects, workdir, tmp_path
):
    file = write_annotations(tmp_path, folder, paths, objects, np.random.default_rng(9))
    content = json.loads(file.read_text())
    run = read_run(workdir)
    (tmp_path / "other.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 7 images are not in it: .*other\.jpg"):
        image_files.match_annotations([*paths, tmp_path / "other.jpg"], file, run)
    with pytest.raises(DataError, match=r"are both its"):
        image_files.match_annotations([paths[0], tmp_path / paths[0].name], file, run)
    content["categories"][0]["name"] = "wheel"
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'wheel'"):
        image_files.match_annotations(paths, file, run)


def test_a_file_of_another_size_than_annotated_is_a_failure(
    folder, paths, objects, workdir, predictor, tmp_path
):
    """Catches boxes in pixels of another image."""
    file = write_annotations(tmp_path, folder, paths, objects, np.random.default_rng(9))
    files, _ = image_files.match_annotations(paths[:2], file, read_run(workdir))
    files[0] = dataclasses.replace(files[0], size=(640, 960))
    (failure,) = image_files.predict_files(predictor, files, tmp_path / "out", 0.5, draw=False)
    assert str(paths[0]) in failure and "annotated as 960 x 640" in failure
