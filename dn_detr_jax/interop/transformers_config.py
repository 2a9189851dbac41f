"""What transformers stores beside the weights of its DAB-DETR: the architecture and the classes.

`config.json` tells what leaves no trace in the shapes, and names the classes;
`preprocessor_config.json` tells how pixels are standardized.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dn_detr_jax.errors import WeightsError
from dn_detr_jax.models.images import IMAGE_MEAN, IMAGE_STD

FILES = ("config.json", "preprocessor_config.json")
_MODEL_TYPE = "dab-detr"
# Their names of what the command line of the official code calls otherwise.
_ARGS = {
    "encoder_attention_heads": "nheads",
    "temperature_height": "pe_temperatureH",
    "temperature_width": "pe_temperatureW",
}
_SUPPORTED = {"normalize_before": False, "keep_query_pos": False, "query_dim": 4}
_NO_CLASS = "N/A"  # of an unused label
_PLACEHOLDER = "LABEL_0"  # the first name of classes that nobody named


def read_beside(weights: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the settings in the folder of a file of weights.

    Args:
      weights: the file.

    Returns:
      Arguments by the names of the official code, and the name of every label, "" for an unused
      one; empty if there is no `config.json` of a DAB-DETR, or if it does not name the classes.

    Raises:
      WeightsError: a damaged file, or a setting that this package has no counterpart of.
    """
    path = weights.parent / FILES[0]
    found = _read(path)
    if found.get("model_type") != _MODEL_TYPE:
        return {}, ()
    for key, value in _SUPPORTED.items():
        if found.get(key, value) != value:
            raise WeightsError(
                f"{path}: {key}={found[key]!r} has no counterpart here, only {value}"
            )
    heads = [found.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")]
    if heads[0] != heads[1]:
        raise WeightsError(f"{path}: {heads[0]} heads in the encoder, {heads[1]} in the decoder")
    _check_pixels(weights.parent / FILES[1])
    args = {ours: found[theirs] for theirs, ours in _ARGS.items() if theirs in found}
    args["dilation"] = _dilated(found)
    return args, _class_names(path, found.get("id2label"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: no JSON file: {error}") from error
    return content if isinstance(content, dict) else {}


def _dilated(found: dict[str, Any]) -> bool:
    """Whether the last stage of the backbone has the stride 16 (DC5)."""
    nested = [found.get(key) for key in ("backbone_config", "backbone_kwargs")]
    strides = [x.get("output_stride") for x in nested if isinstance(x, dict)]
    return bool(found.get("dilation")) or 16 in strides


def _check_pixels(path: Path) -> None:
    found = _read(path)
    for key, value in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        own = found.get(key, value)
        if np.shape(own) != (3,) or not np.allclose(own, value, atol=1e-4):
            raise WeightsError(
                f"{path}: {key}={own}, but images are standardized with {value} here"
            )
    for key in ("do_rescale", "do_normalize"):
        if not found.get(key, True):
            raise WeightsError(f"{path}: {key}=False, but images are standardized here")


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, dict) or not names or _PLACEHOLDER in names.values():
        return ()
    if {str(i) for i in range(len(names))} != set(names):
        raise WeightsError(f"{path}: id2label has {len(names)} names, but not for 0, 1, ...")
    ordered = [str(names[str(i)]) for i in range(len(names))]
    return tuple("" if name == _NO_CLASS else name for name in ordered)
