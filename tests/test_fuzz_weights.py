"""Damaged or hostile files of weights give the right numbers or a named error, and run no code."""

import argparse
import io
import json
import os
import pickle
import resource
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from damage import damaged, examples, one_line, within
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_interop import DATA, FakeTensor, Hostile, save_pth

from dn_detr_jax.errors import WeightsError
from dn_detr_jax.interop import torch_files, torch_pickle

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.full(3, -1, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def files(folder):
    """Returns the content of a good file of each kind."""
    contents = {}
    for suffix in (".pth", ".safetensors", ".npz"):
        torch_files.write(folder / f"good{suffix}", ARRAYS)
        contents[suffix] = (folder / f"good{suffix}").read_bytes()
    np.savez_compressed(folder / "compressed.npz", **ARRAYS)
    contents["compressed.npz"] = (folder / "compressed.npz").read_bytes()
    for name in ("zip.pth", "legacy.pth"):
        contents[name] = (DATA / "pth_files" / name).read_bytes()
    return contents


def read_damaged(path, content):
    """Returns what is read from a file, or None after an error that names the file."""
    path.write_bytes(content)
    try:
        with within(10):
            return torch_files.read(path).state
    except WeightsError as error:
        one_line(error, str(path))
        return None


KINDS = (".pth", ".safetensors", ".npz", "compressed.npz", "zip.pth", "legacy.pth")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(60))
@given(data=st.data())
def test_a_damaged_file_is_read_as_it_was_or_named(files, folder, kind, data):
    """Catches crashes, and other numbers if the format has checksums."""
    good = files[kind]
    path = folder / ("damaged" + kind[kind.rindex(".") :])
    state = read_damaged(path, data.draw(damaged(good)))
    if state is None or kind in (".safetensors", "legacy.pth"):  # which have no checksums
        return
    path.write_bytes(good)
    whole = torch_files.read(path).state
    for name in state.keys() & whole.keys():
        np.testing.assert_array_equal(state[name], whole[name], strict=True)


def npz_claiming(shape):
    """Writes an `.npz` of an array of some shape, without its numbers."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header
        archive.writestr("a.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(10**13,), (10**30,), (-1,), (2**62, 2**62), "x", (True,)])
def test_an_array_that_claims_to_be_huge_is_refused(folder, shape):
    assert read_damaged(folder / "huge.npz", npz_claiming(shape)) is None


@pytest.mark.parametrize("offset", [10, 12, 14, 16, 18, 22])
@pytest.mark.parametrize("kind", [".npz", ".pth"])
@settings(max_examples=examples(4))
@given(value=st.binary(min_size=2, max_size=4))
def test_any_field_of_the_directory_of_a_zip_may_be_wrong(files, folder, kind, offset, value):
    """Catches errors of zipfile for encryption, unknown compression and offsets beyond the end."""
    content = bytearray(files[kind])
    entry = content.index(b"PK\x01\x02")
    content[entry + offset : entry + offset + len(value)] = value
    read_damaged(folder / f"directory{kind}", bytes(content))


def safetensors(header, payload=bytes(64)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


NUMBERS = st.one_of(
    st.integers(-9, 70),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**30), 1.5, True, None, "1", [], {}]),
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F64", "BOOL", "F8_E4M3", 3, None, [], {}]),
        "shape": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
        "data_offsets": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
    },
)


@settings(max_examples=examples(200))
@given(
    header=st.one_of(
        st.dictionaries(st.text(max_size=3), st.one_of(ENTRY, NUMBERS), max_size=2),
        st.just(b"[" * 100_000),
        st.just(b'{"a": ' + b"1" * 5000 + b"}"),
        st.binary(max_size=9),
        NUMBERS,
    )
)
@example({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}})
@example({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}})
@example({"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]}})
def test_any_header_of_safetensors(folder, header):
    """Catches numbers from outside of the file's data, and errors of NumPy."""
    state = read_damaged(folder / "x.safetensors", safetensors(header))
    for name, value in (state or {}).items():
        start, end = header[name]["data_offsets"]
        assert 0 <= start <= end <= 64 and value.nbytes == end - start
        assert list(value.shape) == header[name]["shape"] and not value.astype(bool).any()


@pytest.mark.parametrize(
    "values",
    [np.array(["1"]), np.array([1j]), np.zeros(2, [("x", "f4")]), np.array([b"1"])],
)
def test_arrays_of_something_else_than_numbers_are_named(folder, values):
    np.savez(folder / "text.npz", weights=values)
    with pytest.raises(WeightsError, match=r"text\.npz: weights holds .*expected numbers"):
        torch_files.read(folder / "text.npz")


# Pickles


def pickled(program: bytes) -> bytes:
    """Returns a `.pth` with a given pickle program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("f/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("f/data/0", bytes(16))
    return buffer.getvalue()


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STATE = (
    b"(K\x03" + text("<") + b"NNNJ" + struct.pack("<i", 10**6) + b"K\x01K\x00t"
)  # of a dtype: (3, "<", None, None, None, itemsize, alignment, flags)
NUMPY_DTYPE = named("numpy", "dtype")


@pytest.mark.parametrize("name", ["BFloat16Storage", "FloatStorage", "BoolStorage"])
def test_a_pickle_can_not_change_the_types_of_the_process(folder, name):
    """Catches BUILD on bfloat16's dtype, which would change its size in the whole process."""
    before = [(d.itemsize, d.str) for d in torch_pickle._STORAGE_DTYPES.values()]
    assert read_damaged(folder / "f.pth", pickled(named("torch", name) + STATE + b"b")) is None
    assert before == [(d.itemsize, d.str) for d in torch_pickle._STORAGE_DTYPES.values()]
    assert jnp.dtype(jnp.bfloat16).itemsize == 2


