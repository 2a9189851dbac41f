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
from dn_detr_jax.parity.comparison import Report
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

    def limit(self, tolerance: float) -> float | None:
        """The tolerance for float32 compute, None (report only) for lower precision."""
        return tolerance if self.exact else None


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
