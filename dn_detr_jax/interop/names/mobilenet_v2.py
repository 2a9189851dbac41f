"""MobileNetV2 in torchvision's names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop.torch_names import Row, rows

PREFIX = "backbone.0.body."
MARK = "features.1.conv.0.0.weight"

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


def config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Config keys that a state dict decides, {} if it has no MobileNetV2."""
    last = state.get(PREFIX + "features.17.conv.2.weight")
    if last is None:
        return {}
    # 320 channels at width 1; rounding to multiples of 8 leaves the published widths as they are.
    width = round(last.shape[0] / 320, 4)
    return {"model.backbone.kind": "mobilenet_v2", "model.backbone.mobilenet_v2.width": width}
