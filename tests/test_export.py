"""Exported detectors: run by jax alone in another process, against the predictor."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from fast_jit import XLA_FLAGS, fast_jit
from ml_collections import ConfigDict
from PIL import Image

from dn_detr_jax.commands.command_line import CanvasParser
from dn_detr_jax.inference import exported
from dn_detr_jax.inference.export import export
from dn_detr_jax.inference.exported import ExportedDetector, ExportedError, load_exported
from dn_detr_jax.inference.predictor import Predictor, choose_canvas, read_run
from dn_detr_jax.inference.weights import restore_weights, store_weights

_ROOT = Path(__file__).parent.parent
CANVAS = (96, 128)

# Runs in a folder with nothing but the copied loader; no library but jax, NumPy and what jax needs.
_ALONE = """
import pathlib
import sys
import sysconfig

ALLOWED = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
packages = pathlib.Path(sysconfig.get_path("purelib"))
BLOCKED = {path.name.partition(".")[0] for path in packages.iterdir()} - ALLOWED

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Only())
import numpy as np
from exported import load_exported

detector = load_exported(sys.argv[1])
images = np.load(sys.argv[2])
prepared = [detector.prepare(images[name]) for name in images.files]
images, sizes = (np.stack(part) for part in zip(*prepared))
np.savez(sys.argv[3], **detector(images, sizes))
assert {"flax", "ml_collections", "PIL"} <= BLOCKED and "dn_detr_jax" not in sys.modules
print(detector.classes[1]["name"], detector.metadata["platforms"])
"""


@pytest.fixture(scope="module")
def images():
    """Makes images as large as the canvas, larger, smaller and of another aspect."""
    rng = np.random.default_rng(0)
    sizes = [CANVAS, (240, 320), (50, 60), (70, 40), (300, 20)]
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def exported_file(digits_run, tmp_path_factory):
    """For all platforms, on a machine that has one; two images at a time."""
    path = tmp_path_factory.mktemp("exported") / "new" / "detector.zip"
    run = dataclasses.replace(read_run(digits_run), threshold=0.31)
    export(run, path, platforms=("cpu", "cuda", "rocm", "tpu"), batch_size=2)
    return path


@pytest.fixture(scope="module")
def detector(exported_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit)
        return load_exported(exported_file)


@pytest.mark.smoke
def test_another_process_with_jax_alone_finds_the_same(
    exported_file, digits_run, predictor, images, tmp_path
):
    """Catches a loader that needs this package, another preprocessing, boxes in other units."""
    shutil.copy(exported.__file__, tmp_path / "exported.py")
    (tmp_path / "alone.py").write_text(_ALONE)
    np.savez(tmp_path / "images.npz", *images)
    done = subprocess.run(
        [sys.executable, "alone.py", exported_file, "images.npz", "found.npz"],
        cwd=tmp_path,
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("one ['cpu', 'cuda', 'rocm', 'tpu']")
    run = read_run(digits_run)
    run.config.data.canvases = (CANVAS,)
    named = [type(c)(c.id, c.name or "x") for c in run.categories]
    expected = Predictor(run.config, run.params, named, batch_size=2)
    expected._programs[CANVAS] = predictor._compiled(CANVAS)
    with np.load(tmp_path / "found.npz") as found:
        for i, wanted in enumerate(expected.predict(images, threshold=0.0)):
            height, width = wanted.size
            assert len(wanted) == found["scores"].shape[1] == run.config.eval.num_select
            # A difference of one gray level in resizing changes the scores slightly.
            np.testing.assert_allclose(found["scores"][i], wanted.scores, atol=2e-3)
            same = found["labels"][i] == wanted.labels
            assert same.mean() > 0.8
            boxes = found["boxes"][i] * [width, height, width, height]
            difference = np.abs(boxes - wanted.boxes) / max(wanted.size)
            assert np.median(difference[same]) < 1e-3
            if i == 0:  # nothing to resize
                np.testing.assert_allclose(found["scores"][i], wanted.scores, atol=1e-5)
                np.testing.assert_array_equal(found["labels"][i], wanted.labels)
                np.testing.assert_allclose(boxes, wanted.boxes, atol=1e-3)


def _detector(canvas, short_side, max_long_side):
    metadata = {"canvas": canvas, "batch_size": 1, "num_select": 1, "classes": []}
    metadata |= {"short_side": short_side, "max_long_side": max_long_side}
    nothing = jax.export.export(jax.jit(lambda params: 0))({})
    return ExportedDetector(metadata, nothing, {})


@pytest.mark.parametrize(
    ("canvas", "short", "long"), [((800, 1344), 800, 1333), ((96, 96), 90, 128)]
)
def test_sizes_are_those_of_the_predictor(canvas, short, long):
    detector = _detector(canvas, short, long)
    config = ConfigDict({"eval_short_side": short, "eval_max_long_side": long})
    rng = np.random.default_rng(0)
    for size in [(480, 640), (1, 4000), (4000, 1), *rng.integers(1, 3000, (500, 2)).tolist()]:
        assert detector.target_size(*size) == tuple(choose_canvas(tuple(size), [canvas], config)[1])


@pytest.mark.parametrize("size", [(200, 300), (31, 57), (96, 40), (500, 501)])
def test_resize_is_that_of_pillow(size):
    """Catches a filter that does not widen, and pixels off by a half."""
    detector = _detector((96, 128), 90, 120)
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    image, (height, width) = detector.prepare(pixels)
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    difference = image[:height, :width].astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1
    assert not image[height:].any() and not image[:, width:].any()


def test_rows_do_not_depend_on_each_other(detector, images):
    """Catches filled-up batches, and their results in another order."""
    images, sizes = (np.stack(p) for p in zip(*map(detector.prepare, images), strict=True))
    together = detector(images, sizes)
    assert len(together["scores"]) == 5
    for i in range(5):
        alone = detector(images[i : i + 1], sizes[i : i + 1])
        np.testing.assert_allclose(alone["scores"][0], together["scores"][i], atol=1e-5)
        np.testing.assert_allclose(alone["boxes"][0], together["boxes"][i], atol=1e-5)
    none = detector(images[:0], sizes[:0])
    assert none["boxes"].shape == (0, detector.num_select, 4)


@pytest.mark.parametrize(
    ("images", "sizes", "words"),
    [
        (np.zeros((1, 96, 128, 3), np.float32), [[9, 9]], r"float32\[1, 96, 128, 3\]"),
        (np.zeros((1, 128, 96, 3), np.uint8), [[9, 9]], r"expected uint8 \[1, 96, 128, 3\]"),
        (np.zeros((1, 96, 128, 3), np.uint8), [[9, 9, 9]], r"expected int \[1, 2\]"),
        (np.zeros((1, 96, 128, 3), np.uint8), [[97, 9]], r"1 to \(96, 128\)"),
        (np.zeros((1, 96, 128, 3), np.uint8), [[0, 9]], r"1 to \(96, 128\)"),
    ],
)
def test_wrong_arrays_are_named(detector, images, sizes, words):
    with pytest.raises(ValueError, match=words):
        detector(images, np.array(sizes))
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
        detector.prepare(images[0].astype(np.float32))


# Files


def _rewritten(path, target, change):
    """A copy of an exported file with other metadata."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "metadata.json":
                metadata = json.loads(data)
                change(metadata)
                data = json.dumps(metadata).encode()
            new.writestr(name, data)
    return target


