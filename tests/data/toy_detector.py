"""A toy variant from outside of the package: own backbone, decoder and a third part of the loss."""

import flax.linen as nn
import jax.numpy as jnp

from dn_detr_jax.config import key, rules
from dn_detr_jax.criterion import MatchedPart, output_parts
from dn_detr_jax.models import detector, encoder, heads, layers, pyramid, queries
from dn_detr_jax.models.registry import Variant, register

CONFIG = layers.LayerConfig(num_heads=2, ffn_dim=48)


class Patches(nn.Module):
    @nn.compact
    def __call__(self, image, size, *, train):
        return (nn.Conv(24, (16, 16), strides=16, name="embed")(image),)


class WithProposals(nn.Module):
    learned: queries.LearnedQueries
    proposal_heads: heads.SharedHeads

    def __call__(self, levels, dn, *, attend_padding=False):
        anywhere = jnp.full((1, *levels.valid.shape, 4), 0.5)
        found = self.proposal_heads(levels.tokens[None], anywhere).items()
        outputs = {name.replace("pred_", "encoder_"): value for name, value in found}
        return self.learned(levels, dn, attend_padding=attend_padding).replace(outputs=outputs)


class OneLook(nn.Module):
    @nn.compact
    def __call__(self, queries, memory, box_offsets, *, train):
        x, key = queries.content, layers.Linear(32, name="key")(memory.tokens + memory.position)
        y = CONFIG.attention_fn(x, key, memory.tokens, memory.valid[:, None], CONFIG.num_heads)
        x = layers.FeedForward(CONFIG)(x + y, train=train)
        return x[None], nn.sigmoid(queries.anchors)[None]


def build(config, attention):
    learned = queries.LearnedQueries(config.num_classes, 32, config.num_queries, indicator=True)
    return detector.Detector(
        backbone=Patches(),
        pyramid=pyramid.LastLevel(32, temperature_h=20.0, temperature_w=20.0),
        encoder=encoder.DenseEncoder(1, CONFIG),
        queries=WithProposals(learned, heads.SharedHeads(1, 32)),
        decoder=OneLook(),
        heads=heads.SharedHeads(config.num_classes, 32),
    )


def parts(outputs, dn, targets, totals, settings):
    found = outputs["encoder_logits"], outputs["encoder_boxes"]
    any_object = {**targets, "labels": 0 * targets["labels"]}
    proposals = MatchedPart(*found, any_object, totals, settings, "{}_enc")
    return [*output_parts(outputs, dn, targets, totals, settings), proposals]


KEYS = (key.Key("model.num_queries", 8, "matching queries", rules.whole(1)),)
register(Variant("toy", build, lambda config: config.num_queries, KEYS, output_parts=parts))
