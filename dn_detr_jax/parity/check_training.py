"""The training part of a detector's case: queries, matching, losses, gradients and three steps.

Everything runs through the package's own model, matching, criterion and optimizer; three compiled
programs do the whole case.
"""

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util

from dn_detr_jax import denoising, matching
from dn_detr_jax.criterion import MatchedPart, Totals
from dn_detr_jax.interop.convert import gradients_to_torch
from dn_detr_jax.models.registry import (
    loss_settings,
    torch_names,
    trainable,
    variant_of,
)
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.check_queries import check_queries, in_official_order
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.interceptors import selecting
from dn_detr_jax.parity.prepared import (
    BFLOAT16_LOSS_RTOL,
    TERM_RTOL,
    TOTAL_RTOL,
    PreparedCase,
    PyTree,
    compare_proposals,
    compare_terms,
    is_minimized,
    reference_terms,
    stored_selection,
)
from dn_detr_jax.sharding import make_mesh, replicated
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.step import criterion

# Of the gradient's global norm; the PyTorch code's own float32 noise is 1.4% in step 3.
NORM_RTOL = (1e-3, 2e-2, 7e-2)
GRADIENT_RTOL, GRADIENT_MEDIAN, SLOPE_RTOL = 2e-2, 1e-3, 1e-1
UPDATE_RTOL = 5e-3


def compare(report: Report, prepared: PreparedCase, steps: list[dict[str, Any]]) -> None:
    """Compares all that the case has of the training with what `run_steps` returned."""
    check_queries(report, prepared)
    check_outputs(report, prepared, steps[0])
    check_matching(report, prepared, steps[0]["assignment"])
    compare_proposals(report, "train", prepared, steps[0])
    check_proposals(report, prepared, steps[0])
    check_losses(report, prepared, steps)
    if "train.grad_norm" in prepared.case:
        names = prepared.case.setting("param_names")
        compare_gradients(report, prepared, _official(prepared, steps[0]["grads"], names))
    check_updates(report, prepared, steps)


def run_steps(prepared: PreparedCase, count: int = 3) -> list[dict[str, Any]]:
    """Optimizer steps on the case's batch.

    Returns:
      For each step `total`, `terms`, `grads` (before clipping) and `params` (after the step); for
      the first also `pred_logits`, `pred_boxes` and `assignment`.
    """
    config, mesh = prepared.config, make_mesh(1)
    is_trainable = trainable(prepared.params, config.model)
    # The schedule drops the rate at the earliest after an epoch, far from here.
    optimizer, _ = make_optimizer(config, prepared.params, 1000, 50_000, is_trainable)
    flags = traverse_util.unflatten_dict(is_trainable, sep="/")

    def loss_of(params, batch, dn, selected):
        params = jax.tree.map(
            lambda p, train: p if train else jax.lax.stop_gradient(p), params, flags
        )
        with nn.intercept_methods(selecting(selected)):
            outputs = prepared.apply_in_training(params, batch, dn)
        total, terms, assignment = criterion(outputs, dn, batch, config=config, mesh=mesh)
        if dn is not None and config.dn.contrastive:
            terms["dn_class_error"] = _class_error(outputs, dn)
        return total, outputs | {"terms": terms, "assignment": assignment}

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # Two programs: together they take the compiler longer.
    gradient = jax.jit(
        jax.value_and_grad(loss_of, has_aux=True), compiler_options=prepared.compiler_options
    )
    update = jax.jit(update, compiler_options=prepared.compiler_options)
    # On the mesh from the start, as the updated ones are: each program is compiled once.
    params = jax.device_put(prepared.params, replicated(mesh))
    opt_state = jax.device_put(optimizer.init(params), replicated(mesh))
    results = []
    for selected in selections(prepared.case, count):
        (total, result), grads = gradient(params, prepared.batch, prepared.dn, selected)
        params, opt_state = update(grads, opt_state, params)
        results.append(jax.device_get(result | {"total": total, "grads": grads, "params": params}))
    return results


def selections(case: reference.Case, count: int) -> list[np.ndarray | None]:
    """The proposals that each step selects, see `selecting`.

    Step 1 has the weights of the case. Later steps select their own.
    """
    first = stored_selection(case)
    own = None if first is None else np.full_like(first, -1)
    return [first, *[own] * (count - 1)]


