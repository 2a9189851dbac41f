"""Import and export of PyTorch weights: names, files, errors, and the way back."""

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import tiny as tiny_config
from flax import traverse_util

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.checkpoints.run_config import read_config
from dn_detr_jax.config import (
    base_config,
    validate,
)
from dn_detr_jax.data.coco_classes import Category
from dn_detr_jax.errors import ConfigError, ConversionError, WeightsError
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.architecture import check_config, official_config
from dn_detr_jax.interop.convert import (
    backbone_from_torch,
    flat,
    params_from_torch,
    params_to_torch,
)
from dn_detr_jax.interop.export_torch import export
from dn_detr_jax.interop.import_torch import convert
from dn_detr_jax.interop.initial import load_initial
from dn_detr_jax.interop.names.backbones import RESNET
from dn_detr_jax.interop.names.dn_dab_detr import NAMES
from dn_detr_jax.models.registry import abstract_params, build_model

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parent.parent


def small_config(**model):
    config = tiny_config.weights(**model)
    validate(config)
    return config


def shapes_of(config):
    return {k: v.shape for k, v in flat(abstract_params(build_model(config.model))).items()}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    values = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes_of(config).items()}
    return traverse_util.unflatten_dict(values, sep="/")


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture
def state(params):
    return params_to_torch(params, NAMES)


# --- names ----------------------------------------------------------------------------------------


def test_official_names_and_shapes_are_those_of_the_reference():
    """Catches a wrong name or shape of any tensor of the official model."""
    manifest = json.loads((DATA / "reference" / "dn_dab_detr_r50.json").read_text())
    official = {entry["name"]: tuple(entry["shape"]) for entry in manifest["state_dict"]}
    tensors, foreign = NAMES.tensors(shapes_of(base_config()))
    ours = {name: t.shape for t in tensors for name in (t.name, *NAMES.second_names(t.name))}
    assert ours == official
    assert foreign == []
    assert {name for t in tensors for name in NAMES.second_names(t.name)} == {
        a for a, _ in manifest["tied"]
    }


@pytest.mark.parametrize(
    ("depth", "dilation", "patterns", "activation"),
    [
        (18, False, 0, "relu"),
        (34, False, 0, "prelu"),
        (50, True, 3, "relu"),
        (101, True, 3, "prelu"),
    ],
)
def test_every_parameter_of_every_variant_has_one_tensor(depth, dilation, patterns, activation):
    config = small_config(num_patterns=patterns, activation=activation)
    config.model.backbone.update(depth=depth, dilation=dilation)
    shapes = shapes_of(config)
    tensors, foreign = NAMES.tensors(shapes)
    paths = [path for tensor in tensors for path in tensor.paths]
    assert foreign == []
    assert sorted(paths) == sorted(shapes)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert ("transformer.patterns.weight" in {t.name for t in tensors}) == (patterns > 0)


def test_round_trip_is_exact_in_both_directions(config, params, state):
    back, account = params_from_torch(state, shapes_of(config), NAMES)
    assert account.unfilled == account.unused == ()
    assert len(account.tied) == 6
    for path, value in flat(params).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path, strict=True)
    again = params_to_torch(traverse_util.unflatten_dict(back, sep="/"), NAMES)
    assert list(again) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name, strict=True)


