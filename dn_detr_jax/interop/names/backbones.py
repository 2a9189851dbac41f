"""The names of backbones: those inside of the official detectors, and files of a backbone alone.

Every variant has the rows of all backbones: their paths differ.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dn_detr_jax.interop.names import mobilenet_v2, swin
from dn_detr_jax.interop.torch_names import Row, TorchNames, rows
from dn_detr_jax.models.backbones.resnet import BLOCKS, BOTTLENECK_DEPTHS


@dataclasses.dataclass(frozen=True)
class BackboneNames:
    """A family of backbones.

    Attributes:
      title: for messages.
      prefix: in front of all names in a detector's state dict.
      mark: the end of one tensor's name that every such backbone has, and no other.
      rows: modules with `prefix`.
      config: state dict in a detector's names -> the config keys that it decides.
      renamed: other names of the same family, with `prefix`, as those of `rows`.
      fresh: pattern of our paths that a file of a backbone alone need not fill.
      buffers: state dict in a detector's names -> tensors in it that no parameter is made of.
      buffer: pattern of their names.
    """

    title: str
    prefix: str
    mark: str
    rows: tuple[Row, ...]
    config: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    renamed: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    fresh: str = ""
    buffers: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda state: {}
    buffer: str = ""


def _resnet_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(re.escape(_BODY) + r"layer(\d)\.(\d+)\.conv1\.weight", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    stem = state.get(_BODY + "conv1.weight")
    if not blocks or stem is None:
        return {}
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    bottleneck = _BODY + "layer1.0.conv3.weight" in state
    found: dict[str, Any] = {
        "model.backbone.kind": "resnet",
        "model.backbone.stages": len(counts),
        "model.backbone.width": stem.shape[0],
    }
    for depth, known in BLOCKS.items():
        if known[: len(counts)] == counts and bottleneck == (depth in BOTTLENECK_DEPTHS):
            found["model.backbone.depth"] = depth
            break
    return found


_BODY = "backbone.0.body."
RESNET = BackboneNames(
    title="ResNet",
    prefix=_BODY,
    mark="layer1.0.conv1.weight",
    rows=(
        *rows(
            (_BODY, "backbone/"),
            ("conv", "conv1", "stem_conv"),
            ("batch_norm", "bn1", "stem_norm"),
        ),
        *rows(
            (_BODY + "layer{s}.{b}.", "backbone/layer{s}_block{b}/"),
            ("conv", "conv{k}", "conv{k}"),
            ("batch_norm", "bn{k}", "norm{k}"),
            ("conv", "downsample.0", "downsample_conv"),
            ("batch_norm", "downsample.1", "downsample_norm"),
        ),
    ),
    config=_resnet_config,
)
SWIN = BackboneNames(
    title="Swin Transformer",
    prefix=swin.PREFIX,
    mark=swin.MARK,
    rows=swin.ROWS,
    config=swin.config,
    renamed=swin.renamed,
    fresh=swin.FRESH,
    buffers=swin.buffers,
    buffer=swin.BUFFERS,
)
MOBILENET_V2 = BackboneNames(
    title="MobileNetV2",
    prefix=mobilenet_v2.PREFIX,
    mark=mobilenet_v2.MARK,
    rows=mobilenet_v2.ROWS,
    config=mobilenet_v2.config,
    renamed=mobilenet_v2.renamed,
)
BACKBONES = (RESNET, SWIN, MOBILENET_V2)
ROWS: tuple[Row, ...] = tuple(row for backbone in BACKBONES for row in backbone.rows)


def backbone_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Config keys that the backbone in a detector's state dict decides, empty if it is unknown."""
    return {key: value for names in BACKBONES for key, value in names.config(state).items()}


def buffers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a detector's state dict that no parameter is made of."""
    return {key: value for names in BACKBONES for key, value in names.buffers(state).items()}


def is_buffer(name: str) -> bool:
    """Whether a name is one of `buffers`, or of the steps that PyTorch's batch norm counts."""
    return name.endswith(".num_batches_tracked") or any(
        re.fullmatch(names.buffer, name) for names in BACKBONES if names.buffer
    )


# For files of a backbone alone, whatever the variant that it is a part of.
NAMES = TorchNames(rows=ROWS, config=lambda state, args: backbone_config(state))
