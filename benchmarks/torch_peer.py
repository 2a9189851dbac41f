"""Builds the architecture of a config in PyTorch, from the detectors of `transformers`.

The peer of DN-DAB-DETR is DAB-DETR. That of DN-Deformable-DETR is Deformable DETR with refined
boxes, which samples in PyTorch alone (no custom CUDA kernel). It has points in place of anchors,
and one class head for all layers.

For a fair comparison the peer uses channels last, TensorFloat-32 and autotuned convolutions if the
device has them, fused AdamW, images that are already normalized in training, and no denoising
queries. For equal work it has the auxiliary losses of all decoder layers, the frozen stem and
stages of the config, dropout only if the config has it, a lower rate for the backbone and clipped
gradients. It uses its own Hungarian matching (SciPy, layer by layer). The compiled peer is
`torch.compile` of the whole network up to the losses, which need SciPy.
"""

import os
import time
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import (
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetConfig,
)

from dn_detr_jax.errors import ConfigError

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def set_up() -> torch.device:
    """Sets threads and precision for the whole process; returns the device to run on."""
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(device: torch.device) -> dict[str, Any]:
    """Returns the description of the device for a row."""
    if device.type == "cpu":
        return {"platform": "cpu", "kind": "cpu", "count": 1}
    return {"platform": "gpu", "kind": torch.cuda.get_device_name(device), "count": 1}


def build(config: ConfigDict, device: torch.device) -> DabDetrForObjectDetection:
    """Returns the detector of `config.model` with random weights.

    Raises:
      ConfigError: the peer lacks the model or an option of the config.
    """
    sizes, backbone = config.model, config.model.backbone
    if sizes.name not in _PEERS:
        raise ConfigError("model.name", sizes.name, f"one of {', '.join(_PEERS)} has a peer")
    if backbone.norm != "frozen_batch_norm" or backbone.stem != "standard" or backbone.dilation:
        expected = "frozen batch norm, standard stem, no dilation: the peer has no other ResNets"
        raise ConfigError("model.backbone", dict(backbone), expected)
    common = {
        "use_timm_backbone": False,
        "num_labels": sizes.num_classes,
        "num_queries": sizes.num_queries,
        "encoder_layers": sizes.encoder_layers,
        "decoder_layers": sizes.decoder_layers,
        "encoder_attention_heads": sizes.num_heads,
        "decoder_attention_heads": sizes.num_heads,
        "encoder_ffn_dim": sizes.ffn_dim,
        "decoder_ffn_dim": sizes.ffn_dim,
        "dropout": sizes.dropout,
        "auxiliary_loss": True,
    }
    model = _PEERS[sizes.name](sizes, common)
    frozen = [f".stages.{i}." for i in range(backbone.frozen_stages)]
    frozen += [".embedder."] if backbone.frozen_stages >= 0 else []
    for name, parameter in model.named_parameters():  # the peer has rules of its own
        parameter.requires_grad_("backbone" not in name or not any(part in name for part in frozen))
    return model.to(device, memory_format=torch.channels_last)


def _dab_detr(sizes: ConfigDict, common: dict[str, Any]) -> DabDetrForObjectDetection:
    return DabDetrForObjectDetection(
        DabDetrConfig(
            **common,
            backbone_config=_resnet(sizes.backbone, 1),
            hidden_size=sizes.hidden_dim,
            activation_function=sizes.activation,
            num_patterns=sizes.num_patterns,
        )
    )


def _deformable_detr(sizes: ConfigDict, common: dict[str, Any]) -> DeformableDetrForObjectDetection:
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            **common,
            backbone_config=_resnet(sizes.backbone, sizes.backbone_levels),
            d_model=sizes.hidden_dim,
            num_feature_levels=sizes.backbone_levels + sizes.extra_levels,
            encoder_n_points=sizes.encoder_points,
            decoder_n_points=sizes.decoder_points,
            with_box_refine=True,
            disable_custom_kernels=True,
        )
    )


_PEERS = {"dn_dab_detr": _dab_detr, "dn_deformable_detr": _deformable_detr}