def test_layouts(params, state):
    """Catches a layout that is wrong both ways, which the round trip does not notice."""
    layer = params["encoder"]["layer0"]
    packed = state["transformer.encoder.layers.0.self_attn.in_proj_weight"]
    np.testing.assert_array_equal(packed[32:64], layer["key"]["kernel"].T)
    convolution = params["backbone"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(
        state[RESNET.prefix + "conv1.weight"][2, 1, 3, 5], convolution[3, 5, 1, 2]
    )
    np.testing.assert_array_equal(
        state["input_proj.weight"][3, 4, 0, 0], params["input_proj"]["kernel"][4, 3]
    )
    variance = params["backbone"]["layer2_block0"]["downsample_norm"]["var"]
    name = RESNET.prefix + "layer2.0.downsample.1.running_var"
    np.testing.assert_array_equal(state[name], variance)
    assert state["transformer.decoder.layers.1.activation.weight"].shape == (1,)


# --- accounts and errors --------------------------------------------------------------------------


def test_unused_and_unfilled_are_listed(config, state):
    del state["label_enc.weight"]
    state["module.extra.weight"] = np.zeros(3, np.float32)
    _, account = params_from_torch(state, shapes_of(config), NAMES)
    assert account.unused == ("extra.weight",)
    assert account.unfilled == ("label_embedding",)


def test_a_wrong_shape_is_named(config, state):
    state["class_embed.bias"] = np.zeros(8, np.float32)
    with pytest.raises(ConversionError, match=r"class_embed.bias has shape \(8,\), not \(7,\)"):
        params_from_torch(state, shapes_of(config), NAMES)


def test_tied_heads_that_differ_are_an_error(config, state):
    name = "transformer.decoder.bbox_embed.layers.1.bias"
    state[name] = state[name] + 1
    with pytest.raises(ConversionError, match=r"bbox_embed.layers.1.bias.*differ"):
        params_from_torch(state, shapes_of(config), NAMES)


def test_one_name_of_tied_heads_is_enough(config, params, state):
    for name in [name for name in state if name.startswith("bbox_embed.")]:
        del state[name]
    back, account = params_from_torch(state, shapes_of(config), NAMES)
    assert account.unfilled == ()
    np.testing.assert_array_equal(
        back["box_head/layer2/kernel"], params["box_head"]["layer2"]["kernel"]
    )


def test_half_precision_becomes_float32(config, state):
    state["refpoint_embed.weight"] = state["refpoint_embed.weight"].astype(jnp.bfloat16)
    back, _ = params_from_torch(state, shapes_of(config), NAMES)
    assert back["anchors"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"num_patterns": 3}, "--config.model.num_patterns=3"),
        ({"activation": "relu"}, "--config.model.activation=relu"),
        ({"decoder_layers": 3}, "--config.model.decoder_layers=3"),
        ({"num_classes": 9}, "--config.model.num_classes=9"),
        ({"depth": 34}, "--config.model.backbone.depth=34"),
        ({"depth": 101}, "--config.model.backbone.depth=101"),
    ],
)
def test_a_checkpoint_of_another_model_says_which_config_fits(config, change, hint):
    other = small_config()
    section = other.model.backbone if "depth" in change else other.model
    section.update(change)
    state = params_to_torch(random_params(other), NAMES)
    with pytest.raises(ConversionError) as error:
        convert(state, config)
    assert f"it fits {hint}" in str(error.value)


def test_the_stored_command_line_tells_what_shapes_do_not(config, state):
    """Covers DC5 and the number of heads, which the tensors do not show."""
    found = official_config(state, {"dilation": True, "nheads": 8, "lr": 1.0}, config.model)
    with pytest.raises(ConversionError, match=r"backbone.dilation=True --config.model.num_heads=8"):
        check_config(found, config, reset_heads=False)


def test_other_models_are_recognized(config):
    needed = ("class_embed.weight", "refpoint_embed.weight", "label_enc.weight")
    offsets = "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
    deformable = dict.fromkeys((*needed, offsets), np.zeros((4, 4)))
    with pytest.raises(ConversionError, match=r"it has .*sampling_offsets"):
        convert(deformable, config)
    with pytest.raises(ConversionError, match=r"no dn_dab_detr .it has no class_embed.weight"):
        convert({"conv1.weight": np.zeros((4, 3, 7, 7))}, config)


def test_models_without_an_official_counterpart_are_not_exported():
    config = small_config()
    config.model.backbone.update(norm="group_norm", width=16)
    with pytest.raises(ConversionError, match=r"no place for backbone/.*norm"):
        params_to_torch(random_params(config), NAMES)


# --- backbones ------------------------------------------------------------------------------------