def _class_error(outputs: dict[str, jax.Array], dn: denoising.Denoising) -> jax.Array:
    """Percent of wrong classes: the PyTorch code counts all negatives, half of its queries."""
    logits, _ = denoising.split(outputs["pred_logits"][-1], dn)
    right = jnp.argmax(logits, axis=-1) == dn.target_labels
    return 100.0 * (1.0 - jnp.sum(right & dn.valid) / jnp.sum(dn.valid))


def check_outputs(report: Report, prepared: PreparedCase, first: dict[str, Any]) -> None:
    """Logits and boxes of step 1, of the matching and of the denoising queries."""
    limits = prepared.limits
    for name, tolerance in (("logits", limits.logits), ("boxes", limits.boxes)):
        queries, matched = denoising.split(first[f"pred_{name}"], prepared.dn)
        report.array(f"train.{name}", matched, atol=prepared.limit(tolerance))
        if prepared.dn is not None:
            ours = in_official_order(prepared, np.asarray(queries))
            report.array(f"train.dn_{name}", ours, atol=prepared.limit(tolerance))


def check_losses(report: Report, prepared: PreparedCase, steps: list[dict[str, Any]]) -> None:
    """Loss terms, total losses and gradient norms of the steps."""
    case, exact = prepared.case, prepared.exact
    if "steps.losses" in case:
        names = case.setting("loss_names")
        check_losses_as_matched(report, prepared, steps[0])
        for i, result in enumerate(steps):
            ours = reference_terms(result["terms"], names)
            stored = case.by_name("steps.losses", names, row=i)
            noise = None
            if "f64.losses" in case:
                noise = case.by_name("f64.losses", names, row=i)
                # Counts jump: one query more or less is many times the noise of the losses.
                noise = {k: x for k, x in noise.items() if is_minimized(k) and k in stored}
            if exact:
                rtol = TERM_RTOL if i == 0 else None
                report.scalars(f"steps.losses[{i}]", ours, stored, rtol=rtol, exact=noise)
            else:
                compare_terms(report, f"steps.losses[{i}]", ours, stored)
    for i, result in enumerate(steps):
        # Later steps start from parameters that differ, in bfloat16 by whole updates.
        rtol = TOTAL_RTOL[i] if exact else BFLOAT16_LOSS_RTOL if i == 0 else None
        _check_total(report, f"steps.total_loss[{i}]", case, i, result["total"], rtol)
        norm = np.sqrt(sum(float(np.vdot(g, g)) for g in jax.tree.leaves(result["grads"])))
        norm_rtol = prepared.limit(NORM_RTOL[i])
        _check_total(report, f"steps.grad_total_norm[{i}]", case, i, norm, norm_rtol)


def _check_total(
    report: Report,
    name: str,
    case: reference.Case,
    i: int,
    ours: float,
    rtol: float | None,
) -> None:
    array = name.split("[")[0]
    if array not in case:
        return
    exact, steps = array.replace("steps.", "f64."), list("012")
    stored = _kept(case.by_name(array, steps), steps[i])
    in_float64 = _kept(case.by_name(exact, steps), stored) if exact in case else None
    report.scalars(name, {steps[i]: ours}, stored, rtol=rtol, exact=in_float64)


def check_matching(report: Report, prepared: PreparedCase, assignment: np.ndarray) -> None:
    """Matched queries of every image and layer; in lower precision they may differ."""
    equal = {}
    for layer in range(prepared.config.model.decoder_layers):
        for image in range(len(assignment)):
            name = f"train.match_l{layer}_i{image}"
            ours = _pairs(prepared, assignment, layer, image)
            if prepared.exact:
                report.equal(name, ours)
            elif name in prepared.case:
                equal[name] = np.array_equal(ours, prepared.case[name])
    if equal:
        found, wanted = {"equal": sum(equal.values())}, {"equal": len(equal)}
        report.scalars("matching", found, wanted, rtol=None, covers=equal)


def _pairs(prepared: PreparedCase, assignment: np.ndarray, layer: int, image: int) -> np.ndarray:
    """Matched queries, ascending, and their objects."""
    queries = assignment[image, layer, prepared.batch["valid"][image]]
    order = np.argsort(queries)
    return np.stack([queries[order], order])