@pytest.mark.parametrize("name", ["(4,)f4", "V8", "O", "f4,f4", "M8[s]", "S99999", "object"])
def test_scalars_are_numbers_or_short_texts(folder, name):
    """Catches an array in place of a scalar, which could be read beyond its end."""
    scalar = named("numpy.core.multiarray", "scalar")
    scalar += b"(" + NUMPY_DTYPE + b"(" + text(name) + b"tR" + text("0" * 64) + b"tR"
    path = folder / "f.pth"
    path.write_bytes(pickled(b"}" + text("a") + scalar + b"s"))
    with pytest.raises(WeightsError, match=r"damaged.*neither number nor text"):
        torch_files.read(path)


def test_the_size_of_a_scalar_is_that_of_its_name(folder):
    """Catches BUILD on a scalar type that sets more than the byte order."""
    value = torch_pickle._ScalarType("f8")
    value.__setstate__((3, ">", None, None, None, 10**6, 1, 0))
    assert (value.dtype.itemsize, value.dtype.str) == (8, ">f8")
    args = argparse.Namespace(lr=np.float64(0.5), layers=np.int64(6), name=np.str_("x"))
    path = save_pth(folder / "scalars.pth", {"model": {"a": FakeTensor([1.0])}, "args": args})
    assert torch_files.read(path).args == {"lr": 0.5, "layers": 6, "name": "x"}


def test_storages_and_tensors_can_not_be_changed(folder):
    """Catches a changed size of a storage, which would expose the memory behind it."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    storage += b"K\x04tQ"
    change = b"}" + text("size") + b"J" + struct.pack("<i", 10**9) + b"sb"
    tensor = named("torch._utils", "_rebuild_tensor_v2")
    tensor += b"(" + storage + b"K\x00(K\x04t(K\x01ttR"
    assert read_damaged(folder / "f.pth", pickled(b"}" + text("a") + tensor + b"s"))["a"].size == 4
    for program in (storage + change, tensor + change):
        assert read_damaged(folder / "f.pth", pickled(b"}" + text("a") + program + b"s")) is None


def test_a_path_of_tuples_without_end_is_refused(folder):
    """Catches an error text that doubles with each of 60 tuples."""
    program = named("torch", "device") + b"("
    program += b"K\x00" + b"2\x86" * 60  # DUP, TUPLE2
    path = folder / "f.pth"
    with within(5):
        assert read_damaged(path, pickled(b"}" + text("a") + program + b"tRs")) is None


@pytest.mark.parametrize("used", [b"", pickle.LONG_BINGET + struct.pack("<I", 2**31)])
@pytest.mark.parametrize("frame", [b"", pickle.FRAME + struct.pack("<Q", 10)])
def test_a_memo_of_two_billion_entries_takes_no_memory(folder, used, frame):
    """Catches the unpickler in C by itself, which takes 34 GB for these 9 bytes, and a check that
    a frame which ends within an operation misleads."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = frame + pickle.EMPTY_DICT + pickle.LONG_BINPUT + struct.pack("<I", 2**31) + used
    program = pickle.PROTO + b"\x04" + program + pickle.STOP
    assert read_damaged(folder / "memo.pth", program) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_compressed_archives_are_refused(folder):
    """Catches compressed members, a thousandth of their size; PyTorch writes none."""
    path = folder / "f.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/data.pkl", bytes(10**7))
    assert path.stat().st_size < 20_000
    with pytest.raises(WeightsError, match="compressed"):
        torch_files.read(path)


@settings(max_examples=examples(150))
@given(
    program=st.lists(
        st.one_of(
            st.sampled_from([bytes([code]) for code in range(256)]),
            st.sampled_from([named(*name) for name in torch_pickle._PERMITTED]),
            st.sampled_from([text("storage"), text("model"), b"K\x01", b"(", b"t", b"R", b"b"]),
            st.just(named("os", "system") + text("true") + b"\x85R"),
        ),
        max_size=24,
    )
)
def test_any_program_ends_and_names_the_file(folder, program):
    read_damaged(folder / "f.pth", pickled(b"".join(program)))


# Code


@pytest.mark.parametrize("kind", ["npz", "npy in npz", "pickle as npz", "legacy", "zip"])
def test_no_file_of_weights_runs_what_is_in_it(folder, kind):
    """Catches code that runs on reading; the same program does make the marker when it is run."""
    marker = folder / f"marker of {kind}"
    hostile = Hostile(os.system, f"touch '{marker}'")
    path = folder / ("f.npz" if "npz" in kind else "f.pth")
    if kind == "npz":
        np.savez(path, a=np.array([hostile, 1], object))
    elif kind == "npy in npz":
        np.save(folder / "f.npy", np.array([hostile], object), allow_pickle=True)
        path.write_bytes((folder / "f.npy").read_bytes())
    elif kind == "zip":
        save_pth(path, {"model": {"a": FakeTensor([1.0])}, "x": hostile})
    else:
        path.write_bytes(pickle.dumps(hostile, 4))
    with pytest.raises(WeightsError):
        torch_files.read(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists()