def resnet_state(config, prefix=""):
    official = params_to_torch(random_params(config), NAMES)
    state = {
        prefix + name.removeprefix(RESNET.prefix): value
        for name, value in official.items()
        if name.startswith(RESNET.prefix)
    }
    extra = {"fc.weight": np.zeros((10, 64), np.float32), "bn1.num_batches_tracked": np.int64(3)}
    return state | {prefix + name: np.asarray(value) for name, value in extra.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.body."])
def test_resnets_in_the_names_of_torchvision_and_timm(config, params, prefix):
    loaded, account = backbone_from_torch(resnet_state(config, prefix), shapes_of(config))
    assert set(loaded) == {path for path in shapes_of(config) if path.startswith("backbone/")}
    assert account.unused == ("fc.weight",)
    np.testing.assert_array_equal(
        loaded["backbone/layer3_block1/conv2/kernel"],
        params["backbone"]["layer3_block1"]["conv2"]["kernel"],
    )


@pytest.mark.parametrize("depth", [34, 50])
def test_another_resnet_says_which_config_fits(config, depth):
    other = small_config()
    other.model.backbone.depth = depth
    with pytest.raises(ConversionError, match=f"model.backbone.depth={depth}"):
        backbone_from_torch(resnet_state(other), shapes_of(config))


def test_backbones_that_can_not_take_a_resnet():
    config = small_config()
    state = resnet_state(config)
    config.model.backbone.update(norm="group_norm", width=16)
    with pytest.raises(ConversionError, match="frozen_batch_norm"):
        backbone_from_torch(state, shapes_of(config))
    with pytest.raises(ConversionError, match=r"layer1.0.conv1.weight, the source has 0"):
        backbone_from_torch({"a": np.zeros(1)}, shapes_of(config))


# --- files ----------------------------------------------------------------------------------------


def test_files_of_real_pytorch():
    """Covers both formats of torch.save, with views, all dtypes, an optimizer and arguments."""
    matrix = np.arange(24.0).reshape(4, 6)
    for name in ("zip.pth", "legacy.pth"):
        file = torch_files.read(DATA / "pth_files" / name)
        assert file.entry == "model"
        assert file.args == {"dilation": True, "nheads": 8, "output_dir": "runs"}
        state = file.state
        for key in ("matrix", "half", "bfloat16"):
            np.testing.assert_array_equal(state[key].astype(np.float64), matrix)
        assert [state[k].dtype.name for k in ("half", "bfloat16")] == ["float16", "bfloat16"]
        np.testing.assert_array_equal(state["transposed"], matrix.T)
        np.testing.assert_array_equal(state["window"], matrix[1:3, 2:5])
        np.testing.assert_array_equal(state["integers"], [0, 1, 2])
        np.testing.assert_array_equal(state["parameter"], [1, 1])
        np.testing.assert_array_equal(state["flags"], [True, False])
        assert state["scalar"] == 3.5
        assert state["scalar"].shape == ()
        assert state["empty"].shape == (0, 4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_written_files_are_read_back(tmp_path, state, suffix):
    path = tmp_path / f"state{suffix}"
    torch_files.write(path, state)
    back = torch_files.read(path).state
    assert list(back) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, strict=True)


def test_other_entries_of_a_file(tmp_path):
    arrays = {"ema_model": {"a": FakeTensor([1.0])}, "b": {"a": FakeTensor([2.0])}}
    path = save_pth(tmp_path / "f.pth", arrays)
    assert torch_files.read(path).entry == "ema_model"
    assert torch_files.read(path, "b").state["a"] == 2.0
    with pytest.raises(WeightsError, match=r"under 'c'; there are \['ema_model', 'b'\]"):
        torch_files.read(path, "c")


def test_bfloat16_safetensors(tmp_path):
    values = np.arange(6).astype(jnp.bfloat16)
    header = {"x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    np.testing.assert_array_equal(torch_files.read(path).state["x"], values.reshape(2, 3))


class FakeTensor:
    """Pickles as a tensor does, without PyTorch."""

    def __init__(self, values, shape=None, strides=None, offset=0):
        self.values = np.asarray(values, np.float32)
        self.shape = self.values.shape if shape is None else shape
        self.strides = strides or tuple(s // 4 for s in self.values.strides)
        self.offset = offset

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        storage = FakeStorage(self.values)
        return rebuild, (storage, self.offset, self.shape, self.strides, False, {})


class FakeStorage:
    def __init__(self, values):
        self.values = values


def save_pth(path, content, monkey=None):
    """Writes the format of `torch.save` with Python's own pickle and a stand-in for PyTorch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    exec("class FloatStorage: pass\nFloatStorage.__module__ = 'torch'", torch.__dict__)
    exec("def _rebuild_tensor_v2(*args): pass", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, FakeStorage):
                return None
            key = str(len(storages))
            storages[key] = thing.values
            return ("storage", torch.FloatStorage, key, "cpu", thing.values.size)

    buffer = io.BytesIO()
    real = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        Pickler(buffer, 2).dump(content)
    finally:
        for name, module in real.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", buffer.getvalue())
        for key, values in storages.items():
            archive.writestr(f"f/data/{key}", values.tobytes())
    return path


class Hostile:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["model", "args", "optimizer", "legacy"])
@pytest.mark.parametrize("function", [os.system, eval, exec, print, getattr, subprocess.call])
def test_no_code_of_a_file_is_run(tmp_path, place, function):
    marker = tmp_path / "marker"
    script = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    content = {"model": {"a": FakeTensor([1.0])}, "args": argparse.Namespace()}
    if place == "legacy":
        path = tmp_path / "f.pth"
        path.write_bytes(pickle.dumps(Hostile(function, script), 2))
    else:
        content[place] = {"x": Hostile(function, script)}
        path = save_pth(tmp_path / "f.pth", content)
    with pytest.raises(WeightsError, match=r"asks for .*nothing was run"):
        torch_files.read(path)
    assert not marker.exists()


def test_a_pickle_can_not_change_what_reads_it(tmp_path):
    """Catches BUILD with slots, which sets attributes on the object below it on the stack."""
    for name in ("torch._utils\n_rebuild_tensor_v2", "argparse\nNamespace"):
        before = dict(vars(argparse.Namespace))
        # BUILD with (None, {"_call": "a"})
        program = b"\x80\x02c" + name.encode() + b"\n(N}"
        program += b"X\x05\x00\x00\x00_callX\x01\x00\x00\x00astb."
        path = tmp_path / "f.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("f/data.pkl", program)
        with pytest.raises(WeightsError):
            torch_files.read(path)
        assert dict(vars(argparse.Namespace)) == before
    state = torch_files.read(save_pth(tmp_path / "g.pth", {"a": FakeTensor([3.0])})).state
    assert state["a"] == 3.0


@pytest.mark.parametrize(
    "tensor",
    [
        FakeTensor([1.0, 2.0], shape=(3,)),
        FakeTensor([1.0, 2.0], shape=(1,), offset=2),
        FakeTensor([1.0, 2.0], shape=(1,), offset=-1),
        FakeTensor([1.0, 2.0], shape=(2,), strides=(-1,)),
        FakeTensor([1.0, 2.0], shape=(2, 10**12), strides=(0, 0)),
    ],
)
def test_tensors_that_leave_their_storage(tmp_path, tensor):
    """Catches strides that read memory outside of the file's data."""
    with pytest.raises(WeightsError, match="damaged"):
        torch_files.read(save_pth(tmp_path / "f.pth", {"model": {"a": tensor}}))


def test_files_that_are_no_state_dicts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pth: there is no such file"):
        torch_files.read(tmp_path / "none.pth")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(WeightsError, match=r"suffix must be one of .safetensors"):
        torch_files.read(tmp_path / "x.txt")
    with pytest.raises(WeightsError, match="no tensors"):
        torch_files.read(save_pth(tmp_path / "f.pth", {"epoch": 3}))
    with pytest.raises(WeightsError, match="holds a list"):
        torch_files.read(save_pth(tmp_path / "f.pth", [FakeTensor([1.0])]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_truncated_files(tmp_path, state, suffix):
    path = tmp_path / f"f{suffix}"
    torch_files.write(path, state)
    data = path.read_bytes()
    for length in (0, 5, len(data) // 3, len(data) - 40):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"f\."):
            torch_files.read(path)


# --- starting a training from them ----------------------------------------------------------------


def placed(params):
    return jax.tree.map(jnp.asarray, params)


def assert_equal_trees(ours, expected):
    for path, value in flat(expected).items():
        np.testing.assert_array_equal(flat(ours)[path], value, err_msg=path)


def test_load_initial_without_anything_changes_nothing(config, params):
    assert load_initial(params, config) is params


def test_load_initial_backbone(tmp_path, config, params):
    torch_files.write(tmp_path / "r.pth", resnet_state(config))
    start = small_config()
    start.init.backbone = str(tmp_path / "r.pth")
    fresh = random_params(config, seed=1)
    loaded = load_initial(placed(fresh), start)
    assert_equal_trees(loaded, fresh | {"backbone": params["backbone"]})
    start.init.backbone = str(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"config.init.backbone = .*there is no such file"):
        load_initial(placed(fresh), start)


@pytest.fixture
def workdir(tmp_path, config, params):
    with Checkpoints(tmp_path / "run", config) as checkpoints:
        checkpoints.save(0, {"params": placed(params)})
    return tmp_path / "run"


def test_load_initial_checkpoint(workdir, config, params):
    start = small_config()
    start.init.checkpoint = str(workdir)
    assert_equal_trees(load_initial(placed(random_params(config, 1)), start), params)
    start.init.checkpoint = str(workdir / "none")
    with pytest.raises(ConfigError, match="no work directory"):
        load_initial(placed(params), start)


def test_load_initial_with_other_classes(workdir, params):
    start = small_config(num_classes=3)
    start.init.checkpoint = str(workdir)
    fresh = random_params(start, 1)
    with pytest.raises(
        ConfigError, match=r"class_head/bias is \[7\] there, \[3\] here.*reset_heads"
    ):
        load_initial(placed(fresh), start)
    start.init.reset_heads = True
    loaded = load_initial(placed(fresh), start)
    expected = params | {"class_head": fresh["class_head"]}
    # The last row stands for no class; the matching queries start from it.
    expected["label_embedding"] = np.concatenate(
        [fresh["label_embedding"][:-1], params["label_embedding"][-1:]]
    )
    assert_equal_trees(loaded, expected)


CLASSES = ("cat", "dog", "cow", "pig", "hen", "bee", "ant")


def named(*names):
    return tuple(Category(i + 1, name) for i, name in enumerate(names))


@pytest.mark.parametrize(
    "here",
    [
        CLASSES[::-1],
        ("", "cat", "", "dog", "cow", "pig", "hen", "bee", "ant"),  # more labels, two unused
    ],
)
def test_kept_heads_follow_the_class_names(tmp_path, config, params, here):
    """Catches mixed-up heads if the same classes have another order."""
    with Checkpoints(tmp_path, config, categories=named(*CLASSES)) as checkpoints:
        checkpoints.save(0, {"params": placed(params)})
    start = small_config(num_classes=len(here))
    start.init.checkpoint = str(tmp_path)
    fresh = random_params(start, 1)
    loaded = load_initial(placed(fresh), start, named(*here))
    for label, name in enumerate(here):
        source, row = (params, CLASSES.index(name)) if name else (fresh, label)
        for there, ours in (
            (source["class_head"]["kernel"][:, row], loaded["class_head"]["kernel"][:, label]),
            (source["class_head"]["bias"][row], loaded["class_head"]["bias"][label]),
            (source["label_embedding"][row], loaded["label_embedding"][label]),
        ):
            np.testing.assert_array_equal(ours, there)
    no_object = params["label_embedding"][-1]
    np.testing.assert_array_equal(loaded["label_embedding"][-1], no_object)
    np.testing.assert_array_equal(loaded["anchors"], params["anchors"])


def test_kept_heads_of_other_classes_are_an_error(tmp_path, config, params):
    with Checkpoints(tmp_path, config, categories=named(*CLASSES)) as checkpoints:
        checkpoints.save(0, {"params": placed(params)})
    start = small_config()
    start.init.checkpoint = str(tmp_path)
    others = named(*CLASSES[:-1], "fly")
    with pytest.raises(ConfigError, match=r"only in .*'ant'.*'fly'.*reset_heads=True"):
        load_initial(placed(params), start, others)
    assert_equal_trees(load_initial(placed(params), start, named(*CLASSES)), params)


def test_load_initial_from_another_model(workdir):
    start = small_config(num_queries=6)
    start.init.update(checkpoint=str(workdir), reset_heads=True)
    with pytest.raises(
        ConfigError, match=r"another model: anchors is \[5, 4\] there, \[6, 4\] here"
    ):
        load_initial(placed(random_params(start)), start)


def test_import_with_other_classes(config, params, state):
    target = small_config(num_classes=3)
    with pytest.raises(ConversionError, match="reset_heads=True"):
        convert(state, target)
    target.init.reset_heads = True
    found = convert(state, target)
    imported, account = found.params, found.report
    assert set(account.unused) == {"class_embed.weight", "class_embed.bias", "label_enc.weight"}
    assert imported["class_head"]["bias"].shape == (3,)
    np.testing.assert_array_equal(imported["label_embedding"][-1], params["label_embedding"][-1])
    np.testing.assert_array_equal(imported["anchors"], params["anchors"])


def test_init_names_one_source(config):
    both = small_config()
    both.init.update(checkpoint="a", backbone="b")
    with pytest.raises(ConfigError, match=r"init.backbone = 'b'"):
        validate(both)


def test_import_and_export_commands(tmp_path, params, state):
    """Runs the command line in another process, then converts back, bit for bit."""
    torch_files.write(tmp_path / "official.pth", state)
    config_file = tmp_path / "small.py"
    config_file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_interop import small_config\n\n"
        "def get_config():\n    return small_config()\n"
    )
    command = [sys.executable, "-m", "dn_detr_jax", "import", "official.pth"]
    command += ["--config", str(config_file), "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "6 tied tensors equal" in done.stdout
    classes = read_config(tmp_path / "run")[1]
    assert len(classes) == len(state["class_embed.weight"]) and classes[1].name == "class 1"
    exported = export(tmp_path / "run")
    assert set(exported) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(exported[name], value, strict=True)
    again = run()
    assert again.returncode == 1
    assert "a directory without checkpoints: none is replaced" in again.stderr
    wrong = run("--config.model.num_patterns=3", "--out", "other")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1] == (
        "error: the checkpoint is of another model; it fits --config.model.num_patterns=0"
    )