def check_proposals(report: Report, prepared: PreparedCase, outputs: dict[str, Any]) -> None:
    """Matched proposals of the encoder, if the model has any."""
    if "encoder_boxes" not in outputs:
        return
    targets = {name: jnp.asarray(value) for name, value in prepared.batch.items()}
    totals, settings = Totals.of(targets, prepared.dn), loss_settings(prepared.config)
    split = variant_of(prepared.config.model).output_parts
    part = cast(MatchedPart, split(outputs, prepared.dn, targets, totals, settings)[-1])
    cost, _ = matching.sanitize(part.cost(), targets["valid"])
    assignment = matching.solve_on_host(cost, targets["valid"])
    for image in range(len(assignment)):
        ours = _pairs(prepared, assignment, 0, image)
        report.equal(f"train.match_enc_i{image}", ours, required=prepared.exact)


def _matches(prepared: PreparedCase) -> list[str]:
    """Names of the stored matchings."""
    layers, images = prepared.config.model.decoder_layers, len(prepared.batch["valid"])
    return [f"train.match_l{layer}_i{i}" for layer in range(layers) for i in range(images)]


def stored_assignment(prepared: PreparedCase) -> np.ndarray:
    """The matched queries of the case, int32 [B, L, M], -1 for padding."""
    layers, valid = prepared.config.model.decoder_layers, prepared.batch["valid"]
    assignment = np.full((valid.shape[0], layers, valid.shape[1]), -1, np.int32)
    for image, layer in np.ndindex(*assignment.shape[:2]):
        queries, objects = prepared.case[f"train.match_l{layer}_i{image}"].astype(int)
        assignment[image, layer, objects] = queries
    return assignment


def check_losses_as_matched(
    report: Report, prepared: PreparedCase, outputs: dict[str, Any]
) -> None:
    """Losses of step 1 between the queries and objects that the PyTorch code matched.

    In lower precision another query may be a slightly better match, and its losses are others by
    more than the precision. This is the error of the losses by itself.
    """
    names, exact = prepared.case.setting("loss_names"), prepared.exact
    if any(prepared.case.whole(match) is None for match in _matches(prepared)):
        return

    def losses_of(outputs, assignment):
        options = {"config": prepared.config, "mesh": make_mesh(1), "assignment": assignment}
        total, terms, _ = criterion(outputs, prepared.dn, prepared.batch, **options)
        return total, terms

    losses_of = jax.jit(losses_of, compiler_options=prepared.compiler_options)
    kept = ("pred_logits", "pred_boxes", "objectness_logits", "encoder_boxes")
    outputs = {name: outputs[name] for name in kept if name in outputs}
    total, terms = jax.device_get(losses_of(outputs, stored_assignment(prepared)))
    stored = prepared.case.by_name("steps.losses", names, row=0)
    ours = reference_terms(terms, names)
    compare_terms(report, "as_matched.losses", ours, stored, rtol=TERM_RTOL if exact else None)
    if "steps.total_loss" in prepared.case:
        rtol = TOTAL_RTOL[0] if exact else BFLOAT16_LOSS_RTOL
        expected = {"total": float(prepared.case.stored("steps.total_loss")[0])}
        report.scalars("as_matched.total_loss", {"total": total}, expected, rtol=rtol)


def _parameter_names(prepared: PreparedCase) -> tuple[list[str], dict[str, float]]:
    """Names of the trained parameters in the order of the case, and their tolerances.

    Gradients of biases that are added to all keys alike vanish; what a float32 run shows there is
    rounding, so they have no tolerance and are left out.
    """
    case = prepared.case
    names = case.setting("param_names")
    left_out = set(case.setting("params_with_mathematically_zero_gradient"))
    left_out |= set(case.setting("params_without_gradient"))
    limits = {
        name: SLOPE_RTOL if ".activation." in name else GRADIENT_RTOL
        for name in names
        if name not in left_out
    }
    return names, limits


def _official(prepared: PreparedCase, tree: PyTree, names: list[str]) -> dict[str, np.ndarray]:
    """Arrays shaped like parameters under the reference's names."""
    official = gradients_to_torch(tree, torch_names(prepared.config.model))
    tensors = {reference.canonical_name(name): value for name, value in official.items()}
    return {name: tensors[reference.canonical_name(name)] for name in names}


