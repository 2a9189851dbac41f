"""Detectors as ONNX, run by onnxruntime."""

import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from data import tiny as tiny_config
from flax import linen as nn
from tiny_detector import random_params

from dn_detr_jax.commands import export as export_command
from dn_detr_jax.config import base_config, validate
from dn_detr_jax.data.coco_classes import assumed_categories
from dn_detr_jax.errors import ExportError, MissingPackageError
from dn_detr_jax.inference import export_onnx
from dn_detr_jax.inference.onnx_form import in_onnx_form
from dn_detr_jax.inference.predictor import Run
from dn_detr_jax.models.registry import abstract_params, build_model


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(MissingPackageError, match=r"--format=onnx needs .*pip install"):
        export_onnx.require_packages()


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (2, 0))])
def test_the_form_for_onnx_computes_the_same(padding):
    """Catches lost padding, another remainder, and constants that are not repeated."""

    def program(x, sizes):
        pooled = nn.max_pool(x, (3, 3), (2, 2), padding)
        table = jax.numpy.broadcast_to(jax.numpy.arange(4.0), (sizes.shape[0], 4))
        return pooled, (sizes - 5) % 3, (sizes + 1) // 2, jax.lax.rem(sizes - 5, 3), table

    rng = np.random.default_rng(0)
    x, sizes = rng.normal(size=(2, 7, 8, 3)).astype(np.float32), np.array([[1, 9], [4, 7]])
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (x, sizes)]
    found = in_onnx_form(jax.make_jaxpr(program)(*shapes))(*map(jax.numpy.asarray, (x, sizes)))
    for ours, expected in zip(found, program(x, sizes), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_what_differs_is_seen_and_what_is_equal_is_not():
    """Catches a comparison that takes the order of ties for an error, or an error for a tie."""
    one = {
        "scores": np.array([[0.9, 0.5, 0.5, 0.1]]),
        "labels": np.array([[1, 2, 3, 0]]),
        "boxes": np.arange(16.0).reshape(1, 4, 4),
    }
    other = {name: value[:, [0, 2, 1, 3]] for name, value in one.items()}
    assert export_onnx.difference(one, other) == 0
    moved = one | {"boxes": one["boxes"] + np.array([0, 0.25, 0, 0])[:, None]}
    assert export_onnx.difference(one, moved) == 0.25
    assert export_onnx.difference(one, one | {"labels": np.array([[1, 2, 2, 0]])}) > 1


def run_command(*arguments):
    """Runs the command in this process."""
    others = set(flags.FLAGS)
    export_command.define_flags()
    try:
        flags.FLAGS(["export", "--format=onnx", *arguments])
        export_command.main([])
    finally:
        for name in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, name)


@pytest.mark.slow
def test_the_command_writes_a_file_for_batches_of_any_size(digits_run, predictor, tmp_path, capsys):
    """Catches a command that loses a flag, classes or the threshold."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "detector.onnx"
    run_command(f"--workdir={digits_run}", f"--out={path}", "--canvas=96x128", "--dynamic")
    line = capsys.readouterr().out
    assert "step 4, any number x 96 x 128, threshold 0.500, detections differ by " in line
    assert float(line.split("differ by ")[1].split()[0]) < 1e-5
    session = onnxruntime.InferenceSession(path)
    entries = session.get_modelmeta().custom_metadata_map
    assert (entries["step"], entries["threshold"]) == ("4", "0.5")
    names = [category["name"] for category in json.loads(entries["classes"])]
    assert names == [category.name for category in predictor.categories]
    images = np.random.default_rng(1).integers(0, 256, (3, 96, 128, 3), np.uint8)
    inputs = {"images": images, "sizes": np.full((3, 2), (96, 128), np.int32)}
    found = dict(zip(("boxes", "labels", "scores"), session.run(None, inputs), strict=True))
    for row, expected in enumerate(predictor.predict(list(images), threshold=0.0)):
        named = np.isin(found["labels"][row], [i for i in range(10) if i != 6])
        np.testing.assert_allclose(found["scores"][row, named], expected.scores, atol=1e-5)
        boxes = found["boxes"][row, named] * [128, 96, 128, 96]
        np.testing.assert_allclose(boxes, expected.boxes, atol=0.01)


@pytest.mark.slow
def test_the_command_keeps_no_file_that_differs(digits_run, tmp_path, monkeypatch):
    """Catches a wrong file that is kept, or that replaces a good one."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")

    def shifted(closed):
        def function(*arguments):
            boxes, labels, scores = in_onnx_form(closed)(*arguments)
            return [boxes + np.float32(0.01), labels, scores]

        return function

    monkeypatch.setattr(export_onnx, "in_onnx_form", shifted)
    path = tmp_path / "out" / "detector.onnx"
    arguments = f"--workdir={digits_run}", f"--out={path}", "--canvas=96x128"
    with pytest.raises(ExportError, match=r"detector\.onnx: not written: .* differ by 1\.0e-02"):
        run_command(*arguments)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"good")
    with pytest.raises(ExportError, match="differ by"):
        run_command(*arguments)
    assert path.read_bytes() == b"good" and list(path.parent.iterdir()) == [path]


def tiny_run(name):
    """A run of a variant with random parameters."""
    if name == "dn_detr_plain":
        config, given = base_config(name), tiny_config.shared()
        own = config.model
        own.update({k: v for k, v in given.model.items() if k in own and k != "name"})
        config.data.canvases = given.data.canvases
        config.eval.num_select = 10
    else:
        config = tiny_config.levels(name)
    validate(config)
    params = random_params(abstract_params(build_model(config.model)))
    return Run(config, assumed_categories(config.model.num_classes), params, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dn_detr_plain", "dn_deformable_detr", "dn_dino_detr"])
def test_every_variant_computes_the_same(name, tmp_path):
    """Catches an operation of a variant that is converted wrongly; all canvases are square."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "detector.onnx"
    assert export_onnx.export_onnx(tiny_run(name), path, canvas=(64, 64), batch_size=2) < 1e-5
    assert path.exists()
