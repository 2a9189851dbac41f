"""Files of PyTorch tensors, read and written without PyTorch and without running what they hold.

A `.pth` file is a pickle, and a pickle is a program: loading one naively runs whatever its author
put in. Here the program may only name what a state dict needs (`_PERMITTED`); anything else ends
the reading with an error that says what the file asked for. What it may name are functions of this
module which describe tensors; the numbers are read afterwards, for the wanted tensors alone, so
that an optimizer's state in the file costs nothing. Both formats of `torch.save` are read: the zip
archive of PyTorch 1.6 and later, and the stream of pickles before.

`.safetensors` is a JSON header and raw numbers; the 20 lines here read it into NumPy with bfloat16,
which the library's NumPy interface does not have in all versions. `.npz` is NumPy's own.
"""

import collections
import dataclasses
import functools
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from dn_detr_jax.errors import WeightsError, short_reason

# Keys under which training checkpoints keep a state dict, the preferred one first.
STATE_KEYS = ("model", "ema_model", "state_dict", "model_ema", "model_state_dict")

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file before PyTorch 1.6
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a file holds.

    Attributes:
      path: of the file.
      state: tensors by name.
      args: the command line with which an official checkpoint was trained; empty if not stored.
      entry: key in the file whose state dict this is; "" for a bare state dict.
    """

    path: str
    state: dict[str, np.ndarray]
    args: dict[str, Any]
    entry: str = ""


def read(path: str | Path, entry: str | None = None) -> TorchFile:
    """Reads the state dict of a `.pth`, `.pt`, `.bin`, `.safetensors` or `.npz` file.

    Args:
      path: file; its suffix decides the format.
      entry: key of the state dict in the file; None: the first of `STATE_KEYS`, or the file itself.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: another format, a damaged file, one that asks to run code, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), _read_pickled)
    if path.suffix not in readers:
        raise WeightsError(f"{path}: the suffix must be one of {', '.join(readers)}")
    try:
        return _select_state(path, readers[path.suffix](path), entry)
    except WeightsError:
        raise
    except Exception as error:  # whatever a damaged file leads its reader to
        if isinstance(error, OSError) and error.filename is not None:  # it can't be opened
            raise
        raise WeightsError(
            f"{path}: damaged, or in another format than its suffix: {short_reason(error)}"
        ) from error


def _select_state(path: Path, content: Any, entry: str | None) -> TorchFile:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if entry is None:
        entry = next((k for k in STATE_KEYS if isinstance(content.get(k), Mapping)), "")
    elif not isinstance(content.get(entry), Mapping):
        dicts = [k for k, v in content.items() if isinstance(v, Mapping)]
        raise WeightsError(f"{path}: no state dict under {entry!r}; there are {dicts or 'none'}")
    tensors = content[entry] if entry else content
    is_tensor = (_TensorView, np.ndarray)
    state = {
        name: np.asarray(value.read()) if isinstance(value, _TensorView) else value
        for name, value in tensors.items()
        if isinstance(name, str) and isinstance(value, is_tensor)
    }
    for name, value in state.items():
        if value.dtype.kind not in "biuf" and value.dtype != jnp.bfloat16:
            raise WeightsError(f"{path}: {name} holds {value.dtype}, expected numbers")
    if not state:
        keys = ", ".join(map(str, list(content)[:8]))
        raise WeightsError(
            f"{path}: no tensors; a state dict is expected under one of {STATE_KEYS} or "
            f"at the top, the file has: {keys or 'nothing'}"
        )
    args = content.get("args") if entry else None
    args = vars(args) if isinstance(args, _Attributes) else args
    return TorchFile(str(path), state, dict(args) if isinstance(args, Mapping) else {}, entry)


# --- .pth -----------------------------------------------------------------------------------------


class _Sealed:
    """What a pickle may hold and, since it says no to BUILD, not change."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError(f"the file tries to change a {type(self).__name__}")


class _StorageType(_Sealed):
    """Stands for `torch.FloatStorage` and the like.

    Not the dtype itself: BUILD would change it for the whole process, and with it how much memory
    its arrays are taken to have.
    """

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


@dataclasses.dataclass
class _Storage(_Sealed):
    """A flat array in the file; `load` reads it, once."""

    dtype: np.dtype
    size: int
    load: Callable[[], bytes] | None = None
    _values: np.ndarray | None = None

    def values(self) -> np.ndarray:
        if self._values is None:
            if self.load is None:
                raise ValueError("a tensor's storage is missing")
            data = self.load()
            if len(data) < self.size * self.dtype.itemsize:
                raise ValueError(f"a storage of {self.size} {self.dtype} has {len(data)} bytes")
            self._values = np.frombuffer(data, self.dtype, self.size)
        return self._values


@dataclasses.dataclass(frozen=True)
class _TensorView(_Sealed):
    """A tensor as PyTorch stores it: a strided window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """A contiguous copy, of any storage that the window really fits into."""
        if (
            len(self.shape) != len(self.strides)
            or min((self.offset, *self.shape, *self.strides)) < 0
        ):
            raise ValueError(f"a tensor of shape {self.shape} with strides {self.strides}")
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        if last >= self.storage.size or np.prod(self.shape, dtype=object) > self.storage.size:
            raise ValueError(f"a tensor of shape {self.shape} is larger than its storage")
        values = self.storage.values()[self.offset :]
        strides = tuple(stride * values.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides).copy()


