"""The `.pth` files of PyTorch, read and written without PyTorch and without running their content.

A `.pth` file is a pickle, and a pickle is a program: a naive loader runs any code in it. Here
the program may only name what a state dict needs (`_PERMITTED`). Any other name ends the reading
with an error that has that name. The permitted names are functions of this module that describe
tensors. The numbers are read later, and only those of the wanted tensors, so an optimizer's state
in the file costs nothing. Both formats of `torch.save` are read: the zip archive of PyTorch 1.6 and
later, and the stream of pickles before.
"""

import collections
import dataclasses
import functools
import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from dn_detr_jax.errors import WeightsError

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file before PyTorch 1.6
_LEGACY_PROTOCOL = 1001


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
class TensorView(_Sealed):
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


class Attributes:
    """Stands for an object such as `argparse.Namespace`; only its attributes are read."""


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any
) -> TensorView:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor made of a {type(storage).__name__}")
    return TensorView(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


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


def _numpy_scalar(scalar_type: Any, data: Any) -> Any:
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
    """Returns the pickle that begins here and leaves the file at its end.

    The unpickler in C keeps what it remembers in an array, for which one wrong byte can ask for all
    the memory of the machine. `pickletools.optimize` renumbers those places from 0, and reads
    every length against the bytes that are there.
    """
    start = file.tell()
    for _ in pickletools.genops(file):
        pass
    length = file.tell() - start
    file.seek(start)
    return io.BytesIO(pickletools.optimize(file.read(length)))


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_PERMITTED` only; tensors become `TensorView`s."""

    def __init__(self, file: BinaryIO, path: Path, storages: dict[str, _Storage]):
        super().__init__(_next_pickle(file), encoding="latin1")
        self._path, self._storages = path, storages
        # A class of this file's own, which a hostile pickle may change as it likes.
        self._namespace = type("Namespace", (Attributes,), {})

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


def read(path: Path) -> Any:
    """What a `.pth` file holds: nested mappings with a `TensorView` for each tensor.

    Raises:
      WeightsError: a file that asks to run code, or another kind of file.
      Exception: of any type, from a damaged file.
    """
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


# --- writing --------------------------------------------------------------------------------------


def write(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes float32 and int64 arrays as `torch.save({"model": state}, path)` does."""
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
                layout = "<i8" if value.dtype == np.int64 else "<f4"
                data = np.ascontiguousarray(value, layout).tobytes()
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
        kind = "LongStorage" if value.dtype == np.int64 else "FloatStorage"
        storage = op.MARK + text("storage") + named("torch", kind)
        storage += text(keys[id(value)]) + text("cpu") + integer(value.size) + op.TUPLE
        strides = [int(np.prod(value.shape[i + 1 :], dtype=int)) for i in range(value.ndim)]
        args = storage + op.BINPERSID + integer(0) + integers(value.shape) + integers(strides)
        args += op.NEWFALSE + ordered_dict
        rebuild = named("torch._utils", "_rebuild_tensor_v2")
        return rebuild + op.MARK + args + op.TUPLE + op.REDUCE

    items = b"".join(text(name) + tensor(value) for name, value in state.items())
    model = ordered_dict + op.MARK + items + op.SETITEMS
    return op.PROTO + b"\x02" + op.EMPTY_DICT + text("model") + model + op.SETITEM + op.STOP