def _error_of(path):
    with pytest.raises(ExportedError) as error:
        load_exported(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


def test_files_that_are_no_exported_detectors(exported_file, tmp_path):
    """Catches errors that name neither the file nor what is wrong with it."""
    whole = exported_file.read_bytes()
    other = tmp_path / "other.zip"
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        other.write_bytes(content)
        assert "not a file of dn_detr_jax export, or a damaged one" in _error_of(other)
    with zipfile.ZipFile(exported_file) as archive:
        places = [archive.getinfo(name).header_offset + 400 for name in archive.namelist()[1:3]]
    for place_ in places:
        damaged = bytearray(whole)
        damaged[place_] ^= 0x10
        other.write_bytes(damaged)
        assert re.search("damaged one.*CRC|damaged one", _error_of(other))
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("something", "else")
    assert "metadata.json" in _error_of(other)
    with pytest.raises(FileNotFoundError, match="none"):
        load_exported(tmp_path / "none.zip")


def test_the_threshold_is_that_of_the_run(exported_file, detector, tmp_path):
    """Catches a loader that refuses files of earlier versions, or takes any number."""
    assert detector.threshold == 0.31
    path = tmp_path / "other.zip"
    _rewritten(exported_file, path, lambda metadata: metadata.pop("threshold"))
    assert load_exported(path).threshold == 0.5
    for wrong in (1.5, "0.5", float("nan")):
        _rewritten(exported_file, path, lambda metadata, v=wrong: metadata.update(threshold=v))
        assert "damaged one" in _error_of(path)


def test_another_format_version_or_platform(exported_file, tmp_path, monkeypatch):
    path = tmp_path / "other.zip"
    _rewritten(exported_file, path, lambda metadata: metadata.update(format=3))
    assert "has format 3, this loader reads formats 1 and 2" in _error_of(path)
    _rewritten(exported_file, path, lambda metadata: metadata.update(platforms=["tpu"]))
    assert "is for tpu, but jax runs on cpu here" in _error_of(path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "is for tpu, but jax runs on cuda or rocm here" in _error_of(path)
    monkeypatch.undo()

    def newer(data):
        raise ValueError("unknown version 99\nof something")

    def without_flatbuffers(data):
        raise ImportError("Please install 'flatbuffers'")

    monkeypatch.setattr(jax.export, "deserialize", without_flatbuffers)
    assert _error_of(exported_file).endswith("can't be read here: Please install 'flatbuffers'")
    monkeypatch.setattr(jax.export, "deserialize", newer)
    assert f"exported with jax {jax.__version__}, which jax" in _error_of(exported_file)


def test_no_pickle_is_read(exported_file, tmp_path):
    """Catches parameters that could run code when they are read."""
    path = tmp_path / "pickle.zip"
    shutil.copy(exported_file, path)
    with zipfile.ZipFile(path, "a") as archive, archive.open("params/evil.npy", "w") as file:
        np.lib.format.write_array(file, np.array([{}], object), allow_pickle=True)
    assert "allow_pickle=False" in _error_of(path)


def test_another_canvas_and_nothing_left_behind(digits_run, tmp_path):
    export(read_run(digits_run), tmp_path / "b.zip", platforms=("cpu",), canvas=(64, 96))
    assert load_exported(tmp_path / "b.zip").canvas == (64, 96)
    assert list(tmp_path.iterdir()) == [tmp_path / "b.zip"]


def test_any_number_of_images_and_small_weights(digits_run, detector, images, tmp_path):
    """Catches a batch that is fixed, and kernels whose scales belong to other channels."""
    run = read_run(digits_run)
    inputs = [np.stack(p) for p in zip(*map(detector.prepare, images[:3]), strict=True)]
    expected, sizes = detector(*inputs), {}
    for weights, most in (("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.05)):
        path = tmp_path / f"{weights}.zip"
        export(run, path, platforms=("cpu",), batch_size=None, weights=weights)
        sizes[weights] = sum(
            info.file_size
            for info in zipfile.ZipFile(path).infolist()
            if info.filename.endswith("/kernel.npy")
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "jit", fast_jit)
            dynamic = load_exported(path)
        assert dynamic.batch_size is None
        found = dynamic(*inputs)
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=most)
        if weights != "float32":
            assert np.abs(found["scores"] - expected["scores"]).max() > 1e-6
    assert sizes["bfloat16"] < 0.7 * sizes["float32"]
    assert sizes["int8"] < 0.7 * sizes["bfloat16"]


def test_kernels_are_rounded_by_channel():
    """Catches one scale for all channels, and bits that are read in another order."""
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(3, 5, 4)) * [1e-3, 1, 30, 0]).astype(np.float32)
    params = {"a/kernel": kernel, "a/bias": kernel[0, 0], "anchors": kernel}
    for weights, error in (("float32", 0), ("bfloat16", 2**-8), ("int8", 1 / 254)):
        stored = store_weights(params, weights)
        restored = restore_weights({k: jax.numpy.asarray(v) for k, v in stored.items()})
        assert restored.keys() == params.keys()
        most = error * np.abs(kernel).max((0, 1)) * 1.001
        assert (np.abs(restored["a/kernel"] - kernel) <= most).all()
        for name in ("a/bias", "anchors"):
            np.testing.assert_array_equal(restored[name], params[name])


def test_a_canvas_is_height_and_width():
    assert CanvasParser().parse("800x1344") == (800, 1344)
    for wrong in ("800", "0x5", "800x", "800X1344", "8 x 9"):
        with pytest.raises(ValueError, match="expected HEIGHTxWIDTH"):
            CanvasParser().parse(wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platforms=cpu,gpu"], "expected some of cpu, cuda, rocm, tpu"),
        ([], "no work directory of a run"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, arguments, words):
    command = [
        sys.executable,
        "-m",
        "dn_detr_jax",
        "export",
        f"--workdir={tmp_path}",
        "--out=x",
    ]
    done = subprocess.run(
        [*command, *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert words in done.stderr
