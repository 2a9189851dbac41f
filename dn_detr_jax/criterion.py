"""The training loss of a detector, as a sum over parts of its outputs.

A part is a set of predictions with targets, weights and names of its own: the matching queries, the
denoising queries, the proposals of an encoder. A part says either what assigning its objects to
its queries costs, or that its targets are fixed. All parts that need a matching share one callback
to the host.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dn_detr_jax import denoising, losses, matching
from dn_detr_jax.arrays import Array, Bool, Float, Int, Leaf
from dn_detr_jax.losses import ClassLoss

Outputs = Mapping[str, Array]
Targets = Mapping[str, Array]


class Totals(flax.struct.PyTreeNode):
    """Counts of a global batch, by which the losses of its parts are divided.

    Attributes:
      num_images: B.
      num_objects: float32 scalar.
      num_targets: of the denoising queries, int32 scalar; None without denoising.
    """

    num_images: int = flax.struct.field(pytree_node=False)
    num_objects: Leaf
    num_targets: Leaf | None

    @classmethod
    def of(cls, targets: Targets, dn: denoising.Denoising | None) -> "Totals":
        """Counts a whole batch from its `valid`, bool [B, M]."""
        valid = targets["valid"]
        num_objects = jnp.sum(valid, dtype=jnp.float32)
        return cls(len(valid), num_objects, None if dn is None else dn.num_targets)


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What matching and losses of all parts have in common, unless a part differs.

    Attributes:
      class_loss: loss, cost and scores of classes.
      costs: `cost_class`, `cost_bbox` and `cost_giou` of `matching.matching_cost`.
      weights: `weight_class`, `weight_bbox` and `weight_giou` of `losses.weighted_total`.
    """

    class_loss: ClassLoss
    costs: Mapping[str, float]
    weights: Mapping[str, float]


@runtime_checkable
class OutputPart(Protocol):
    """One part of a detector's outputs.

    Attributes:
      settings: of its losses.
      names: pattern of the names of its terms, for example "dn_{}".
    """

    @property
    def settings(self) -> LossSettings: ...  # noqa: D102

    @property
    def names(self) -> str: ...  # noqa: D102

    def problem(self) -> tuple[Float[Array, "B L N M"], Bool[Array, "B M"]] | None:
        """Returns cost [B, L, N, M] and valid [B, M] of a matching, or None if it needs none."""
        ...

    def terms(self, assignment: Int[Array, "B L M"] | None) -> dict[str, Float[jax.Array, " L"]]:
        """Computes losses and metrics, each [L], from an assignment [B, L, M] of the problem."""
        ...


@dataclasses.dataclass(frozen=True)
class MatchedPart:
    """Predictions that are matched to the objects.

    Attributes:
      pred_logits: float [L, B, N, K].
      pred_boxes: float [L, B, N, 4] cxcywh.
      targets: `labels` [B, M], `boxes` [B, M, 4] and `valid` [B, M].
      totals: counts of the global batch.
      settings: of costs and losses.
      names: pattern of the names of the terms.
      assignment: int [B, L, M] to use in place of a matching.
    """

    pred_logits: Float[Array, "L B N K"]
    pred_boxes: Float[Array, "L B N 4"]
    targets: Targets
    totals: Totals
    settings: LossSettings
    names: str = "{}"
    assignment: Int[Array, "B L M"] | None = None

    def cost(self) -> Float[jax.Array, "B L N M"]:
        """Computes the cost float32 [B, L, N, M] of the matching."""
        return matching.matching_cost(
            self.pred_logits,
            self.pred_boxes,
            self.targets["labels"],
            self.targets["boxes"],
            **self.settings.costs,
            class_loss=self.settings.class_loss,
        )

    def problem(self) -> tuple[Float[Array, "B L N M"], Bool[Array, "B M"]] | None:
        """See `OutputPart.problem`."""
        return None if self.assignment is not None else (self.cost(), self.targets["valid"])

    def terms(self, assignment: Int[Array, "B L M"] | None) -> dict[str, Float[jax.Array, " L"]]:
        """See `losses.set_criterion`."""
        assignment = self.assignment if assignment is None else assignment
        if assignment is None:
            raise ValueError(f"the part {self.names!r} has no assignment")
        return losses.set_criterion(
            self.pred_logits,
            self.pred_boxes,
            labels=self.targets["labels"],
            boxes=self.targets["boxes"],
            valid=self.targets["valid"],
            assignment=assignment,
            class_loss=self.settings.class_loss,
            num_objects=self.totals.num_objects,
            num_images=self.totals.num_images,
        )


@dataclasses.dataclass(frozen=True)
class DenoisingPart:
    """Predictions of the denoising queries, whose targets are known.

    Attributes:
      pred_logits: float [L, B, S, K].
      pred_boxes: float [L, B, S, 4] cxcywh.
      dn: the denoising queries.
      totals: counts of the global batch.
      settings: of the losses.
      names: pattern of the names of the terms.
    """

    pred_logits: Float[Array, "L B S K"]
    pred_boxes: Float[Array, "L B S 4"]
    dn: denoising.Denoising
    totals: Totals
    settings: LossSettings
    names: str = "dn_{}"

    def problem(self) -> None:
        """Returns None: targets are fixed."""

    def terms(self, assignment: Int[Array, "B L M"] | None) -> dict[str, Float[jax.Array, " L"]]:
        """See `denoising.reconstruction_loss`."""
        del assignment
        return denoising.reconstruction_loss(
            self.pred_logits,
            self.pred_boxes,
            self.dn,
            class_loss=self.settings.class_loss,
            num_targets=self.totals.num_targets,
        )


