"""DN-DAB-DETR: backbone, encoder, decoder and heads, with denoising queries in training.

Li et al., CVPR 2022, on Liu et al., "DAB-DETR", ICLR 2022. The content of a query is the embedding
of a label and one indicator channel: 1 and the noised label for denoising queries, 0 and the extra
"no object" row for matching queries. Without denoising queries this is DAB-DETR, and that is what
runs at inference.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dn_detr_jax import denoising
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.denoising import Denoising
from dn_detr_jax.models.attention import MLP, Linear, attention, fused_attention
from dn_detr_jax.models.backbones.resnet import ResNet
from dn_detr_jax.models.decoder import Decoder
from dn_detr_jax.models.encoder import Encoder
from dn_detr_jax.models.initializers import (
    prior_probability_bias,
    torch_default_kernel,
)
from dn_detr_jax.models.position import image_encoding, valid_tokens

# Mean and standard deviation of ImageNet in RGB, of values in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def normalize_images(image: jax.Array, size: jax.Array) -> jax.Array:
    """Standardises uint8 pixels and sets padding to zero.

    Args:
      image: uint8 [B, H, W, 3] RGB.
      size: int [B, 2], valid height and width.

    Returns:
      float32 [B, H, W, 3].
    """
    mean, std = jnp.array(IMAGE_MEAN), jnp.array(IMAGE_STD)
    scaled = (image.astype(jnp.float32) / 255.0 - mean) / std
    valid = valid_tokens(size, image.shape[1:3], image.shape[1:3])
    return jnp.where(valid[..., None], scaled, 0.0)


def _anchor_init(random_xy: bool):
    """Anchors in logit space: standard normal, or with centres uniform over the picture."""

    def init(key, shape, dtype=jnp.float32):
        anchors = jax.random.normal(key, shape, dtype)
        if random_xy:
            centres = jax.random.uniform(jax.random.fold_in(key, 1), (shape[0], 2), dtype)
            anchors = anchors.at[:, :2].set(inverse_sigmoid(centres))
        return anchors

    return init


class DNDabDetr(nn.Module):
    """The detector.

    Attributes:
      backbone: module from (images, size) to features.
      num_classes: C.
      hidden_dim: D.
      num_heads: heads of every attention.
      ffn_dim: width of the feed-forward networks.
      encoder_layers: layers of the encoder.
      decoder_layers: L.
      num_queries: anchors; there are N = num_queries * max(num_patterns, 1) matching queries.
      num_patterns: learned contents with which every anchor is used; 0: the one of DAB-DETR.
      activation: "prelu" or "relu".
      dropout: rate.
      pe_temperature_h: of the sine encoding of the features, vertical.
      pe_temperature_w: horizontal.
      pe_temperature_box: of the sine encoding of the anchors.
      position_gain: how the position part of the cross-attention starts, see `Decoder`.
      random_refpoints_xy: anchors start with centres uniform over the picture.
      dtype: of the compute.
      remat: parts whose layers are computed again in the backward pass, "encoder" and "decoder";
        and "attention", the scores of both, unless `attention` is "cudnn", which never keeps them.
      attention: "xla", or "cudnn" for its fused kernels, on NVIDIA's GPUs and in bfloat16.
    """

    backbone: ResNet
    num_classes: int
    hidden_dim: int
    num_heads: int
    ffn_dim: int
    encoder_layers: int
    decoder_layers: int
    num_queries: int
    num_patterns: int
    activation: str
    dropout: float
    pe_temperature_h: float
    pe_temperature_w: float
    pe_temperature_box: float
    position_gain: float
    random_refpoints_xy: bool
    dtype: jnp.dtype
    remat: tuple[str, ...] = ()
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        size: jax.Array,
        dn: Denoising | None = None,
        *,
        attend_padding: bool = False,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        """Detects objects.

        Args:
          image: float [B, H, W, 3], see `normalize_images`.
          size: int [B, 2], valid height and width.
          dn: denoising queries with S slots, in training.
          attend_padding: see `denoising.attention_mask`.
          train: dropout on.

        Returns:
          `pred_logits` float32 [L, B, S + N, C] and `pred_boxes` float32 [L, B, S + N, 4], cxcywh
          relative to the valid size, of every decoder layer; denoising slots first.
        """
        features = self.backbone(image.astype(self.dtype), size)
        self.sow("intermediates", "features", features)
        valid = valid_tokens(size, image.shape[1:3], features.shape[1:3])
        position = image_encoding(
            valid, self.hidden_dim, self.pe_temperature_h, self.pe_temperature_w
        )
        self.sow("intermediates", "position", position)
        projected = Linear(
            self.hidden_dim,
            kernel_init=torch_default_kernel,
            dtype=self.dtype,
            out_dtype=jnp.float32,
            name="input_proj",
        )(features)
        self.sow("intermediates", "src", projected)

        def tokens(x):  # [B, h, w, ...] -> [B, h * w, ...]
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        shared = (self.num_heads, self.ffn_dim, self.activation, self.dropout)
        position, valid = tokens(position).astype(self.dtype), tokens(valid)
        attention_fn = functools.partial(attention, remat="attention" in self.remat)
        if self.attention == "cudnn":
            attention_fn = fused_attention
        encoder = Encoder(
            self.encoder_layers,
            *shared,
            dtype=self.dtype,
            remat="encoder" in self.remat,
            attention_fn=attention_fn,
            name="encoder",
        )
        memory = encoder(tokens(projected), position, valid, train=train)

        content, anchors, mask = self._queries(image.shape[0], dn, attend_padding)
        box_head = MLP(
            (self.hidden_dim, self.hidden_dim, 4),
            torch_default_kernel,
            last_constant=0.0,
            dtype=self.dtype,
            name="box_head",
        )
        decoder = Decoder(
            self.decoder_layers,
            *shared,
            temperature=self.pe_temperature_box,
            position_gain=self.position_gain,
            dtype=self.dtype,
            remat="decoder" in self.remat,
            attention_fn=attention_fn,
            name="decoder",
        )
        states, references = decoder(
            content, anchors, mask, memory, position, valid, box_head, train=train
        )
        states, references = jnp.stack(states), jnp.stack(references)
        self.sow("intermediates", "hs", states)
        self.sow("intermediates", "references", references)

        logits = Linear(
            self.num_classes,
            prior_probability_bias(),
            torch_default_kernel,
            dtype=self.dtype,
            out_dtype=jnp.float32,
            name="class_head",
        )(states)
        boxes = box_head(states) + inverse_sigmoid(references)
        return {"pred_logits": logits, "pred_boxes": jax.nn.sigmoid(boxes)}

    def _queries(
        self, batch: int, dn: Denoising | None, attend_padding: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Content [B, S + N, D], anchors [B, S + N, 4] in logit space, and self-attention mask."""
        normal = nn.initializers.normal(1.0)
        table = self.param("label_embedding", normal, (self.num_classes + 1, self.hidden_dim - 1))
        anchors = self.param(
            "anchors", _anchor_init(self.random_refpoints_xy), (self.num_queries, 4)
        )
        content = jnp.append(table[-1], 0.0)  # "no object", indicator 0
        content = jnp.broadcast_to(content, (self.num_queries, self.hidden_dim))
        if self.num_patterns:
            patterns = self.param("patterns", normal, (self.num_patterns, self.hidden_dim))
            content = (content + patterns[:, None]).reshape(-1, self.hidden_dim)
            anchors = jnp.tile(anchors, (self.num_patterns, 1))
        num_queries = len(anchors)
        content = jnp.broadcast_to(content, (batch, *content.shape))
        anchors = jnp.broadcast_to(anchors, (batch, *anchors.shape))
        if dn is None:
            return content, anchors, jnp.ones((1, 1, num_queries), bool)
        content = jnp.concatenate([denoising.query_content(table, dn), content], axis=1)
        anchors = jnp.concatenate([inverse_sigmoid(denoising.query_boxes(dn)), anchors], axis=1)
        mask = denoising.attention_mask(dn, num_queries, attend_padding=attend_padding)
        return content, anchors, mask
