"""A reference case of the whole detector, ready to run: config, model, parameters and batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.errors import UnsupportedCase
from dn_detr_jax.interop.convert import flat, params_from_torch
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.case_config import case_config
from dn_detr_jax.parity.comparison import Report, Tolerance, clear_ranks, largest_error
from dn_detr_jax.parity.contrastive import with_halves_of_the_batch
from dn_detr_jax.training.step import denoising_queries

PyTree = Any
# Tolerances that the reference data suggest.
ENCODER_ATOL = 2e-4  # backbone and encoder
POSITION_ATOL = 1e-5
LOGIT_ATOL = 1e-3  # also the decoder's states, which are of the same size
BOX_ATOL = 5e-5
TERM_RTOL = 1e-4
TOTAL_RTOL = (1e-5, 5e-3, 1e-2)  # of the loss in step 1, 2, 3
BFLOAT16_LOSS_RTOL = 2e-2
# Of DINO in its first and its last layer, see `DecoderLimits`.
DINO_LOGIT_ATOL = (1e-4, 1e-2)
DINO_BOX_ATOL = (5e-6, 5e-4)
DINO_BULK_ATOL = 2e-3
SCORE_ATOL = 5e-5  # of the encoder's proposals, for their ranks


@dataclasses.dataclass(frozen=True)
class DecoderLimits:
    """Tolerances of a decoder's outputs, by layer.

    Those of DINO grow from layer to layer by the same factor. In its first two layers that of
    detrex is held to less than the other models, that of the official code to the same. With the
    weights of the cases its decoder doubles an error in every layer. The float32 runs of detrex and
    of the official code differ from their own float64 runs, with the same queries selected, by 3e-5
    and 4e-5 in the logits of the first layer, and by 1.4e-3 and 3.0e-3 in those of the last one
    (boxes: 2e-6 in both, 8e-5 and 9e-5), in a few queries.

    Attributes:
      logits: float [L, 1, 1, 1], also of the states, which are of the same size.
      boxes: float [L, 1, 1, 1].
      bulk: for 99.9% of the logits; None: no such tolerance.
    """

    logits: np.ndarray
    boxes: np.ndarray
    bulk: float | None = None

    @classmethod
    def of(cls, model: ConfigDict) -> "DecoderLimits":
        """The tolerances for float32 of `config.model`."""
        dino = "proposal_score" in model
        ends = (
            DINO_LOGIT_ATOL if dino else (LOGIT_ATOL, LOGIT_ATOL),
            DINO_BOX_ATOL if dino else (BOX_ATOL, BOX_ATOL),
        )
        logits, boxes = (np.geomspace(*x, model.decoder_layers).reshape(-1, 1, 1, 1) for x in ends)
        if dino and model.proposal_score == "objectness":
            logits, boxes = np.maximum(logits, LOGIT_ATOL), np.maximum(boxes, BOX_ATOL)
        return cls(logits, boxes, DINO_BULK_ATOL if dino else None)

    @property
    def scores(self) -> np.ndarray:
        """Of probabilities: the slope of a sigmoid is at most 1/4."""
        return self.logits / 4

    @property
    def last(self) -> tuple[float, float]:
        """Of the scores and the boxes of the last layer, which detections are made of."""
        return float(self.scores[-1].item()), float(self.boxes[-1].item())


@dataclasses.dataclass
class PreparedCase:
    """A case ready to run.

    Attributes:
      case: the data.
      config: what computes the same as the PyTorch code.
      model: detector.
      params: filled from the recipe through the importer.
      batch: standardized images and padded targets.
      dn: denoising queries from the stored noise, None without denoising.
      slot_order: int [B, S], our denoising slot for each of the PyTorch code's.
      compiler_options: of `jax.jit`, for example to compile faster.
    """

    case: reference.Case
    config: ConfigDict
    model: nn.Module
    params: PyTree
    batch: dict[str, np.ndarray]
    dn: denoising.Denoising | None
    slot_order: np.ndarray
    compiler_options: dict[str, Any] | None = None

    @property
    def exact(self) -> bool:
        """Whether the tolerances for float32 apply."""
        return self.config.model.dtype == "float32"

    @property
    def limits(self) -> DecoderLimits:
        """Tolerances of the decoder's outputs in float32."""
        return DecoderLimits.of(self.config.model)

    def limit(self, tolerance: Tolerance) -> Tolerance | None:
        """The tolerance for float32 compute, None (report only) for lower precision."""
        return tolerance if self.exact else None

    def apply_in_training(
        self, params: PyTree, batch: PyTree, dn: denoising.Denoising | None, **options: Any
    ) -> Any:
        """Calls the model as a training does, with further options of `nn.Module.apply`."""
        return self.model.apply(
            {"params": params},
            batch["image"],
            batch["size"],
            dn,
            attend_padding=self.config.dn.attend_padding,
            train=True,
            **options,
        )


