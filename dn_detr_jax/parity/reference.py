"""Reference cases: stored inputs and outputs of the official PyTorch DN-DETR, and their weights.

A case is an `.npz` of arrays with a `.json` manifest beside it. It holds no weights: they follow
from the seed by `weight`, in the official names and shapes, so that filling a model with them runs
the importer. The recipe has to be followed to the bit; it makes activations of order 1, spread
boxes, and logits with a deviation near 1.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dn_detr_jax.denoising import Noise
from dn_detr_jax.errors import UnsupportedCase, one_line

# Arrays that no result is compared with: inputs, the noise of float32, and row numbers.
_NO_OUTPUT = re.compile(
    r"""
    in\..* | f64\..* | train\.(sample_idx|md_batch_idx|md_known_indice)
    | dn\.(label_enc|refpoint|tgt_weight) | dn\..*\.known_indice
    | dn\..*\.(labels|boxes|noise|out)_\w+ | gse\.pos | invsig\.x
    | focal\.(logits|onehot|num_boxes) | box\.b[12] | pe\.mask | mask\.in | post\.sizes
    | msda\.(shapes|value|loc|weights|cotangent) | matcher\.(logits|boxes|target_\w+)
    """,
    re.VERBOSE,
)


class Case:
    """A case: arrays by name and the manifest that describes them.

    Attributes:
      name: of the case.
      manifest: what describes it.
    """

    def __init__(self, path: str | Path):
        """Reads `path` (.npz) and the manifest of the same name with `.json`.

        Raises:
          FileNotFoundError: one of the two is missing.
          UnsupportedCase: one of them is malformed.
        """
        path = Path(path)
        manifest = path.with_suffix(".json")
        for file in (path, manifest):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: there is no such file")
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays: dict[str, np.ndarray] = dict(arrays)
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UnsupportedCase(f"{path}: no reference case: {one_line(error)}") from error
        require(str(path), self.manifest, "case", "arrays")
        self.name: str = str(self.manifest["case"])
        if not isinstance(self.manifest["arrays"], dict):
            raise UnsupportedCase(f"{manifest}: 'arrays' must map names to descriptions")

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole array `name`; UnsupportedCase if it is missing or stored in part."""
        require(self.name, self._arrays, name)
        if self.step(name):
            raise UnsupportedCase(f"{self.name}: {name} is stored in part, but needed whole")
        return self._arrays[name]

    def whole(self, name: str) -> np.ndarray | None:
        """The array `name`, None if it is missing or stored in part."""
        return None if name not in self or self.step(name) else self._arrays[name]

    def completed(self, name: str, missing: int = -1) -> np.ndarray | None:
        """The full array `name` of integers, `missing` where it is not stored; None without it."""
        if name not in self:
            return None
        full = np.full(self.full_shape(name), missing, np.int32)
        self.part(name, full)[...] = self.stored(name)
        return full

    def __contains__(self, name: str) -> bool:
        """Whether the case has the array `name`."""
        return name in self._arrays

    def names(self) -> list[str]:
        """Names of the arrays in the file."""
        return list(self._arrays)

    def outputs(self) -> list[str]:
        """Names of the arrays, listed or stored, that results are compared with."""
        names = dict.fromkeys([*self.manifest["arrays"], *self._arrays])
        return [
            name
            for name in names
            if not _NO_OUTPUT.fullmatch(name) and (name not in self or self._arrays[name].size)
        ]

    def has_outputs(self, *prefixes: str) -> bool:
        """Whether the file has an output whose name starts with one of `prefixes`."""
        return any(name in self and name.startswith(prefixes) for name in self.outputs())

    def setting(self, key: str) -> Any:
        """The manifest's entry `key`, or UnsupportedCase."""
        require(self.name, self.manifest, key)
        return self.manifest[key]

    def stored(self, name: str) -> np.ndarray:
        """The array `name` as it is stored, which may be a strided part of the full one."""
        require(self.name, self._arrays, name)
        return self._arrays[name]

    def by_name(self, name: str, keys: Iterable[str], row: int | None = None) -> dict[str, Any]:
        """The rows or numbers of an array that has one for each key, those that are stored.

        Args:
          name: of the array.
          keys: of the full array, in its order.
          row: of the full array's first axis, which the keys belong to; None: they belong to the
            first axis itself.
        """
        values, keys = self.stored(name), list(keys)
        steps = self.step(name) or (1,) * values.ndim
        if row is not None:
            if row % steps[0]:
                return {}
            values, steps = values[row // steps[0]], steps[1:]
        kept = keys[:: steps[0]]
        if len(kept) != len(values):
            raise UnsupportedCase(f"{self.name}: {name} has {len(values)} rows, not {len(kept)}")
        return dict(zip(kept, values, strict=True))

    def step(self, name: str) -> tuple[int, ...] | None:
        """The steps with which the array `name` is stored, None if it is stored whole."""
        step = self.manifest["arrays"].get(name, {}).get("step")
        if not step:
            return None
        if len(step) != self.stored(name).ndim or not all(type(s) is int and s > 0 for s in step):
            raise UnsupportedCase(
                f"{self.name}: {name} has the step {step}, expected one positive integer for each "
                f"of its {self.stored(name).ndim} dimensions"
            )
        return tuple(step) if max(step) > 1 else None

    def full_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the array `name` before the strided part was taken."""
        shape = self.stored(name).shape
        if not (step := self.step(name)):
            return shape
        full = self.manifest["arrays"][name].get("full_shape")
        if full is None or shape != tuple(-(-n // s) for n, s in zip(full, step, strict=True)):
            raise UnsupportedCase(
                f"{self.name}: {name} has shape {list(shape)} and the step {list(step)}, which do "
                f"not fit the full_shape {full}"
            )
        return tuple(full)

    def part(self, name: str, full: np.ndarray) -> np.ndarray:
        """The part of a full array that is stored under `name`; further axes lead."""
        step = self.step(name)
        index: tuple[Any, ...] = (..., *(slice(None, None, s) for s in step or ()))
        return full[index]

    def float32_noise(self, name: str) -> float | None:
        """Largest difference between a float32 and a float64 run of the PyTorch code, if known."""
        return self.manifest.get("float32_noise", {}).get("values", {}).get(name) or None


def require(where: str, mapping: Any, *keys: str) -> None:
    """Raises UnsupportedCase if `mapping` is none or lacks keys."""
    if not isinstance(mapping, Mapping):
        raise UnsupportedCase(f"{where}: expected a JSON object, not {type(mapping).__name__}")
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise UnsupportedCase(f"{where}: there is no {', '.join(missing)} in the case")


# Gains of the weight matrices, the first rule whose text is in the name wins.
_GAINS: tuple[tuple[str, float], ...] = (
    ("sampling_offsets", 0.5),
    ("ca_qcontent", 1.5),
    ("ca_kcontent", 1.5),
    ("ca_qpos", 2.5),
    ("ca_kpos", 2.5),
    ("self_attn.out", 0.5),
    ("cross_attn.out", 4.0),
    ("ca_out_v_proj", 4.0),
)
_TABLES = {
    "label_enc.weight": 1.0,
    "tgt_embed.weight": 1.0,
    "transformer.tgt_embed.weight": 1.0,
    "transformer.level_embed": 0.5,
    "transformer.patterns.weight": 0.5,
}


def canonical_name(name: str) -> str:
    """One name of a tied tensor.

    Examples:
      >>> canonical_name("transformer.decoder.bbox_embed.layers.0.bias")
      'bbox_embed.layers.0.bias'
    """
    return re.sub(r"^transformer\.decoder\.(?=(bbox|class)_embed\.)", "", name)


def weight(
    name: str, shape: tuple[int, ...], seed: int, other_name: str | None = None
) -> np.ndarray:
    """The float32 value of the official state dict's entry `name`.

    Args:
      name: official name; tied names give equal values.
      shape: official shape.
      seed: of the case.
      other_name: the name that decides the random numbers, of a case in names of other code.
    """
    name = canonical_name(name)
    seed = zlib.crc32((other_name or name).encode()) + 1_000_003 * seed
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        value = 0.1 * normal
    elif leaf == "running_var":
        value = 1.0 + 0.2 * np.tanh(normal)
    elif name == "refpoint_embed.weight":
        value = normal * np.array([1.2, 1.2, 0.5, 0.5]) + np.array([0.0, 0.0, -1.0, -1.0])
    elif name in _TABLES:
        value = _TABLES[name] * normal
    elif leaf == "relative_position_bias_table":
        value = 0.5 * normal
    elif leaf.endswith("bias"):
        value = _bias(name, normal)
    elif normal.ndim == 1:
        value = _scale(name, normal)
    else:
        value = _matrix(name, normal)
    return np.asarray(value, np.float32)


def _bias(name: str, normal: np.ndarray) -> np.ndarray:
    if name.startswith("class_embed."):
        return -3.5 + 0.3 * normal
    return (1.5 if "sampling_offsets" in name else 0.05) * normal


def _scale(name: str, normal: np.ndarray) -> np.ndarray:
    """Scales of norms, and slopes."""
    if ".activation." in name:
        return 0.25 + 0.05 * normal
    return 0.4 + 0.04 * normal if name.endswith(".bn3.weight") else 1.0 + 0.1 * normal


def _matrix(name: str, normal: np.ndarray) -> np.ndarray:
    """Linear weights (out, in) and convolutions (out, in, h, w), with rows of mean zero."""
    centered = normal - normal.mean(axis=tuple(range(1, normal.ndim)), keepdims=True)
    fan_in = math.prod(normal.shape[1:])
    if name.startswith("backbone."):
        gain: Any = math.sqrt(2.0)
    elif name.endswith("in_proj_weight"):  # query, key, value
        gain = np.repeat([1.5, 1.5, 1.0], len(normal) // 3)[:, None]
    else:
        gain = next((gain for text, gain in _GAINS if text in name), 1.0)
        if name.startswith("bbox_embed.") and ".layers.2." in "." + name:
            gain = 0.6
    return centered * (gain / fan_in**0.5)


def state_dict(case: Case) -> dict[str, np.ndarray]:
    """The official state dict of a case."""
    manifest = case.manifest
    return {
        e["name"]: weight(e["name"], e["shape"], manifest["seed"]) for e in manifest["state_dict"]
    }


def batch_of(case: Case) -> dict[str, np.ndarray]:
    """The batch of a case: `image` float32 [B, H, W, 3], standardized, and the rest as usual."""
    images = np.ascontiguousarray(case["in.images"].transpose(0, 2, 3, 1))
    counts = [len(case[f"in.target_labels_{i}"]) for i in range(len(images))]
    slots = max(1, *counts)
    labels, boxes, valid = padded_targets(
        [case[f"in.target_labels_{i}"] for i in range(len(images))],
        [case[f"in.target_boxes_{i}"] for i in range(len(images))],
        slots,
    )
    size = np.array(case.manifest["image_sizes_hw"], np.int32)
    return {"image": images, "size": size, "labels": labels, "boxes": boxes, "valid": valid}


def padded_targets(
    labels: list[np.ndarray], boxes: list[np.ndarray], slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists of objects per image as arrays of `slots` objects: labels, boxes, valid."""
    batch = len(labels)
    padded = np.zeros((batch, slots), np.int32)
    padded_boxes = np.zeros((batch, slots, 4), np.float32)
    valid = np.zeros((batch, slots), bool)
    for i, (own_labels, own_boxes) in enumerate(zip(labels, boxes, strict=True)):
        count = len(own_labels)
        padded[i, :count], valid[i, :count] = own_labels, True
        padded_boxes[i, :count] = np.reshape(own_boxes, (count, 4))
    return padded, padded_boxes, valid


def slots_of(valid: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the PyTorch code's denoising queries lie in our layout.

    Its rows are group by group the objects of all images in order; ours are [B, groups * M].

    Args:
      valid: bool [B, M].
      groups: G.

    Returns:
      Image and slot of every row, two int arrays [N].
    """
    image, position = np.nonzero(valid)
    group = np.arange(groups)[:, None]
    images = np.broadcast_to(image, (groups, len(image)))
    return images.reshape(-1), (group * valid.shape[1] + position).reshape(-1)


def official_order(valid: np.ndarray, groups: int) -> np.ndarray:
    """Our slot for each slot of the PyTorch code, where empty slots are the last of their group.

    Args:
      valid: bool [B, M], in one group.
      groups: G.

    Returns:
      int [B, G * M], a permutation for each image.
    """
    within = np.argsort(~valid, axis=1, kind="stable")
    slots = np.arange(groups)[:, None] * valid.shape[1] + within[:, None]
    return slots.reshape(len(valid), -1)


def stored_noise(
    label_u: np.ndarray,
    label_new: np.ndarray,
    box_u: np.ndarray,
    valid: np.ndarray,
    groups: int,
    box_sign01: np.ndarray | None = None,
) -> Noise:
    """The stored draws in our layout; slots without an object get zeros.

    Args:
      label_u: float [N], rows as in `slots_of`.
      label_new: int [N].
      box_u: float [N, 4].
      valid: bool [B, M].
      groups: G.
      box_sign01: float [N, 4] of 0 and 1, of contrastive denoising.
    """
    rows = slots_of(valid, groups)
    shape = (valid.shape[0], groups * valid.shape[1])

    def scatter(values, dtype):
        result = np.zeros((*shape, *values.shape[1:]), dtype)
        result[rows] = values
        return result

    return Noise(
        label_u=scatter(label_u, np.float32),
        label_new=scatter(label_new, np.int32),
        box_u=scatter(box_u, np.float32),
        box_sign=None if box_sign01 is None else scatter(2 * box_sign01 - 1, np.float32),
    )
