"""Files of PyTorch tensors: `.pth`, `.safetensors` and `.npz`, read and written without PyTorch.

`.pth` files are read by `torch_pickle`, which runs nothing of what they hold. `.safetensors` is a
JSON header and raw numbers; the lines here read it into NumPy with bfloat16, which the library's
NumPy interface does not have in all versions. `.npz` is NumPy's own format.
"""

import dataclasses
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dn_detr_jax.errors import WeightsError, short_reason
from dn_detr_jax.interop import torch_pickle, transformers_config
from dn_detr_jax.interop.state_dicts import select

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
_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # "best.pth.tar" is no tar archive


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a file holds.

    Attributes:
      path: of the file.
      state: tensors by name, without the names of wrapping modules.
      args: the command line with which an official checkpoint was trained, or what transformers
        stores in its place beside the file; empty if there is neither.
      entry: dotted path in the file whose state dict this is; "" for a bare state dict.
      stripped: names of wrapping modules that were removed from the tensors' names.
      others: dotted paths of the other state dicts in the file.
      classes: the name of every label, "" for an unused one; empty if they are not known.
    """

    path: str
    state: dict[str, np.ndarray]
    args: dict[str, Any]
    entry: str = ""
    stripped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def description(self) -> str:
        """Returns the path, the entry, and the entries that were not taken."""
        text = f"{self.path} [{self.entry}]" if self.entry else self.path
        if self.others:
            text += f" (also in the file: {', '.join(self.others)})"
        return text


def read(path: str | Path, entry: str | None = None) -> TorchFile:
    """Reads the state dict of a `.pth`, `.pt`, `.bin`, `.ckpt`, `.safetensors` or `.npz` file.

    Args:
      path: file; its suffix decides the format. `.pth.tar` is read as `.pth`.
      entry: dotted path of the state dict in the file, such as "ema.module"; None: the preferred
        one, see `state_dicts.select`.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: another format, a damaged file, one that asks to run code, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys(_PICKLED, torch_pickle.read)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise WeightsError(f"{path}: the suffix must be one of {', '.join(readers)}")
    try:
        return _torch_file(path, readers[suffix](path), entry)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can raise anything in its reader
        if isinstance(error, OSError) and error.filename is not None:  # it can't be opened
            raise
        raise WeightsError(
            f"{path}: damaged, or in another format than its suffix: {short_reason(error)}"
        ) from error


def _torch_file(path: Path, content: Any, entry: str | None) -> TorchFile:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    try:
        found = select(content, entry)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    state = {
        name: value.read() if isinstance(value, torch_pickle.TensorView) else value
        for name, value in found.tensors.items()
    }
    for name, value in state.items():
        if value.dtype.kind not in "biuf" and value.dtype != jnp.bfloat16:
            raise WeightsError(f"{path}: {name} holds {value.dtype}, expected numbers")
    args = content.get("args") if found.entry else None
    args = vars(args) if isinstance(args, torch_pickle.Attributes) else args
    args = dict(args) if isinstance(args, Mapping) else {}
    hub = path.suffix.lower() in (".safetensors", ".bin")
    beside, classes = transformers_config.read_beside(path) if hub else ({}, ())
    rest = found.entry, found.stripped, found.others, classes
    return TorchFile(str(path), state, beside | args, *rest)


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


def write(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict of float32 arrays, and int64 ones.

    Args:
      path: its suffix decides: `.pth` (as `torch.save({"model": state})`), `.safetensors`, `.npz`.
      state: tensors by name; names of one and the same array are tied in a `.pth`.

    Raises:
      WeightsError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".npz":
        np.savez(path, **dict(state))  # type: ignore[arg-type] # names are no options
    elif path.suffix == ".safetensors":
        path.write_bytes(b"".join(_safetensors_bytes(state)))
    elif path.suffix == ".pth":
        torch_pickle.write(path, state)
    else:
        raise WeightsError(f"{path}: the suffix must be .pth, .safetensors or .npz")


def _safetensors_bytes(state: Mapping[str, np.ndarray]) -> Iterable[bytes]:
    header, end = {}, 0
    for name, value in state.items():
        start, end = end, end + value.nbytes
        kind = "I64" if value.dtype == np.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for value in state.values():
        yield np.ascontiguousarray(value, "<i8" if value.dtype == np.int64 else "<f4").tobytes()
