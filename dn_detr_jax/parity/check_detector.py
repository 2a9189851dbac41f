"""A reference case of the whole detector: outputs, matching, losses, gradients and three steps.

Everything runs through the package's own model, matching, criterion and optimizer; three compiled
programs do the whole case. Tolerances are those that the reference data suggest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax import denoising
from dn_detr_jax.boxes import inverse_sigmoid
from dn_detr_jax.evaluation.postprocess import select_detections
from dn_detr_jax.interop.convert import flat, gradients_to_torch, params_from_torch
from dn_detr_jax.models.images import valid_tokens
from dn_detr_jax.models.registry import abstract_params, build_model, trainable
from dn_detr_jax.parity import reference
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.sharding import make_mesh
from dn_detr_jax.training.optimizer import make_optimizer
from dn_detr_jax.training.step import criterion, denoising_queries

PyTree = Any
ENCODER_ATOL = 2e-4  # backbone and encoder
POSITION_ATOL = 1e-5
LOGIT_ATOL = 1e-3  # also the decoder's states, which are of the same size
BOX_ATOL = 5e-5
TERM_RTOL = 1e-4
TOTAL_RTOL = (1e-5, 5e-3, 1e-2)  # of the loss in step 1, 2, 3
# Of the gradient's global norm; the PyTorch code's own float32 noise is 1.4% in step 3.
NORM_RTOL = (1e-3, 2e-2, 7e-2)
GRADIENT_RTOL, GRADIENT_MEDIAN, SLOPE_RTOL = 2e-2, 1e-3, 1e-1
UPDATE_RTOL = 5e-3
BFLOAT16_LOSS_RTOL = 2e-2


@dataclasses.dataclass
class Setup:
    """A case ready to run.

    Attributes:
      case: the data.
      config: what computes the same as the PyTorch code.
      model: detector.
      params: filled from the recipe through the importer.
      batch: standardised images and padded targets.
      dn: denoising queries from the stored noise, None without denoising.
      compiler_options: of `jax.jit`, for example to compile faster.
    """

    case: reference.Case
    config: ConfigDict
    model: nn.Module
    params: PyTree
    batch: dict[str, np.ndarray]
    dn: denoising.Denoising | None
    compiler_options: dict[str, Any] | None = None

    @property
    def exact(self) -> bool:
        """Whether tolerances for float32 apply."""
        return self.config.model.dtype == "float32"


def set_up(
    case: reference.Case, dtype: str = "float32", overrides: dict[str, str] | None = None
) -> Setup:
    """Builds and fills the model of a case.

    Args:
      case: of a `dn_dab_detr`.
      dtype: of the compute.
      overrides: of the configuration, see `reference.case_config`.

    Raises:
      UnsupportedCase: see `reference.case_config`.
      ConversionError: the state dict of the case is not that of the model.
    """
    config = reference.case_config(case, overrides)
    config.model.dtype = dtype
    model = build_model(config.model)
    shapes = {path: leaf.shape for path, leaf in flat(abstract_params(model)).items()}
    params, account = params_from_torch(reference.state_dict(case), shapes)
    if account.unfilled or account.unused:
        raise reference.UnsupportedCase(f"{case.name}: {account.summary()}")
    batch = reference.batch_of(case)
    dn = None
    # Without any object the PyTorch code has no denoising queries.
    if config.dn.groups and "in.noise_label_u" in case and batch["valid"].any():
        noise = reference.stored_noise(
            case["in.noise_label_u"],
            case["in.noise_label_new"],
            case["in.noise_box_u"],
            batch["valid"],
            config.dn.groups,
        )
        dn = denoising_queries(batch, jax.random.key(config.seed), config, noise)
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))
    return Setup(case, config, model, params, batch, dn)


def check(setup: Setup) -> Report:
    """Compares everything that the case holds."""
    report = Report(setup.case)
    # TPUs and GPUs would otherwise multiply float32 matrices in fewer digits.
    with jax.default_matmul_precision("highest" if setup.exact else "default"):
        if "eval.logits" in setup.case:
            check_eval(report, setup, *run_eval(setup))
        if "train.logits" in setup.case:
            if "train.attn_mask" in setup.case:
                check_queries(report, setup)
            check_training(report, setup, run_steps(setup, 3))
    return report


# --- evaluation -----------------------------------------------------------------------------------


def run_eval(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs of the evaluation (with losses and detections) and intermediate results."""
    mesh = make_mesh(1)

    def forward(params, batch):
        outputs, collected = setup.model.apply(
            {"params": params}, batch["image"], batch["size"], mutable=["intermediates"]
        )
        total, terms, _ = criterion(outputs, None, batch, config=setup.config, mesh=mesh)
        last = (outputs["pred_logits"][-1], outputs["pred_boxes"][-1])
        detections = select_detections(*last, setup.config.eval.num_select)
        return outputs | {"total": total, "terms": terms} | detections, collected

    compiled = jax.jit(forward, compiler_options=setup.compiler_options)
    outputs, collected = jax.device_get(compiled(setup.params, setup.batch))
    return outputs, collected["intermediates"]


