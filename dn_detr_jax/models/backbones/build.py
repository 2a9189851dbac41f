"""The backbones by `config.model.backbone.kind`."""

from flax import linen as nn
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dn_detr_jax.models.backbones.mobilenet_v2 import STAGES, MobileNetV2
from dn_detr_jax.models.backbones.resnet import ResNet
from dn_detr_jax.models.backbones.swin import Swin


def build_backbone(
    config: ConfigDict, dtype: DTypeLike, *, remat: bool = False, levels: int = 1
) -> nn.Module:
    """Builds a backbone.

    Args:
      config: `config.model.backbone`.
      dtype: of the compute.
      remat: recompute blocks in the backward pass in place of storing them.
      levels: feature maps that the detector reads, the last ones. A backbone may return more, but
        has no parameters for others.
    """
    shared = {"mask_padding": config.mask_padding, "dtype": dtype, "remat": remat}
    if config.kind == "swin":
        return Swin(
            channels=config.swin.channels,
            depths=tuple(config.swin.depths),
            heads=tuple(config.swin.heads),
            window=config.swin.window,
            drop_path=config.swin.drop_path,
            levels=levels,
            **shared,
        )
    if config.kind == "mobilenet_v2":
        return MobileNetV2(width=config.mobilenet_v2.width, **shared)
    return ResNet(
        depth=config.depth,
        width=config.width,
        stages=config.stages,
        norm=config.norm,
        stem=config.stem,
        dilation=config.dilation,
        **shared,
    )


def frozen_backbone(config: ConfigDict) -> list[str]:
    """Returns patterns for frozen batch norms, the stem and `frozen_stages` stages.

    Args:
      config: `config.model.backbone`.
    """
    patterns = []
    if config.kind == "mobilenet_v2" or (
        config.kind == "resnet" and config.norm == "frozen_batch_norm"
    ):
        patterns.append(r"^backbone/.*norm\d?/")
    if config.frozen_stages >= 0:
        patterns.append(r"^backbone/stem")
        patterns += _of_stages(config)
    return patterns


def _of_stages(config: ConfigDict) -> list[str]:
    """Returns patterns for the blocks of the frozen stages."""
    count = config.frozen_stages
    if config.kind == "resnet":
        return [f"^backbone/layer{i + 1}_" for i in range(count)]
    if config.kind == "swin":
        return [f"^backbone/stage{i}_" for i in range(count)]
    blocks = [1, *(i for first, last in STAGES[:count] for i in range(first, last + 1))]
    last = ["last/"] if count == len(STAGES) else []
    return [f"^backbone/{name}" for name in [*(f"block{i}/" for i in blocks), *last]]