class _Attributes:
    """Stands for an object of which only the attributes matter, as `argparse.Namespace`."""


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _TensorView:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor made of a {type(storage).__name__}")
    return _TensorView(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _Function(_Sealed):
    """A function that a pickle may call."""

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)


class _ScalarType(_Sealed):
    """Stands for `numpy.dtype`, of numbers and texts alone; BUILD may say its byte order."""

    def __init__(self, name, *_unused):
        if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?[biufcSU]\d{1,4}", name):
            raise pickle.UnpicklingError("a NumPy type that is neither number nor text")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(scalar_type, data) -> Any:
    if not isinstance(scalar_type, _ScalarType):
        raise pickle.UnpicklingError("a NumPy scalar of unknown type")
    return np.frombuffer(data, scalar_type.dtype, 1)[0]


def _words(parts: tuple) -> list[str]:
    """As texts. That of a tuple may be without end: of tuples of the same tuples, and so on."""
    if not all(isinstance(part, str | int) for part in parts):
        raise pickle.UnpicklingError("a path or a device that is neither text nor number")
    return [str(part) for part in parts]


# What a pickle may name: nothing that it could change, and nothing but makers of inert data.
_PERMITTED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda tensor, *_unused: tensor),
    ("torch", "Size"): _Function(tuple),
    ("torch", "device"): _Function(lambda *parts: ":".join(_words(parts))),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): _Function(dict),
    ("_codecs", "encode"): _Function(lambda text, *_: text.encode("latin1")),
    **{
        (module, f"{kind}Path"): _Function(lambda *parts, pure=pure: str(pure(*_words(parts))))
        for module in ("pathlib", "pathlib._local")  # before and since Python 3.13
        for kind, pure in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
    },
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{
        (module, "scalar"): _Function(_numpy_scalar)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    ("numpy", "dtype"): _Function(_ScalarType),
}
# The names of Python 2's pickles.
_PERMITTED |= {("__builtin__", "set"): _Function(set), ("builtins", "set"): _Function(set)}


