"""Every config trains two steps; the run of every variant is evaluated, used and converted.

Configs of equal detectors, such as those of 12 and 50 epochs, are equal after `shrunk`. They share
one training.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import fast_jit
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrunk_configs import CANVAS, SIDES, shrunk, write_data

import dn_detr_jax
import dn_detr_jax.inference.predictor as predictor_module
import dn_detr_jax.training.state as state_module
from dn_detr_jax.config import load_config
from dn_detr_jax.data.datasets import open_dataset
from dn_detr_jax.evaluation.coco_ap import CocoEvaluator
from dn_detr_jax.evaluation.evaluator import Evaluation
from dn_detr_jax.inference.export import export
from dn_detr_jax.inference.exported import load_exported
from dn_detr_jax.inference.predictor import read_run
from dn_detr_jax.interop import export_torch, torch_files
from dn_detr_jax.interop.convert import flat
from dn_detr_jax.interop.import_torch import import_file
from dn_detr_jax.training import loop, report

CONFIGS = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py"))
# The config whose run stands for a variant.
VARIANTS = {
    "dn_dab_detr": "coco_r50",
    "dn_deformable_detr": "coco_deformable_r50_50ep",
    "dn_deformable_encoder_detr": "coco_deformable_encoder_r50_50ep",
    "dn_dino_detr": "coco_dino_r50_36ep",
    "dn_detr_plain": "coco_plain_r50",
}


@dataclasses.dataclass
class Trained:
    """A training of two steps.

    Attributes:
      config: as the training got it.
      workdir: of the training.
      evaluation: what the training returned.
      detections: of that evaluation, COCO results by image id.
      lines: of `metrics.jsonl`.
    """

    config: ConfigDict
    workdir: Path
    evaluation: Evaluation
    detections: dict[int, list[dict]]
    lines: list[dict]


def recorded(evaluate, *arguments):
    """Calls a function, and returns its result with the detections that it evaluated."""
    detections, add = {}, CocoEvaluator.add

    def recording(self, *arrays):
        add(self, *arrays)
        detections.update(self._detections)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CocoEvaluator, "add", recording)
        return evaluate(*arguments), detections


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, digits_dir):
    """A function from the name of a config to its run; equal configs are trained once."""
    coco_dir = write_data(tmp_path_factory.mktemp("coco"))
    done = {}

    def run(name):
        config = shrunk(load_config(name), coco_dir, digits_dir)
        if config.init.reset_heads:
            config.init.checkpoint = str(run("coco_r50").workdir)
        key = config.to_json()
        if key not in done:
            workdir = tmp_path_factory.mktemp(name)
            evaluation, detections = recorded(loop.train, config, workdir)
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
            done[key] = Trained(config, workdir, evaluation, detections, lines)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (predictor_module, state_module):
            name = "accepted_options" if module is predictor_module else "known_options"
            patch.setattr(module, name, lambda *_: fast_jit.OPTIONS)
        yield run


@pytest.fixture(params=VARIANTS)
def trained(request, run_of):
    return run_of(VARIANTS[request.param])


LOSSES = {"loss_ce": "weight_class", "loss_bbox": "weight_bbox", "loss_giou": "weight_giou"}


def parts(config):
    """Returns the patterns of the names that the parts of the loss have, for two layers."""
    layers = ["{}", "{}_0"]
    dn = [f"dn_{layer}" for layer in layers] if config.dn.groups else []
    return layers, dn, ["{}_enc"] if config.model.name == "dn_dino_detr" else []


def metric_names(config):
    """Returns the names of all metrics of a step, from what the config trains."""
    layers, dn, proposals = parts(config)
    of_dn = [*LOSSES, "class_error"]
    of_queries = [*of_dn, "loss_xy", "loss_hw", "cardinality_error"]
    names = {pattern.format(term) for pattern in layers + proposals for term in of_queries}
    names |= {pattern.format(term) for pattern in dn for term in of_dn}
    names |= {"loss", "num_objects", "nonfinite_costs", "grad_norm", "update_norm", "param_norm"}
    rates = [pattern.strip("^/") for pattern, _ in config.optimizer.lr_multipliers]
    return names | {"epoch", "learning_rate", *(f"learning_rate_{name}" for name in rates)}


def test_every_variant_has_a_run():
    """Catches a variant with configs that the tests below leave out."""
    assert {load_config(name).model.name for name in CONFIGS} == set(VARIANTS)
    for variant, name in VARIANTS.items():
        assert load_config(name).model.name == variant


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains(name, run_of):
    """Catches a config that does not fit its variant or data, and terms that are not logged."""
    run = run_of(name)
    steps = [line for line in run.lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        found = {key.removeprefix("train/") for key in line if key.startswith("train/")}
        assert found == metric_names(run.config)
        assert np.isfinite(list(line.values())).all()
        weighted = sum(
            run.config.loss[weight] * line["train/" + pattern.format(term)]
            for pattern in itertools.chain(*parts(run.config))
            for term, weight in LOSSES.items()
        )
        assert line["train/loss"] == pytest.approx(weighted, rel=1e-5)
    optimizer = run.config.optimizer
    rates = {"step": (1, optimizer.step_factor), "cosine": (0, 1)}[optimizer.schedule]
    found = [line["train/learning_rate"] / optimizer.learning_rate for line in steps]
    np.testing.assert_allclose(found, rates, rtol=1e-6)
    assert steps[1]["train/update_norm"] > 0
    evaluated = [line for line in run.lines if "eval/AP" in line]
    assert [line["step"] for line in evaluated] == [2]
    assert {f"eval/{name}" for name in CocoEvaluator.METRICS} <= set(evaluated[0])
    assert len(run.detections) == {"coco": 4, "digits_tiny": 40}[run.config.data.name]


def test_an_evaluation_of_the_run_finds_what_the_training_found(trained, capsys):
    """Catches parameters that a checkpoint lacks, and another program."""
    evaluation, detections = recorded(report.evaluate, trained.config, trained.workdir)
    assert detections == trained.detections
    assert len({result["score"] for image in detections.values() for result in image}) > 20
    assert evaluation.table() in capsys.readouterr().out
    for name in CocoEvaluator.METRICS:
        np.testing.assert_equal(evaluation.metrics[name], trained.evaluation.metrics[name])


def test_predictions_equal_the_evaluation_and_the_exported_file(trained, tmp_path, monkeypatch):
    """Catches a variant whose detections need more than an image, and other scores or boxes."""
    predictor = dn_detr_jax.load(trained.workdir)
    validation = open_dataset(trained.config.data, "validation")
    image_id = int(validation.image_ids[0])
    found = predictor.predict(validation.source[0].image, threshold=0.0)
    expected = trained.detections[image_id]
    assert found.category_ids.tolist() == [result["category_id"] for result in expected]
    np.testing.assert_allclose(found.scores, [result["score"] for result in expected], atol=1e-5)
    corners = np.array([result["bbox"] for result in expected])
    corners[:, 2:] += corners[:, :2]
    np.testing.assert_allclose(found.boxes, corners, atol=0.05)

    export(read_run(trained.workdir), tmp_path / "detector.zip", platforms=("cpu",))
    monkeypatch.setattr(jax, "jit", fast_jit.fast_jit)
    detector = load_exported(tmp_path / "detector.zip")
    assert detector.canvas == CANVAS
    # It has the size of the evaluation: nothing is to be resized.
    image = np.random.default_rng(0).integers(0, 256, (*SIDES, 3), np.uint8)
    images, sizes = detector.prepare(image)
    exported = {name: value[0] for name, value in detector(images[None], sizes[None]).items()}
    named = np.array([bool(category.name) for category in predictor.categories])
    kept = named[exported["labels"]]
    wanted = predictor.predict(image, threshold=0.0)
    assert len(wanted) > 5
    np.testing.assert_allclose(exported["scores"][kept], wanted.scores, atol=1e-5)
    np.testing.assert_array_equal(exported["labels"][kept], wanted.labels)
    boxes = exported["boxes"][kept] * [*SIDES[::-1], *SIDES[::-1]]
    np.testing.assert_allclose(boxes, wanted.boxes, atol=1e-2)


@pytest.mark.parametrize(
    "name",
    [name for name in (*VARIANTS.values(), "coco_dino_swin_tiny_12ep") if "plain" not in name],
)
def test_official_names_there_and_back(name, run_of, tmp_path):
    """The trained parameters are written as a `.pth`, and imported bit by bit."""
    run = run_of(name)
    state = export_torch.export(run.workdir)
    torch_files.write(tmp_path / "official.pth", state)
    account = import_file(tmp_path / "official.pth", run.config, tmp_path / "imported")
    assert account.unused == account.unfilled == ()
    given, imported = (
        flat(read_run(run.workdir).params),
        flat(read_run(tmp_path / "imported").params),
    )
    assert given.keys() == imported.keys()
    for path, value in given.items():
        np.testing.assert_array_equal(imported[path], value, err_msg=path)