def output_parts(
    outputs: Outputs,
    dn: denoising.Denoising | None,
    targets: Targets,
    totals: Totals,
    settings: LossSettings,
) -> list[OutputPart]:
    """Splits the outputs of a decoder into the matching part and, with denoising, its part.

    Args:
      outputs: `pred_logits` [L, B, S + N, K] and `pred_boxes` [L, B, S + N, 4].
      dn: the denoising queries among them, or None.
      targets: `labels` [B, M], `boxes` [B, M, 4] and `valid` [B, M].
      totals: counts of the global batch.
      settings: of both parts.
    """
    # Split before matching: a denoising query must never be matched.
    dn_logits, logits = denoising.split(outputs["pred_logits"], dn)
    dn_boxes, boxes = denoising.split(outputs["pred_boxes"], dn)
    parts: list[OutputPart] = [MatchedPart(logits, boxes, targets, totals, settings)]
    if dn is not None:
        parts.append(DenoisingPart(dn_logits, dn_boxes, dn, totals, settings))
    return parts


def parts_with_proposals(
    outputs: Outputs,
    dn: denoising.Denoising | None,
    targets: Targets,
    totals: Totals,
    settings: LossSettings,
) -> list[OutputPart]:
    """Splits outputs as `output_parts` does, and adds the part of the encoder's proposals.

    Its terms are named `loss_ce_enc` and so on (Zhu et al., "Deformable DETR", ICLR 2021, appendix
    A.4; Zhang et al., "DINO", ICLR 2023, section 3.4).

    Args:
      outputs: also `encoder_boxes` [1, B, P, 4] of P proposals, and either `encoder_logits`
        [1, B, P, K], or `objectness_logits` [1, B, P, K], whose first logit stands for any object.
      dn, targets, totals, settings: as for `output_parts`.
    """
    parts = output_parts(outputs, dn, targets, totals, settings)
    if "objectness_logits" in outputs:
        logits = outputs["objectness_logits"]
        targets = {**targets, "labels": jnp.zeros_like(targets["labels"])}
    else:
        logits = outputs["encoder_logits"]
    boxes = outputs["encoder_boxes"]
    return [*parts, MatchedPart(logits, boxes, targets, totals, settings, names="{}_enc")]


def total_loss(
    parts: Sequence[OutputPart], mesh: Mesh | None
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]], list[jax.Array | None]]:
    """Matches what needs it and sums the losses of all parts.

    Args:
      parts: at least one.
      mesh: for the matching; None if the batch is on one device.

    Returns:
      The weighted sum over parts and layers; the terms as scalars by name, `loss_ce` for the last
      layer and `loss_ce_0`, `loss_ce_1`, ... for the others, and `nonfinite_costs`; and for each
      part the assignment int32 [B, L, M] or None.
    """
    with jax.named_scope("matching"):
        assignments, nonfinite = match_parts(parts, mesh)
    totals: list[jax.Array] = []
    named: dict[str, jax.Array] = {}
    with jax.named_scope("criterion"):
        for part, assignment in zip(parts, assignments, strict=True):
            terms = part.terms(assignment)
            totals.append(losses.weighted_total(terms, **part.settings.weights))
            named |= _by_layer(terms, part.names)
    named["nonfinite_costs"] = nonfinite.astype(jnp.float32)
    return functools.reduce(operator.add, totals), named, assignments


def match_parts(
    parts: Sequence[OutputPart], mesh: Mesh | None
) -> tuple[list[jax.Array | None], Int[jax.Array, ""]]:
    """Solves the problems of all parts; also counts the costs that are not finite.

    Args:
      parts: any number.
      mesh: for the matching; None if the batch is on one device.

    Returns:
      For each part the assignment int32 [B, L, M], or None if it needs none; and the count.
    """
    assignments: list[jax.Array | None] = [None] * len(parts)
    problems: dict[int, tuple[Array, Array]] = {}
    nonfinite = jnp.zeros((), jnp.int32)
    for index, part in enumerate(parts):
        problem = part.problem()
        if problem is not None:
            cost, count = matching.sanitize(*problem)
            problems[index], nonfinite = (cost, problem[1]), nonfinite + count
    found = matching.assign_all(list(problems.values()), mesh)
    for index, assignment in zip(problems, found, strict=True):
        assignments[index] = assignment
    return assignments, nonfinite


def _by_layer(
    terms: Mapping[str, Float[Array, " L"]], names: str
) -> dict[str, Float[jax.Array, ""]]:
    """{"loss_ce": [L]} to scalars: the last layer without suffix, the others `_0`, `_1`, ..."""
    named: dict[str, jax.Array] = {}
    for term, values in terms.items():
        name = names.format(term)
        named |= {f"{name}_{layer}": value for layer, value in enumerate(values[:-1])}
        named[name] = values[-1]
    return named
