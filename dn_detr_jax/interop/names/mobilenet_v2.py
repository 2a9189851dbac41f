"""MobileNetV2 in torchvision's names, and in those of code from before torchvision had it."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop.torch_names import Row, rows

PREFIX = "backbone.0.body."
MARK = "features.18.0.weight"
_OLDER = PREFIX + "features.2.conv.6.weight"

# Modules of a block by their place in the older code's one sequence, where each activation has a
# place, too. The first block expands nothing.
_FIRST = {0: "0.0", 1: "0.1", 3: "1", 4: "2"}
_OTHERS = {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}

ROWS: tuple[Row, ...] = (
    *rows(
        (PREFIX + "features.", "backbone/"),
        ("conv", "0.0", "stem/conv"),
        ("batch_norm", "0.1", "stem/norm"),
        # The first block expands nothing.
        ("conv", "1.conv.0.0", "block1/depthwise/conv"),
        ("batch_norm", "1.conv.0.1", "block1/depthwise/norm"),
        ("conv", "1.conv.1", "block1/project/conv"),
        ("batch_norm", "1.conv.2", "block1/project/norm"),
        ("conv", "18.0", "last/conv"),
        ("batch_norm", "18.1", "last/norm"),
    ),
    *rows(
        (PREFIX + "features.{i}.conv.", "backbone/block{i}/"),
        ("conv", "0.0", "expand/conv"),
        ("batch_norm", "0.1", "expand/norm"),
        ("conv", "1.0", "depthwise/conv"),
        ("batch_norm", "1.1", "depthwise/norm"),
        ("conv", "2", "project/conv"),
        ("batch_norm", "3", "project/norm"),
    ),
)


def renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of older code as those of torchvision.

    Args:
      state: tensors by name, with `PREFIX`.
    """
    if _OLDER not in state:
        return dict(state)

    def newer(match: re.Match[str]) -> str:
        modules = _FIRST if match[1] == "1" else _OTHERS
        return f"features.{match[1]}.conv.{modules.get(int(match[2]), match[2])}."

    pattern = r"features\.(\d+)\.conv\.(\d+)\."
    return {re.sub(pattern, newer, name): value for name, value in state.items()}


def config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Config keys that a state dict decides, {} if it has no MobileNetV2."""
    last = state.get(PREFIX + "features.17.conv.2.weight")
    if last is None:
        return {}
    # 320 channels at width 1; rounding to multiples of 8 leaves the published widths as they are.
    width = round(last.shape[0] / 320, 4)
    return {"model.backbone.kind": "mobilenet_v2", "model.backbone.mobilenet_v2.width": width}
