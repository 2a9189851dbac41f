"""Plain DN-DETR: the variant that `config.model.name = "dn_detr_plain"` stands for.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, with denoising queries
(Li et al., "DN-DETR", CVPR 2022). DETR's queries are learned vectors without boxes. A denoising
query gets the embedding of its label as content, and an encoding of its box in the place of the
learned vector. Without denoising queries this is DETR.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.arrays import Array, Bool, Float
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.losses import SoftmaxLoss
from dn_detr_jax.models.build import last_level_parts, layer_config
from dn_detr_jax.models.detector import Detector
from dn_detr_jax.models.initializers import torch_default_kernel
from dn_detr_jax.models.layers import (
    MLP,
    FeedForward,
    LayerConfig,
    Linear,
    add_and_normalize,
    call_layer,
    layer_norm,
    project_and_attend,
)
from dn_detr_jax.models.levels import Levels
from dn_detr_jax.models.position import box_encoding
from dn_detr_jax.models.queries import Queries, with_denoising


class VectorQueries(nn.Module):
    """Learned vectors as positions of queries without content, and denoising queries.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      num_queries: N.
      temperature: of the sine encoding of denoising boxes.
      indicator: the last channel tells denoising queries (1) from matching queries (0).
      dtype: of the compute.
    """

    num_classes: int
    hidden_dim: int
    num_queries: int
    temperature: float = 10000.0
    indicator: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes the parameters, those for denoising too: an initialization has none."""
        normal, width = nn.initializers.normal(1.0), self.hidden_dim - self.indicator
        self.label_embedding = self.param("label_embedding", normal, (self.num_classes + 1, width))
        self.query_position = self.param(
            "query_position", normal, (self.num_queries, self.hidden_dim)
        )
        self.box_position = MLP((self.hidden_dim, self.hidden_dim), dtype=self.dtype)

    def __call__(
        self, levels: Levels, dn: Denoising | None, *, attend_padding: bool = False
    ) -> Queries:
        """Makes the queries of a batch, see `with_denoising`; their anchors have no meaning."""
        shape = (levels.tokens.shape[0], self.num_queries, self.hidden_dim)
        found = with_denoising(
            jnp.zeros(shape),
            jnp.zeros((*shape[:2], 4)),
            self.label_embedding,
            dn,
            indicator=self.indicator,
            attend_padding=attend_padding,
        )
        boxes = jnp.zeros((1, 1, 4)) if dn is None else denoising.query_boxes(dn)
        encoded = box_encoding(boxes, self.hidden_dim // 2, self.temperature)
        of_boxes = self.box_position(encoded)
        position = jnp.broadcast_to(self.query_position, shape)
        if dn is not None:
            position = jnp.concatenate([of_boxes, position], axis=1)
        return found.replace(position=position)


class PlainDecoderLayer(nn.Module):
    """Self-attention among queries, attention to the memory, feed-forward network."""

    config: LayerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        position: Float[Array, "B Q D"],
        mask: Bool[Array, "#B #Q Q"],
        memory: Levels,
        *,
        train: bool,
    ) -> Float[jax.Array, "B Q D"]:
        """Applies the layer: positions are added to queries and keys, not to values."""
        config = self.config
        residual = functools.partial(add_and_normalize, config=config, train=train)
        query, key = x + position, x + position
        y = project_and_attend(query, key, x, mask, config, prefix="self_")
        x = residual(x, y, out="self_out", norm="self_norm")
        query, key = x + position, memory.tokens + memory.position
        valid = memory.valid[:, None, :]
        y = project_and_attend(query, key, memory.tokens, valid, config, prefix="cross_")
        x = residual(x, y, out="cross_out", norm="cross_norm")
        return FeedForward(config, name="feed_forward")(x, train=train)


class PlainDecoder(nn.Module):
    """A stack of decoder layers with one norm behind each of them.

    Attributes:
      num_layers: L.
      config: of the layers.
      remat: recompute the layers in the backward pass, see `call_layer`.
    """

    num_layers: int
    config: LayerConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        queries: Queries,
        memory: Levels,
        box_offsets: Callable[[int, jax.Array], jax.Array],
        *,
        train: bool,
    ) -> tuple[Float[jax.Array, "L B Q D"], Float[jax.Array, "L B Q 4"]]:
        """Decodes queries; the returned boxes are the meaningless anchors of the queries."""
        del box_offsets
        x, norm, states = queries.content, layer_norm("norm"), []
        for i in range(self.num_layers):
            layer = PlainDecoderLayer(self.config, name=f"layer{i}")
            inputs = x, queries.position, queries.mask, memory
            x = call_layer(layer, *inputs, remat=self.remat, train=train)
            states.append(norm(x))
        anchors = jnp.broadcast_to(queries.anchors, (self.num_layers, *queries.anchors.shape))
        return jnp.stack(states), anchors


class DirectHeads(nn.Module):
    """One head for classes and "no object", and one for boxes of the image, for all layers.

    Attributes:
      num_classes: C.
      hidden_dim: D.
      dtype: of the compute.
    """

    num_classes: int
    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes the heads."""
        self.class_head = Linear(
            self.num_classes + 1, None, torch_default_kernel, self.dtype, jnp.float32
        )
        self.box_head = MLP((self.hidden_dim, self.hidden_dim, 4), dtype=self.dtype)

    def box_offsets(
        self, layer: int, x: Float[Array, "*queries D"]
    ) -> Float[jax.Array, "*queries 4"]:
        """Boxes in logit space, [..., D] to float32 [..., 4]."""
        del layer
        return self.box_head(x)

    def __call__(
        self, states: Float[Array, "L B Q D"], references: Float[Array, "L B Q 4"]
    ) -> dict[str, Float[jax.Array, "L B Q _"]]:
        """Predicts logits of C + 1 classes and boxes; `references` are not used."""
        del references
        boxes = nn.sigmoid(self.box_head(states))
        return {"pred_logits": self.class_head(states), "pred_boxes": boxes}


def build(config: ConfigDict, attention_kernel: str = "xla") -> Detector:
    """Builds the detector.

    Args:
      config: `config.model`.
      attention_kernel: `config.compile.attention`.
    """
    dtype = jnp.dtype(config.dtype)
    layers = layer_config(config, attention_kernel, "relu")
    return Detector(
        **last_level_parts(config, layers, scale_position=False),
        queries=VectorQueries(
            config.num_classes,
            config.hidden_dim,
            config.num_queries,
            config.pe_temperature_box,
            config.indicator,
            dtype,
        ),
        decoder=PlainDecoder(config.decoder_layers, layers, remat="decoder" in config.remat),
        heads=DirectHeads(config.num_classes, config.hidden_dim, dtype),
        dtype=dtype,
    )


def class_loss(config: ConfigDict) -> SoftmaxLoss:
    """Makes the class loss of `config.loss`."""
    return SoftmaxLoss(config.no_object_weight)