def _resnet(backbone: ConfigDict, levels: int) -> ResNetConfig:
    bottleneck = backbone.depth >= 50
    first, stages = backbone.width * (4 if bottleneck else 1), backbone.stages
    return ResNetConfig(
        embedding_size=backbone.width,
        hidden_sizes=[first * 2**i for i in range(stages)],
        depths=list(DEPTHS[backbone.depth][:stages]),
        layer_type="bottleneck" if bottleneck else "basic",
        out_features=[f"stage{stages - i}" for i in reversed(range(levels))],
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters, frozen batch norms included, as this project counts."""
    counts = [p.numel() for p in model.parameters()]
    counts += [b.numel() for n, b in model.named_buffers() if "normalization" in n]
    return sum(counts)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _images(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns normalized images, zero at padding, and masks of valid pixels, on the device."""
    image = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2).float()
    size = torch.from_numpy(batch["size"]).to(device)
    mean = torch.tensor(IMAGE_MEAN, device=device)[:, None, None]
    std = torch.tensor(IMAGE_STD, device=device)[:, None, None]
    rows = torch.arange(image.shape[2], device=device) < size[:, :1]
    columns = torch.arange(image.shape[3], device=device) < size[:, 1:]
    mask = rows[:, :, None] & columns[:, None, :]
    pixels = (image / 255 - mean) / std * mask[:, None]
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return {"pixel_values": pixels, "pixel_mask": mask.long()}


class Training:
    """The peer's training step, on one batch.

    Attributes:
      compile_seconds: of the first step, compilation included.
    """

    def __init__(self, config: ConfigDict, batch: dict[str, np.ndarray], *, compiled: bool):
        """Builds the detector and takes the first step.

        Args:
          config: whole configuration.
          batch: in the format of this project's loader.
          compiled: whether to use `torch.compile`.
        """
        self.device = set_up()
        self._config = config
        self._model = build(config, self.device).train()
        if compiled:
            self._model.model.compile()
        groups: dict[bool, list] = {True: [], False: []}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                groups["backbone" in name].append(parameter)
        settings = config.optimizer
        rate = settings.learning_rate
        self._optimizer = torch.optim.AdamW(
            [{"params": groups[True], "lr": rate / 10}, {"params": groups[False], "lr": rate}],
            weight_decay=settings.weight_decay,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )
        self._trained = groups[True] + groups[False]
        self._images = _images(batch, self.device)
        self._labels = [
            {
                "class_labels": torch.from_numpy(labels[valid]).long().to(self.device),
                "boxes": torch.from_numpy(boxes[valid]).to(self.device),
            }
            for labels, boxes, valid in zip(
                batch["labels"], batch["boxes"], batch["valid"], strict=True
            )
        ]
        start = time.perf_counter()
        self.run(1)
        self.compile_seconds = time.perf_counter() - start

    def run(self, steps: int) -> None:
        """Takes a number of steps, and waits for the last."""
        bfloat16 = self._config.model.dtype == "bfloat16"
        for _ in range(steps):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                loss = self._model(**self._images, labels=self._labels).loss
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self._config.optimizer.clip_norm:
                norm = self._config.optimizer.clip_norm
                torch.nn.utils.clip_grad_norm_(self._trained, norm)
            self._optimizer.step()
        synchronize(self.device)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: the times of such steps are not valid")

    def parameters(self) -> int:
        """Returns the number of parameters, see `count_parameters`."""
        return count_parameters(self._model)

    def peak_bytes(self) -> int | None:
        """Returns the peak memory of tensors on the device; None on a CPU."""
        if self.device.type == "cpu":
            return None
        return torch.cuda.max_memory_allocated(self.device)


class Inference:
    """The peer's detection, from images on the host to the best boxes on the host."""

    def __init__(self, config: ConfigDict, *, compiled: bool):
        """Builds the detector; arguments as for `Training`."""
        self.device = set_up()
        self._config = config
        self._model = build(config, self.device).eval()
        if compiled:
            self._model.compile()

    def start(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
        """Starts a batch; returns scores, labels and boxes, perhaps not yet computed."""
        bfloat16 = self._config.model.dtype == "bfloat16"
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16),
        ):
            found = self._model(**_images(batch, self.device))
            scores = found.logits.float().sigmoid().flatten(1)
            scores, pair = scores.topk(self._config.eval.num_select)
            query = (pair // found.logits.shape[-1])[..., None].expand(-1, -1, 4)
            boxes = found.pred_boxes.float().gather(1, query)
            return scores, pair % found.logits.shape[-1], boxes

    @staticmethod
    def finish(found: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
        """Waits for the detections, and copies them to the host."""
        return tuple(tensor.cpu().numpy() for tensor in found)