def prepare(
    case: reference.Case, dtype: str = "float32", overrides: dict[str, str] | None = None
) -> PreparedCase:
    """Builds and fills the model of a case.

    Args:
      case: of a whole detector.
      dtype: of the compute.
      overrides: of the configuration, see `case_config`.

    Raises:
      UnsupportedCase: see `case_config`.
      ConversionError: the state dict of the case does not fit the model.
    """
    config = case_config(case, overrides)
    config.model.dtype = dtype
    model = build_model(config.model)
    shapes = {path: leaf.shape for path, leaf in flat(abstract_params(model)).items()}
    params, conversion = params_from_torch(
        reference.state_dict(case), shapes, torch_names(config.model)
    )
    if conversion.unfilled or conversion.unused:
        raise UnsupportedCase(f"{case.name}: {conversion.summary()}")
    batch = reference.batch_of(case)
    dn, slot_order = _denoising(case, config, batch)
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))
    return PreparedCase(case, config, model, params, batch, dn, slot_order)


def _denoising(
    case: reference.Case, config: ConfigDict, batch: dict[str, np.ndarray]
) -> tuple[denoising.Denoising | None, np.ndarray]:
    """Denoising queries and the order of their slots."""
    # Without any object the PyTorch code has no denoising queries.
    if not config.dn.groups or "in.noise_label_u" not in case or not batch["valid"].any():
        return None, np.zeros((len(batch["valid"]), 0), int)
    contrastive, groups = config.dn.contrastive, config.dn.groups
    copies = np.tile(batch["valid"], (1, 2)) if contrastive else batch["valid"]
    noise = reference.stored_noise(
        case["in.noise_label_u"],
        case["in.noise_label_new"],
        case["in.noise_box_u"],
        copies,
        groups,
        case["in.noise_box_sign01"] if contrastive else None,
    )
    arrays = {key: jnp.asarray(value) for key, value in batch.items()}
    dn = denoising_queries(arrays, jax.random.key(config.seed), config, noise)
    if dn is not None and contrastive:
        rows = reference.slots_of(copies, groups)
        scales = {"label_noise": config.dn.label_noise, "box_noise": config.dn.box_noise}
        dn = with_halves_of_the_batch(dn, noise, rows, groups, **scales)
    return dn, reference.official_order(copies, groups)


def sequence_as_stored(case: reference.Case, name: str, values: np.ndarray) -> np.ndarray:
    """A sequence [B, T, D] in the layout of a stored array: some have the tokens first."""
    if name not in case or case.full_shape(name)[:1] == values.shape[:1]:
        return values
    return values.swapaxes(0, 1)


def compare_proposals(
    report: Report, run: str, prepared: PreparedCase, outputs: Mapping[str, Any]
) -> None:
    """Compares logits and boxes of all proposals of the official DINO.

    Args:
      report: gets the comparisons.
      run: beginning of the names: "eval" or "train".
      prepared: the case.
      outputs: of the model.
    """
    for ours, names, tolerance in (
        ("objectness_logits", ("enc_logits", "enc_outputs_class"), LOGIT_ATOL),
        ("encoder_boxes", ("enc_boxes", "enc_outputs_coord"), BOX_ATOL),
    ):
        for name in names:  # ours, and that of the official code
            if ours in outputs:
                report.array(f"{run}.{name}", outputs[ours][0], atol=prepared.limit(tolerance))


def stored_selection(case: reference.Case) -> np.ndarray | None:
    """The proposals that the PyTorch code selects with the weights of a case, see `selecting`.

    The evaluation and step 1 of the training select the same.
    """
    names = [name for name in ("eval.topk_idx", "train.topk_idx") if name in case]
    return case.completed(names[0]) if names else None


def compare_selection(
    report: Report, run: str, collected: Mapping[str, Any], *, required: bool
) -> None:
    """Compares which proposals a model selects, where no other score is close.

    Args:
      report: gets the comparison.
      run: beginning of the names.
      collected: intermediate results of the model.
      required: a difference is out of tolerance.
    """
    scores, stored = collected["encoder_scores"][0], f"{run}.enc_scores"
    own = collected.get("own_selected", collected["selected"])[0]
    error = largest_error(report.case, stored, scores) if stored in report.case else SCORE_ATOL
    ranked = -np.sort(-scores, axis=1)[:, : own.shape[1] + 1]
    where = clear_ranks(ranked, error)
    report.equal(f"{run}.topk_idx", own, where=where, required=required)


def reference_terms(terms: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Our loss terms under the reference's names; absent denoising terms are 0 there."""

    def value(name: str) -> float:
        if name.startswith("tgt_"):
            return float(terms.get("dn_" + name.removeprefix("tgt_"), 0.0))
        return float(terms[name])

    return {name: value(name) for name in names}


def is_minimized(name: str) -> bool:
    """Whether a loss term is minimized; the others are counts or parts."""
    return any(term in name for term in ("loss_ce", "loss_bbox", "loss_giou"))


def compare_terms(
    report: Report,
    name: str,
    ours: Mapping[str, float],
    stored: Mapping[str, float],
    *,
    rtol: float | None = None,
) -> None:
    """Compares the terms that are minimized.

    The others count (wrong classes, detections): they jump, and do not measure low precision.
    """
    kept = [name for name in stored if is_minimized(name)]
    report.scalars(name, {k: ours[k] for k in kept}, {k: stored[k] for k in kept}, rtol=rtol)