def check_eval(
    report: Report, setup: Setup, outputs: dict[str, Any], collected: dict[str, Any]
) -> None:
    """Intermediate results, outputs, losses and detections without denoising queries."""
    case, exact = setup.case, setup.exact
    real = ~case["eval.backbone_mask0"]
    tokens = real.reshape(len(real), -1).T[:, :, None]  # as the PyTorch code: (tokens, batch)

    def atol(value):
        return value if exact else None

    def channels_first(x):
        return x.transpose(0, 3, 1, 2)

    def sequence_first(x):
        return x.transpose(1, 0, 2)

    features = collected["features"][0]
    canvas = setup.batch["image"].shape[1:3]
    mask = valid_tokens(jnp.asarray(setup.batch["size"]), canvas, features.shape[1:3])
    report.equal("eval.backbone_mask0", ~np.asarray(mask))
    report.array("eval.backbone0", channels_first(features), atol=atol(ENCODER_ATOL))
    for name, values, limit in (
        ("eval.pos0", collected["position"], POSITION_ATOL),
        ("eval.src0", collected["src"], ENCODER_ATOL),
    ):
        report.array(name, channels_first(values[0]), atol=atol(limit), where=real[:, None])
    layers = setup.config.model.encoder_layers
    for i in range(layers):
        memory = sequence_first(collected["encoder"][f"enc{i}"][0])
        report.array(f"eval.enc{i}", memory, atol=atol(ENCODER_ATOL), where=tokens)
    report.array("eval.memory", memory, atol=atol(ENCODER_ATOL), where=tokens)
    for i in range(setup.config.model.decoder_layers):
        state = sequence_first(collected["decoder"][f"dec{i}"][0])
        report.array(f"eval.dec{i}", state, atol=atol(LOGIT_ATOL))
    report.array("eval.hs", collected["hs"][0], atol=atol(LOGIT_ATOL))
    report.array("eval.ref", collected["references"][0], atol=atol(BOX_ATOL))
    report.array("eval.logits", outputs["pred_logits"], atol=atol(LOGIT_ATOL))
    report.array("eval.boxes", outputs["pred_boxes"], atol=atol(BOX_ATOL))
    ours = reference_terms(outputs["terms"], case.manifest["eval_loss_names"])
    stored = dict(zip(case.manifest["eval_loss_names"], case["eval.losses"], strict=True))
    if exact:
        report.scalars("eval.losses", ours, stored, rtol=TERM_RTOL)
    else:
        _check_terms(report, "eval.losses", ours, stored)
    expected = {"total": float(case["eval.total_loss"][0])}
    rtol = TOTAL_RTOL[0] if exact else BFLOAT16_LOSS_RTOL
    report.scalars("eval.total_loss", {"total": outputs["total"]}, expected, rtol=rtol)
    check_detections(report, setup, outputs)


def check_detections(report: Report, setup: Setup, outputs: dict[str, Any]) -> None:
    """Post-processing: sorted scores, and labels and boxes where no neighbour is as good."""
    case = setup.case
    scores, expected = outputs["scores"], case["eval.post_scores"]
    report.array("eval.post_scores", scores, atol=LOGIT_ATOL / 4 if setup.exact else None)
    error = np.abs(scores - expected).max()
    gap = -np.diff(expected, axis=1)
    cut = np.array(case.manifest.get("conditioning", {}).get("post_topk_boundary_gap", 0.0))
    below = np.concatenate([gap, np.broadcast_to(cut, len(gap))[:, None]], axis=1)
    above = np.concatenate([np.full((len(gap), 1), np.inf), gap], axis=1)
    clear = np.minimum(below, above) > 2 * error
    labels = np.where(clear, outputs["labels"], case["eval.post_labels"])
    if setup.exact:
        report.equal("eval.post_labels", labels)
    boxes = to_pixels(outputs["boxes"], case["in.orig_sizes"])
    atol = BOX_ATOL * float(case["in.orig_sizes"].max()) if setup.exact else None
    report.array("eval.post_boxes", boxes, atol=atol, where=clear[..., None])