def _next_pickle(file: BinaryIO) -> BinaryIO:
    """The pickle that begins here; leaves the file at its end.

    The unpickler in C keeps what it remembers in an array, for which one wrong byte can ask for all
    the memory of the machine. `pickletools.optimize` numbers those places anew, from 0, and reads
    every length against the bytes that are there.
    """
    start = file.tell()
    for _ in pickletools.genops(file):
        pass
    length = file.tell() - start
    file.seek(start)
    return io.BytesIO(pickletools.optimize(file.read(length)))


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_PERMITTED` only; tensors become `_TensorView`s."""

    def __init__(self, file: BinaryIO, path: Path, storages: dict[str, _Storage]):
        super().__init__(_next_pickle(file), encoding="latin1")
        self._path, self._storages = path, storages
        # A class of this file's own, which a hostile pickle may change as it likes.
        self._namespace = type("Namespace", (_Attributes,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return self._namespace
        if (module, name) not in _PERMITTED:
            raise WeightsError(
                f"{self._path}: asks for {module}.{name}, which no state dict needs; nothing was "
                "run. Save the state dict alone (torch.save(model.state_dict(), path)) if you "
                "trust the file"
            )
        return _PERMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise WeightsError(f"{self._path}: holds a module, not a state dict")
        _, dtype, key, _, size = pid[:5]
        if len(pid) > 5 and pid[5] is not None:
            raise WeightsError(f"{self._path}: storages that are views of others are not supported")
        if not isinstance(dtype, _StorageType) or not isinstance(key, str | int):
            raise WeightsError(f"{self._path}: a storage of unknown type")
        return self._storages.setdefault(str(key), _Storage(dtype.dtype, int(size)))


def _read_pickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    return _read_legacy(path)


def _read_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)  # stays open as long as a storage may be read from it
    names = archive.namelist()
    pickles = [name for name in names if name.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1 or any("/code/" in name for name in names):
        raise WeightsError(
            f"{path}: a TorchScript archive or no torch.save file: save the state dict instead"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise WeightsError(f"{path}: compressed, which no file of torch.save is")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
        raise WeightsError(f"{path}: written on a big-endian machine")
    storages: dict[str, _Storage] = {}
    content = _Unpickler(io.BytesIO(archive.read(pickles[0])), path, storages).load()
    for key, storage in storages.items():
        storage.load = functools.partial(archive.read, f"{root}data/{key}")
    return content


def _read_legacy(path: Path) -> Any:
    storages: dict[str, _Storage] = {}
    with open(path, "rb") as file:

        def load():
            return _Unpickler(file, path, storages).load()

        if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
            raise WeightsError(f"{path}: not written by torch.save")
        system = load()
        if not system.get("little_endian", True):
            raise WeightsError(f"{path}: written on a big-endian machine")
        content = load()
        for key in load():
            storage = storages[str(key)]
            (size,) = struct.unpack("<q", file.read(8))
            if not 0 <= size <= path.stat().st_size:
                raise ValueError(f"a storage of {size} numbers")
            data = file.read(size * storage.dtype.itemsize)
            storage.load = functools.partial(bytes, data)
    return content


# --- .safetensors and .npz ------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} has the unknown type {entry['dtype']!r}")
        (start, end), shape = entry["data_offsets"], entry["shape"]
        if min((start, end - start, *shape)) < 0 or 8 + length + end > len(data):
            raise ValueError(f"{name} of shape {shape} lies from byte {start} to {end}")
        raw = data[8 + length + start : 8 + length + end]
        values = np.frombuffer(raw, _SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(shape).copy()
    return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


# --- writing --------------------------------------------------------------------------------------


def write(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict of float32 arrays.

    Args:
      path: its suffix decides: `.pth` (as `torch.save({"model": state})`), `.safetensors`, `.npz`.
      state: tensors by name; names of one and the same array are tied in a `.pth`.

    Raises:
      WeightsError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        path.write_bytes(b"".join(_safetensors_bytes(state)))
    elif path.suffix == ".pth":
        _write_zip(path, state)
    else:
        raise WeightsError(f"{path}: the suffix must be .pth, .safetensors or .npz")


def _safetensors_bytes(state: Mapping[str, np.ndarray]) -> Iterable[bytes]:
    header, end = {}, 0
    for name, value in state.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for value in state.values():
        yield np.ascontiguousarray(value, "<f4").tobytes()


def _write_zip(path: Path, state: Mapping[str, np.ndarray]) -> None:
    keys = {
        id(value): str(i) for i, value in enumerate({id(v): v for v in state.values()}.values())
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle_state(state, keys))
        archive.writestr("archive/byteorder", "little")
        written = set()
        for value in state.values():
            if keys[id(value)] not in written:
                written.add(keys[id(value)])
                data = np.ascontiguousarray(value, "<f4").tobytes()
                archive.writestr(f"archive/data/{keys[id(value)]}", data)
        archive.writestr("archive/version", "3\n")


def _pickle_state(state: Mapping[str, np.ndarray], keys: Mapping[int, str]) -> bytes:
    """The program that `torch.load` runs: {"model": OrderedDict of tensors}.

    Written by hand because `pickle` would need PyTorch to name its functions.
    """
    op = pickle

    def named(module, name):
        return op.GLOBAL + f"{module}\n{name}\n".encode()

    def text(value):
        data = value.encode()
        return op.BINUNICODE + struct.pack("<I", len(data)) + data

    def integer(value):
        return op.LONG1 + bytes([8]) + struct.pack("<q", value)

    def integers(values):
        return op.MARK + b"".join(map(integer, values)) + op.TUPLE

    ordered_dict = named("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE

    def tensor(value):
        storage = op.MARK + text("storage") + named("torch", "FloatStorage")
        storage += text(keys[id(value)]) + text("cpu") + integer(value.size) + op.TUPLE
        strides = [int(np.prod(value.shape[i + 1 :], dtype=int)) for i in range(value.ndim)]
        args = storage + op.BINPERSID + integer(0) + integers(value.shape) + integers(strides)
        args += op.NEWFALSE + ordered_dict
        rebuild = named("torch._utils", "_rebuild_tensor_v2")
        return rebuild + op.MARK + args + op.TUPLE + op.REDUCE

    items = b"".join(text(name) + tensor(value) for name, value in state.items())
    model = ordered_dict + op.MARK + items + op.SETITEMS
    return op.PROTO + b"\x02" + op.EMPTY_DICT + text("model") + model + op.SETITEM + op.STOP
