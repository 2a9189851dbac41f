"""Detectors as ONNX, run by onnxruntime."""

import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from dn_detr_jax.errors import ExportError, MissingPackageError
from dn_detr_jax.inference import export_onnx
from dn_detr_jax.inference.onnx_form import in_onnx_form
from dn_detr_jax.inference.predictor import read_run


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


@pytest.mark.slow
def test_a_file_finds_the_same_in_batches_of_any_size(digits_run, predictor, tmp_path):
    """Also catches a wrong file that is kept."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    run, path = read_run(digits_run), tmp_path / "detector.onnx"
    assert export_onnx.export_onnx(run, path, canvas=(96, 128), batch_size=None) < 1e-5
    session = onnxruntime.InferenceSession(path)
    images = np.random.default_rng(1).integers(0, 256, (3, 96, 128, 3), np.uint8)
    inputs = {"images": images, "sizes": np.full((3, 2), (96, 128), np.int32)}
    found = dict(zip(("boxes", "labels", "scores"), session.run(None, inputs), strict=True))
    for row, expected in enumerate(predictor.predict(list(images), threshold=0.0)):
        named = np.isin(found["labels"][row], [i for i in range(10) if i != 6])
        np.testing.assert_allclose(found["scores"][row, named], expected.scores, atol=1e-5)
        boxes = found["boxes"][row, named] * [128, 96, 128, 96]
        np.testing.assert_allclose(boxes, expected.boxes, atol=0.01)
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ExportError, match="differ by"):
        patch.setattr(export_onnx, "TOLERANCE", -1.0)
        export_onnx.export_onnx(run, path, canvas=(96, 128), batch_size=None)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
