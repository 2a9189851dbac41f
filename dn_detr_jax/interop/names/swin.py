"""Swin Transformer in the names of its authors, which detectron2, detrex and timm share."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop.torch_names import Row, rows
from dn_detr_jax.models.backbones.swin import relative_index

PREFIX = "backbone.0."
MARK = "layers.0.blocks.0.attn.relative_position_bias_table"
# Norms of the features; ImageNet weights have one behind the last stage, which fits none of them.
FRESH = r"backbone/norm\d/(scale|bias)"
# Computed from the size of the windows; a strict `load_state_dict` asks for it.
_TABLE, _INDEX = ".attn.relative_position_bias_table", ".attn.relative_position_index"
BUFFERS = re.escape(PREFIX) + r"layers\.\d\.blocks\.\d+" + re.escape(_INDEX)

ROWS: tuple[Row, ...] = (
    *rows(
        (PREFIX, "backbone/"),
        ("conv_bias", "patch_embed.proj", "stem_patches"),
        ("norm", "patch_embed.norm", "stem_norm"),
        ("norm", "norm{s}", "norm{s}"),
        ("norm", "layers.{s}.downsample.norm", "stage{s}_merging/norm"),
        ("matrix", "layers.{s}.downsample.reduction", "stage{s}_merging/reduction"),
    ),
    *rows(
        (PREFIX + "layers.{s}.blocks.{b}.", "backbone/stage{s}_block{b}/"),
        ("norm", "norm1", "norm1"),
        ("linear", "attn.qkv", "qkv"),
        ("array", "attn.relative_position_bias_table", "position_bias"),
        ("linear", "attn.proj", "out"),
        ("norm", "norm2", "norm2"),
        ("linear", "mlp.fc1", "linear1"),
        ("linear", "mlp.fc2", "linear2"),
    ),
)


def renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Newer names of timm as the older ones: merging belongs to the stage before.

    Args:
      state: tensors by name, with `PREFIX`.
    """
    if PREFIX + "layers.0.downsample.reduction.weight" in state:
        return dict(state)

    def older(name: str) -> str:
        return re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )

    return {older(name): value for name, value in state.items()}


def buffers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of the bias tables, int64 [window^2, window^2], which belong to a state dict."""
    return {
        name.removesuffix(_TABLE) + _INDEX: relative_index(_window(value)).astype(np.int64)
        for name, value in state.items()
        if name.startswith(PREFIX) and name.endswith(_TABLE)
    }


def _window(table: np.ndarray) -> int:
    """The size of the windows of a bias table [(2 * window - 1)^2, heads]."""
    return (round(len(table) ** 0.5) + 1) // 2


def config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Config keys that a state dict decides, {} if it has no Swin Transformer."""
    depths: dict[int, int] = {}
    heads: dict[int, int] = {}
    window = 0
    pattern = re.escape(PREFIX) + r"layers\.(\d)\.blocks\.\d+\.attn\.relative_position_bias_table"
    for name, value in state.items():
        if match := re.fullmatch(pattern, name):
            stage = int(match[1])
            depths[stage] = depths.get(stage, 0) + 1
            window, heads[stage] = _window(value), value.shape[1]
    embedding = state.get(PREFIX + "patch_embed.proj.weight")
    if not depths or embedding is None:
        return {}
    return {
        "model.backbone.kind": "swin",
        "model.backbone.swin.channels": embedding.shape[0],
        "model.backbone.swin.depths": tuple(depths[stage] for stage in sorted(depths)),
        "model.backbone.swin.heads": tuple(heads[stage] for stage in sorted(heads)),
        "model.backbone.swin.window": window,
    }