def _kept(rows: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: rows[name] for name in names if name in rows}


def _compare_norms(
    report: Report,
    prepared: PreparedCase,
    array: str,
    ours: dict[str, np.ndarray],
    **limits: Any,
) -> None:
    """Compares the norms of `ours`, an array for each parameter, with the stored ones."""
    case, names = prepared.case, prepared.case.setting("param_names")
    stored = {name: row for name, row in case.by_name(array, names).items() if name in ours}
    exact = "f64." + array.removeprefix("train.").replace(".", "_")
    report.scalars(
        array,
        {name: float(np.linalg.norm(ours[name].astype(np.float64))) for name in stored},
        stored,
        exact=_kept(case.by_name(exact, names), stored) if exact in case else None,
        **(limits if prepared.exact else {"rtol": None}),
    )


def compare_gradients(report: Report, prepared: PreparedCase, ours: dict[str, np.ndarray]) -> None:
    """Norm and samples of the gradient of every parameter, `ours` by the names of the case."""
    case = prepared.case
    if "train.grad_norm" not in case:
        return
    names, limits = _parameter_names(prepared)
    with_gradient = {name: ours[name] for name in limits}
    _compare_norms(
        report, prepared, "train.grad_norm", with_gradient, rtol=limits, median=GRADIENT_MEDIAN
    )
    index = case.completed("train.sample_idx")
    if "train.grad_sample" not in case or index is None:
        return
    samples = case.part("train.grad_sample", samples_of(ours, index, names))
    is_known = case.part("train.grad_sample", index >= 0)
    errors = np.where(is_known, np.abs(samples - case.stored("train.grad_sample")), 0.0)
    kept = case.by_name("train.grad_sample", names)
    # A sample's error in units of its parameter's gradient norm, ours where theirs is not stored.
    norms = {name: np.linalg.norm(ours[name]) for name in kept}
    norms |= case.by_name("train.grad_norm", names)
    relative = {
        name: row.max() / (norms[name] or 1.0)  # without any object boxes have no gradient
        for name, row, known in zip(kept, errors, is_known, strict=True)
        if name in limits and known.any()
    }
    report.scalars(
        "train.grad_sample",
        {name: 1.0 + value for name, value in relative.items()},
        dict.fromkeys(relative, 1.0),
        rtol=limits if prepared.exact else None,
    )


def _has_gradient(
    prepared: PreparedCase, names: list[str], limits: dict[str, float], index: np.ndarray
) -> np.ndarray:
    """Which samples [P, 8] have a gradient that is not mathematically zero."""
    real = np.broadcast_to(
        np.array([name in limits for name in names])[:, None], index.shape
    ).copy()
    hidden = prepared.config.model.hidden_dim
    for i, name in enumerate(names):
        if name.endswith("in_proj_bias"):  # query, key, value: the middle third belongs to keys
            real[i] &= index[i] // hidden != 1
    return real


def samples_of(tensors: dict[str, np.ndarray], index: np.ndarray, names: list[str]) -> np.ndarray:
    """Entries of tensors in official layout at flat positions `index` [P, 8], any entry for -1."""
    return np.stack([tensors[name].reshape(-1)[index[i]] for i, name in enumerate(names)])


def check_updates(report: Report, prepared: PreparedCase, steps: list[dict[str, Any]]) -> None:
    """Sampled values before and after the steps, and the norm of what changed."""
    case = prepared.case
    index = case.completed("train.sample_idx")
    if index is None:
        return
    is_known = index >= 0
    names, limits = _parameter_names(prepared)
    start = _official(prepared, jax.device_get(prepared.params), names)
    real = is_known & _has_gradient(prepared, names, limits, index)
    report.array("init.param_sample", samples_of(start, index, names), atol=0.0, where=is_known)
    for number, rtol in ((1, UPDATE_RTOL), (3, None)):
        values = _official(prepared, steps[number - 1]["params"], names)
        report.array(f"step{number}.param_sample", samples_of(values, index, names), where=real)
        array = f"step{number}.update_norm"
        if array in case:
            changes = {name: values[name] - start[name] for name in limits}
            _compare_norms(report, prepared, array, changes, rtol=rtol)
