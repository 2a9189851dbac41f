"""Weights by name: a folder as the hub, the download, and what to do without a network."""

import hashlib
import json
import sys
import types

import numpy as np
import pytest
from data import tiny as tiny_config
from test_interop import placed, random_params, resnet_state

from dn_detr_jax.data.coco_classes import COCO_CATEGORIES
from dn_detr_jax.errors import ConfigError, ConversionError, WeightsError
from dn_detr_jax.interop import hub, torch_files
from dn_detr_jax.interop.convert import flat, params_to_torch
from dn_detr_jax.interop.import_torch import import_file
from dn_detr_jax.interop.initial import load_initial
from dn_detr_jax.interop.names import dn_dab_detr, elsewhere


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is the hub."""
    monkeypatch.setenv("DN_DETR_JAX_HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def online(monkeypatch):
    """A huggingface_hub whose `files` are what it can download, by (repository, name)."""

    class EntryNotFoundError(Exception):
        pass

    def hf_hub_download(repository, name):
        if (repository, name) not in module.files:
            raise EntryNotFoundError(f"no {name} in\n{repository}")
        return str(module.files[repository, name])

    module = types.ModuleType("huggingface_hub")
    module.files, module.hf_hub_download = {}, hf_hub_download
    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError = EntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return module


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_files.write(path, state)
    return path


def test_a_backbone_by_name(folder, capsys):
    """Catches a name that is taken for a path, and a checksum that is not of the file."""
    config = tiny_config.weights()
    state = {k: v for k, v in resnet_state(config).items() if v.dtype == np.float32}
    path = write(folder / "timm" / "resnet18.tv_in1k" / "model.safetensors", state)
    config.init.backbone = "hf:timm/resnet18.tv_in1k"
    fresh = random_params(config, 1)
    loaded = flat(load_initial(placed(fresh), config))
    expected = flat(random_params(config))["backbone/stem_conv/kernel"]
    np.testing.assert_array_equal(loaded["backbone/stem_conv/kernel"], expected)
    printed = capsys.readouterr().out
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"hf:timm/resnet18.tv_in1k: {path}, sha256 {checksum}" in printed


def test_a_detector_by_name(folder, tmp_path):
    """A file of detrex starts a training on COCO's classes in another order."""
    trained = random_params(tiny_config.weights(num_classes=80, activation="prelu"))
    state = elsewhere.DETREX_DN_DETR.from_official(params_to_torch(trained, dn_dab_detr.NAMES))
    write(folder / "lab" / "detector" / "v1" / "best.pth", state)
    config = tiny_config.weights(num_classes=80, activation="prelu")
    config.init.checkpoint = "hf:lab/detector:v1/best.pth"
    fresh = random_params(config, 1)
    loaded = flat(load_initial(placed(fresh), config, COCO_CATEGORIES[::-1]))
    bias, table = trained["class_head"]["bias"], trained["label_embedding"]
    np.testing.assert_array_equal(loaded["class_head/bias"], bias[::-1])
    np.testing.assert_array_equal(loaded["label_embedding"][:-1], table[:-1][::-1])
    np.testing.assert_array_equal(loaded["label_embedding"][-1], table[-1])
    np.testing.assert_array_equal(loaded["anchors"], trained["anchors"])
    report = import_file("hf:lab/detector:v1/best.pth", config, tmp_path / "imported")
    assert report.source == "detrex"
    config.model.num_queries = 7
    with pytest.raises(ConfigError, match=r"init\.checkpoint = 'hf:lab.*model\.num_queries=5"):
        load_initial(placed(fresh), config)


def test_the_first_file_that_a_repository_has_is_downloaded(folder, online, tmp_path):
    """Catches a download of a file that the folder has, and a repository without safetensors."""
    binary = write(tmp_path / "pytorch_model.pth", {"a": np.ones(2, np.float32)})
    online.files["lab/model", "pytorch_model.bin"] = binary
    assert hub.fetch("hf:lab/model") == binary
    mine = write(folder / "lab" / "model" / "model.safetensors", {"a": np.ones(1, np.float32)})
    assert hub.fetch("hf:lab/model") == mine


def test_a_damaged_download_is_noticed(folder, online, tmp_path):
    """The cache names large files by their sha256, and `model.safetensors` links to them."""
    blob = tmp_path / hashlib.sha256(b"whole").hexdigest()
    (tmp_path / "model.safetensors").symlink_to(blob)
    online.files["lab/model", "model.safetensors"] = tmp_path / "model.safetensors"
    blob.write_bytes(b"whole")
    assert hub.fetch("hf:lab/model") == tmp_path / "model.safetensors"
    blob.write_bytes(b"whol")
    with pytest.raises(WeightsError, match="damaged: its sha256 is"):
        hub.fetch("hf:lab/model")


def test_without_a_network_it_says_where_to_put_which_file(folder, online):
    with pytest.raises(WeightsError) as error:
        hub.fetch("hf:timm/resnet50.tv_in1k")
    address = "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors"
    target = folder / "timm" / "resnet50.tv_in1k" / "model.safetensors"
    assert str(error.value).endswith(f"or put {address} at {target}")
    assert "no model.safetensors in timm/resnet50.tv_in1k" in str(error.value)


def test_without_the_optional_package_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install huggingface_hub, or put .*/v2/x\.pth at"):
        hub.fetch("hf:lab/model:v2/x.pth")


def test_settings_of_transformers_beside_the_weights(folder, tmp_path):
    """Catches a `config.json` that nobody reads: DC5 and classes are told by nothing else."""
    config = tiny_config.weights(num_classes=3, activation="prelu")
    params = random_params(config)
    params["label_embedding"][-1] = 0
    state = elsewhere.TRANSFORMERS_DAB_DETR.from_official(
        params_to_torch(params, dn_dab_detr.NAMES)
    )
    beside = write(folder / "lab" / "birds" / "model.safetensors", state).parent
    own = {
        "model_type": "dab-detr",
        "id2label": {"0": "N/A", "1": "tit", "2": "jay"},
        "encoder_attention_heads": config.model.num_heads,
        "decoder_attention_heads": config.model.num_heads,
        "temperature_height": config.model.pe_temperature_h,
    }
    pixels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (beside / "config.json").write_text(json.dumps(own))
    (beside / "preprocessor_config.json").write_text(json.dumps(pixels))
    import_file("hf:lab/birds", config, tmp_path / "imported")
    stored = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert [category["name"] for category in stored["categories"]] == ["", "tit", "jay"]
    for change, words in (
        ({"dilation": True}, r"fits --config\.model\.backbone\.dilation=True"),
        ({"temperature_height": 10}, r"fits --config\.model\.pe_temperature_h=10"),
        ({"normalize_before": True}, r"config\.json: normalize_before=True has no counterpart"),
        ({"id2label": {"0": "tit"}}, r"1 names of classes, but the model has 3"),
    ):
        (beside / "config.json").write_text(json.dumps(own | change))
        with pytest.raises((ConversionError, WeightsError), match=words):
            import_file("hf:lab/birds", config, tmp_path / "other")
    (beside / "config.json").write_text(json.dumps(own))
    (beside / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json: image_mean=\[0\.5, "):
        import_file("hf:lab/birds", config, tmp_path / "other")


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:lab/model:", "hf:lab/../x", "hf:a/b/c"])
def test_malformed_names(folder, name):
    with pytest.raises(WeightsError, match="expected hf:OWNER/NAME or"):
        hub.fetch(name)