def to_pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Normalised cxcywh boxes [B, K, 4] as corners in pixels of pictures of `sizes` (h, w)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=-1)
    return corners * sizes[:, None, [1, 0, 1, 0]]


def reference_terms(terms: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Our loss terms under the reference's names; absent denoising terms are 0 there."""

    def value(name):
        if name.startswith("tgt_"):
            return float(terms.get("dn_" + name.removeprefix("tgt_"), 0.0))
        return float(terms[name])

    return {name: value(name) for name in names}


def _check_terms(
    report: Report, name: str, ours: dict[str, float], stored: dict[str, float], *, rtol=None
) -> None:
    """Compares the terms that are minimised.

    The others count (wrong classes, detections): they jump, and are no measure of low precision.
    """
    weighted = ("loss_ce", "loss_bbox", "loss_giou")
    kept = [k for k in stored if any(w in k for w in weighted)]
    report.scalars(name, {k: ours[k] for k in kept}, {k: stored[k] for k in kept}, rtol=rtol)


# --- training -------------------------------------------------------------------------------------


def check_queries(report: Report, setup: Setup) -> None:
    """Denoising queries, their targets and the attention mask, from the stored noise."""
    case, dn, config = setup.case, setup.dn, setup.config
    params = setup.params
    matching = jnp.append(params["label_embedding"][-1], 0.0)
    repeats = max(1, config.model.num_patterns)
    queries = config.model.num_queries * repeats
    batch = len(setup.batch["image"])
    content = jnp.broadcast_to(matching, (batch, queries, len(matching)))
    anchors = jnp.broadcast_to(jnp.tile(params["anchors"], (repeats, 1)), (batch, queries, 4))
    allowed = np.ones((batch, queries, queries), bool)
    if dn is not None:
        content = jnp.concatenate(
            [denoising.query_content(params["label_embedding"], dn), content], axis=1
        )
        anchors = jnp.concatenate([inverse_sigmoid(denoising.query_boxes(dn)), anchors], axis=1)
        mask = denoising.attention_mask(dn, queries, attend_padding=config.dn.attend_padding)
        allowed = np.asarray(mask)
        rows = reference.slots_of(setup.batch["valid"], config.dn.groups)
        report.equal("train.md_map_known_indice", rows[1])
        report.equal("train.md_known_labels", np.asarray(dn.target_labels)[rows])
        report.equal("train.md_known_bboxs", np.asarray(dn.target_boxes)[rows])
    report.array("train.input_query_label", content.swapaxes(0, 1), atol=POSITION_ATOL)
    report.array("train.input_query_bbox", anchors.swapaxes(0, 1), atol=POSITION_ATOL)
    forbidden = np.broadcast_to(case["train.attn_mask"], allowed.shape)
    report.equal("train.attn_mask", ~allowed, expected=forbidden)


def run_steps(setup: Setup, count: int) -> list[dict[str, Any]]:
    """Optimizer steps on the case's batch.

    Returns:
      For each step `total`, `terms`, `grads` (before clipping) and `params` (after the step); for
      the first also `pred_logits`, `pred_boxes` and `assignment`.
    """
    config, mesh = setup.config, make_mesh(1)
    is_trainable = trainable(setup.params, config.model)
    # The schedule drops the rate at the earliest after an epoch, far from here.
    optimizer, _ = make_optimizer(config, setup.params, 1000, 50_000, is_trainable)
    flags = traverse_util.unflatten_dict(is_trainable, sep="/")

    def loss_of(params, batch, dn):
        params = jax.tree.map(
            lambda p, train: p if train else jax.lax.stop_gradient(p), params, flags
        )
        outputs = setup.model.apply(
            {"params": params},
            batch["image"],
            batch["size"],
            dn,
            attend_padding=config.dn.attend_padding,
            train=True,
        )
        total, terms, assignment = criterion(outputs, dn, batch, config=config, mesh=mesh)
        return total, outputs | {"terms": terms, "assignment": assignment}

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # Two programs: together they take the compiler longer.
    gradient = jax.jit(
        jax.value_and_grad(loss_of, has_aux=True), compiler_options=setup.compiler_options
    )
    update = jax.jit(update, compiler_options=setup.compiler_options)
    params, opt_state = setup.params, optimizer.init(setup.params)
    results = []
    for _ in range(count):
        (total, result), grads = gradient(params, setup.batch, setup.dn)
        params, opt_state = update(grads, opt_state, params)
        results.append(jax.device_get(result | {"total": total, "grads": grads, "params": params}))
    return results


def check_training(report: Report, setup: Setup, steps: list[dict[str, Any]]) -> None:
    """Outputs, matching, losses, gradients and updates of the steps that were run."""
    case, exact = setup.case, setup.exact
    first = steps[0]
    for name, limit in (("logits", LOGIT_ATOL), ("boxes", BOX_ATOL)):
        queries, matched = denoising.split(first[f"pred_{name}"], setup.dn)
        report.array(f"train.{name}", matched, atol=limit if exact else None)
        if setup.dn is not None:
            report.array(f"train.dn_{name}", queries, atol=limit if exact else None)
    check_matching(report, setup, first["assignment"])
    names = case.manifest["loss_names"]
    check_losses_as_matched(report, setup, first)
    for i, result in enumerate(steps):
        ours = reference_terms(result["terms"], names)
        stored = dict(zip(names, case["steps.losses"][i], strict=True))
        noise = (
            dict(zip(names, case["f64.losses"][i], strict=True)) if "f64.losses" in case else None
        )
        if exact:
            rtol = TERM_RTOL if i == 0 else None
            report.scalars(f"steps.losses[{i}]", ours, stored, rtol=rtol, exact=noise)
        else:
            _check_terms(report, f"steps.losses[{i}]", ours, stored)
        # Later steps start from parameters that differ, in bfloat16 by whole updates.
        rtol = TOTAL_RTOL[i] if exact else BFLOAT16_LOSS_RTOL if i == 0 else None
        _check_total(report, f"steps.total_loss[{i}]", case, i, result["total"], rtol)
        norm = np.sqrt(sum(float(np.vdot(g, g)) for g in jax.tree.leaves(result["grads"])))
        rtol = NORM_RTOL[i] if exact else None
        _check_total(report, f"steps.grad_total_norm[{i}]", case, i, norm, rtol)
    check_gradients(report, setup, first["grads"])
    check_updates(report, setup, steps)


def _check_total(report: Report, name: str, case, i: int, ours, rtol: float | None) -> None:
    array = name.split("[")[0]
    exact = array.replace("steps.", "f64.")
    report.scalars(
        name,
        {name: ours},
        {name: float(case[array][i])},
        rtol=rtol,
        exact={name: float(case[exact][i])} if exact in case else None,
    )


def check_matching(report: Report, setup: Setup, assignment: np.ndarray) -> None:
    """Matched queries of every picture and layer; in lower precision they may differ."""
    agreeing = total = 0
    for layer in range(setup.config.model.decoder_layers):
        for picture, valid in enumerate(setup.batch["valid"]):
            name = f"train.match_l{layer}_i{picture}"
            queries = assignment[picture, layer, valid]
            order = np.argsort(queries)
            ours = np.stack([queries[order], order])
            total += 1
            agreeing += np.array_equal(ours, setup.case[name])
            if setup.exact:
                report.equal(name, ours)
    if not setup.exact:
        report.scalars("matching", {"equal": agreeing}, {"equal": total}, rtol=None)


def stored_assignment(setup: Setup) -> np.ndarray:
    """The matched queries of the case, int32 [B, L, M], -1 for padding."""
    layers, valid = setup.config.model.decoder_layers, setup.batch["valid"]
    assignment = np.full((valid.shape[0], layers, valid.shape[1]), -1, np.int32)
    for picture, layer in np.ndindex(*assignment.shape[:2]):
        queries, objects = setup.case[f"train.match_l{layer}_i{picture}"]
        assignment[picture, layer, objects] = queries
    return assignment


def check_losses_as_matched(report: Report, setup: Setup, outputs: dict[str, Any]) -> None:
    """Losses of step 1 between the queries and objects that the PyTorch code matched.

    In lower precision another query may be a slightly better match, and its losses are others by
    more than the precision. This is the error of the losses by itself.
    """
    names, exact = setup.case.manifest["loss_names"], setup.exact

    def losses_of(outputs, assignment):
        options = {"config": setup.config, "mesh": make_mesh(1), "assignment": assignment}
        total, terms, _ = criterion(outputs, setup.dn, setup.batch, **options)
        return total, terms

    losses_of = jax.jit(losses_of, compiler_options=setup.compiler_options)
    outputs = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
    total, terms = jax.device_get(losses_of(outputs, stored_assignment(setup)))
    stored = dict(zip(names, setup.case["steps.losses"][0], strict=True))
    ours = reference_terms(terms, names)
    _check_terms(report, "as_matched.losses", ours, stored, rtol=TERM_RTOL if exact else None)
    rtol = TOTAL_RTOL[0] if exact else BFLOAT16_LOSS_RTOL
    expected = {"total": float(setup.case["steps.total_loss"][0])}
    report.scalars("as_matched.total_loss", {"total": total}, expected, rtol=rtol)


def _parameter_names(setup: Setup) -> tuple[list[str], dict[str, float]]:
    """Names of the trained parameters in the order of the case, and their tolerances.

    Gradients of biases that are added to all keys alike vanish; what a float32 run shows there is
    rounding, so they have no tolerance and are left out.
    """
    manifest = setup.case.manifest
    left_out = set(manifest["params_with_mathematically_zero_gradient"])
    left_out |= set(manifest["params_without_gradient"])
    limits = {
        name: SLOPE_RTOL if ".activation." in name else GRADIENT_RTOL
        for name in manifest["param_names"]
        if name not in left_out
    }
    return manifest["param_names"], limits


def check_gradients(report: Report, setup: Setup, grads: PyTree) -> None:
    """Norm and samples of the gradient of every parameter."""
    case = setup.case
    names, limits = _parameter_names(setup)
    ours = {reference.canonical_name(k): v for k, v in gradients_to_torch(grads).items()}
    ours = {name: ours[reference.canonical_name(name)] for name in names}
    norms = {name: float(np.linalg.norm(ours[name].astype(np.float64))) for name in limits}
    stored = dict(zip(names, case["train.grad_norm"], strict=True))
    exact = (
        dict(zip(names, case["f64.grad_norm"], strict=True)) if "f64.grad_norm" in case else None
    )
    report.scalars(
        "train.grad_norm",
        norms,
        {name: stored[name] for name in limits},
        rtol=limits if setup.exact else None,
        median=GRADIENT_MEDIAN if setup.exact else None,
        exact=exact,
    )
    # A sample's error in units of its parameter's gradient norm.
    samples = samples_of(ours, case["train.sample_idx"], names)
    errors = np.abs(samples - case["train.grad_sample"]).max(axis=1)
    relative = {name: errors[i] / stored[name] for i, name in enumerate(names) if name in limits}
    ones = dict.fromkeys(relative, 1.0)
    report.scalars(
        "train.grad_sample",
        {name: 1.0 + value for name, value in relative.items()},
        ones,
        rtol=limits if setup.exact else None,
    )


def _has_gradient(
    setup: Setup, names: list[str], limits: dict[str, float], index: np.ndarray
) -> np.ndarray:
    """Which samples [P, 8] have a gradient that is not mathematically zero."""
    real = np.broadcast_to(
        np.array([name in limits for name in names])[:, None], index.shape
    ).copy()
    hidden = setup.config.model.hidden_dim
    for i, name in enumerate(names):
        if name.endswith("in_proj_bias"):  # query, key, value: the middle third belongs to keys
            real[i] &= index[i] // hidden != 1
    return real


def samples_of(tensors: dict[str, np.ndarray], index: np.ndarray, names: list[str]) -> np.ndarray:
    """Entries of tensors in official layout at flat positions `index` [P, 8]."""
    return np.stack([tensors[name].reshape(-1)[index[i]] for i, name in enumerate(names)])


def check_updates(report: Report, setup: Setup, steps: list[dict[str, Any]]) -> None:
    """Sampled values before and after the steps, and the norm of what changed."""
    case = setup.case
    names, limits = _parameter_names(setup)

    def official(params):
        tensors = {reference.canonical_name(k): v for k, v in gradients_to_torch(params).items()}
        return {name: tensors[reference.canonical_name(name)] for name in names}

    start = official(jax.device_get(setup.params))
    index = case["train.sample_idx"]
    real = _has_gradient(setup, names, limits, index)
    report.array("init.param_sample", samples_of(start, index, names), atol=0.0)
    for number, rtol in ((1, UPDATE_RTOL), (3, None)):
        if len(steps) < number or f"step{number}.update_norm" not in case:
            continue
        values = official(steps[number - 1]["params"])
        report.array(f"step{number}.param_sample", samples_of(values, index, names), where=real)
        norms = {
            n: float(np.linalg.norm((values[n] - start[n]).astype(np.float64))) for n in limits
        }
        stored = dict(zip(names, case[f"step{number}.update_norm"], strict=True))
        key = f"f64.step{number}_update_norm"
        report.scalars(
            f"step{number}.update_norm",
            norms,
            {name: stored[name] for name in limits},
            rtol=rtol if setup.exact else None,
            exact=dict(zip(names, case[key], strict=True)) if key in case else None,
        )
