"""The entry of a checkpoint file with its state dict, and the names of its tensors.

The tests compare with the names of a model, wrapped and nested as training programs do it.
"""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_interop import FakeTensor, save_pth

from dn_detr_jax.errors import WeightsError
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.state_dicts import ENTRIES, WRAPPERS, select, unwrapped

NAMES = ("backbone.0.body.conv1.weight", "transformer.encoder.layers.0.linear1.bias", "fc.weight")


def state(value=0.0, prefix=""):
    return {prefix + name: np.full(2, value + i) for i, name in enumerate(NAMES)}


def assert_state(found, value=0.0):
    assert list(found) == list(NAMES)
    for i, array in enumerate(found.values()):
        np.testing.assert_array_equal(array, np.full(2, value + i))


@given(
    keys=st.lists(st.sampled_from(ENTRIES + WRAPPERS), max_size=4),
    prefix=st.lists(st.sampled_from(ENTRIES + WRAPPERS), max_size=3),
    dotted=st.booleans(),
)
@example(keys=[], prefix=["module", "model"], dotted=False)
def test_entries_and_wrappers_in_any_nesting(keys, prefix, dotted):
    """Catches an order or a depth of keys and name prefixes that is not handled."""
    content = state(prefix="".join(part + "." for part in prefix))
    if dotted and keys:
        content = {".".join(keys): content, "epoch": 3}
    else:
        for key in reversed(keys):
            content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"m": np.ones(2)}}}}
    found = select(content)
    assert_state(found.tensors)
    assert found.others == ()
    # The path that the report names leads to the same state dict.
    if found.entry:
        assert_state(select(content, found.entry).tensors)
    parts = [*keys, *prefix]
    removed = ".".join(found.stripped).split(".") if found.stripped else []
    assert removed == parts[len(found.entry.split(".")) if found.entry else 0 :]


def test_the_preferred_of_several_state_dicts():
    """The trained model before its average, a teacher before its student; others are named."""
    found = select({"ema": {"module": state(1), "updates": 9}, "model": state(2)})
    assert (found.entry, found.others) == ("model", ("ema.module",))
    assert_state(found.tensors, 2)
    found = select({"student": state(1), "teacher": {"module": state(2)}})
    assert (found.entry, found.others) == ("teacher.module", ("student",))
    flat = state(1, "student.module.") | state(2, "teacher.module.")
    found = select({"state_dict": flat})
    assert (found.entry, found.stripped) == ("state_dict.teacher", ("module",))
    assert found.others == ("state_dict.student",)
    assert_state(found.tensors, 2)
    assert_state(select({"state_dict": flat}, "state_dict.student").tensors, 1)
    assert_state(select({"ema": {"module": state(1)}, "model": state(2)}, "ema").tensors, 1)


def test_a_part_of_a_model_that_is_called_like_an_entry():
    """Catches a prefix that is removed although not all names have it."""
    names = ["model.backbone.weight", "class_head.weight"]
    assert list(select(dict.fromkeys(names, np.ones(1))).tensors) == names
    # A few tensors beside a state dict are not taken for one.
    found = select({**state(), "ema": {"decay": np.ones(1)}})
    assert_state(found.tensors)


def test_wrappers_of_parts_of_a_model():
    tensors, stripped = unwrapped({"backbone._orig_mod.0.module.weight": 1, "module.head.bias": 2})
    assert tensors == {"backbone.0.weight": 1, "head.bias": 2}
    assert stripped == ("_orig_mod", "module")
    assert unwrapped({"submodule.weight": 1, "my_orig_mod.module_list.0": 2})[1] == ()
    with pytest.raises(WeightsError, match=r"a.weight and module.a.weight are two tensors"):
        unwrapped({"a.weight": 1, "module.a.weight": 2})


def test_state_dicts_that_are_not_there():
    with pytest.raises(WeightsError, match=r"under 'ema.model'; there are \['ema.module'\]"):
        select({"ema": {"module": state()}}, "ema.model")
    with pytest.raises(WeightsError, match=r"there are tensors under \['weights'\], which --entry"):
        select({"weights": state(), "epoch": 3})
    assert_state(select({"weights": state(), "epoch": 3}, "weights").tensors)
    with pytest.raises(WeightsError, match=r"no tensors; .*the file has: epoch"):
        select({"epoch": 3})


def test_mappings_without_end():
    """Catches endless search: a mapping may contain itself, or many nested ones."""
    content = {"model": state()}
    content["ema"] = content
    with pytest.raises(WeightsError, match="without end"):
        select(content)
    inner = {}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    with pytest.raises(WeightsError, match="without end"):
        select(inner)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt", ".PTH", ".ckpt"])
def test_files_of_wrapped_models(tmp_path, suffix):
    content = {
        "ema": {"module": {"module._orig_mod.a.b": FakeTensor([2.0])}},
        "args": {"nheads": 8},
    }
    file = torch_files.read(save_pth(tmp_path / f"best{suffix}", content))
    assert file.state == {"a.b": 2.0}
    assert (file.entry, file.stripped) == ("ema.module", ("module._orig_mod",))
    assert file.args == {"nheads": 8}
    assert file.description() == f"{tmp_path}/best{suffix} [ema.module]"


def test_flat_files_of_several_state_dicts(tmp_path):
    """Covers `.safetensors` and `.npz`, which have no keys, only names."""
    arrays = {
        f"{part}.module.{name}": np.full(2, i, np.float32)
        for (i, part), name in itertools.product(enumerate(("ema", "model")), NAMES)
    }
    for suffix in (".npz", ".safetensors"):
        torch_files.write(tmp_path / f"x{suffix}", arrays)
        file = torch_files.read(tmp_path / f"x{suffix}")
        assert (file.entry, file.others, set(file.state)) == ("model", ("ema",), set(NAMES))
        assert file.state["fc.weight"][0] == 1
        assert torch_files.read(tmp_path / f"x{suffix}", "ema").state["fc.weight"][0] == 0
