"""The configuration that computes what the PyTorch code computed for a reference case."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.config import base_config, flat_keys, nearest_key, validate
from dn_detr_jax.errors import ConfigError, UnsupportedCase
from dn_detr_jax.parity.reference import Case, require


def case_config(case: Case, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Makes the configuration of a case.

    Args:
      case: of a whole model.
      overrides: config keys and values as text, for measuring what an option changes.

    Raises:
      UnsupportedCase: another model, or an argument that this package has no counterpart of.
      ConfigError: an override of no key, or with a value that can't be right.
    """
    require(case.name, case.manifest, "args", "seed", "state_dict", "image_sizes_hw")
    args, model = case.manifest["args"], case.manifest["modelname"]
    require(f"{case.name}, args", args, *_ARGS)
    if model not in _MODELS:
        known = ", ".join(map(repr, _MODELS))
        raise UnsupportedCase(f"{case.name}: {model!r} is not a model of this package: {known}")
    variant, supported, complete = _MODELS[model]
    _check_supported(case.name, args, _SUPPORTED | supported)
    config = base_config(variant)
    _set_shared(config, args)
    complete(config, case)
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    validate(config)
    return config


# Arguments of the PyTorch code's command line that a config is made from.
_ARGS = (
    *("hidden_dim", "nheads", "dim_feedforward", "enc_layers", "dec_layers", "num_queries"),
    *("num_patterns", "transformer_activation", "dropout", "pe_temperatureH", "pe_temperatureW"),
    *("backbone", "dilation", "lr", "lr_backbone", "lr_drop", "weight_decay", "clip_max_norm"),
    *("use_dn", "scalar", "label_noise_scale", "box_noise_scale", "num_select", "focal_alpha"),
    *("set_cost_class", "set_cost_bbox", "set_cost_giou"),
    *("cls_loss_coef", "bbox_loss_coef", "giou_loss_coef"),
)
_LEVEL_ARGS = ("num_feature_levels", "enc_n_points", "dec_n_points")


def _set_shared(config: ConfigDict, args: Mapping[str, Any]) -> None:
    """Sets what all models have."""
    config.model.update(
        hidden_dim=args["hidden_dim"],
        num_heads=args["nheads"],
        ffn_dim=args["dim_feedforward"],
        encoder_layers=args["enc_layers"],
        decoder_layers=args["dec_layers"],
        num_queries=args["num_queries"],
        dropout=args["dropout"],
    )
    config.model.backbone.update(
        depth=int(args["backbone"].removeprefix("resnet")),
        dilation=args["dilation"],
        mask_padding=False,
        frozen_stages=1 if args["lr_backbone"] > 0 else 4,
    )
    config.dn.update(
        groups=args["scalar"] if args["use_dn"] else 0,
        label_noise=args["label_noise_scale"],
        box_noise=args["box_noise_scale"],
        layout="paper",
        attend_padding=True,
    )
    config.matcher.update(
        cost_class=float(args["set_cost_class"]),
        cost_bbox=float(args["set_cost_bbox"]),
        cost_giou=float(args["set_cost_giou"]),
    )
    config.loss.update(
        weight_class=float(args["cls_loss_coef"]),
        weight_bbox=float(args["bbox_loss_coef"]),
        weight_giou=float(args["giou_loss_coef"]),
        focal_alpha=args["focal_alpha"],
    )
    config.optimizer.update(
        learning_rate=args["lr"],
        lr_multipliers=(("^backbone/", args["lr_backbone"] / args["lr"]),),
        weight_decay=args["weight_decay"],
        clip_norm=args["clip_max_norm"],
        step_at=f"{args['lr_drop']} epochs",
    )


def _complete_dab(config: ConfigDict, case: Case) -> None:
    args = case.manifest["args"]
    config.model.update(
        num_classes=_shapes(case)["class_embed.bias"][0],
        num_patterns=args["num_patterns"],
        activation=args["transformer_activation"],
        pe_temperature_h=float(args["pe_temperatureH"]),
        pe_temperature_w=float(args["pe_temperatureW"]),
    )
    config.eval.num_select = args["num_select"]


def _levels(case: Case) -> dict[str, int]:
    """The keys of the feature levels and of the encoder that reads them."""
    args = case.manifest["args"]
    require(f"{case.name}, args", args, *_LEVEL_ARGS)
    levels = args["num_feature_levels"]
    of_backbone = 3 if levels > 1 else 1
    return {
        "backbone_levels": of_backbone,
        "extra_levels": max(0, levels - of_backbone),
        "encoder_points": args["enc_n_points"],
    }


def _complete_deformable(config: ConfigDict, case: Case) -> None:
    args = case.manifest["args"]
    config.model.update(
        num_classes=_shapes(case)["class_embed.0.bias"][0],
        **_levels(case),
        decoder_points=args["dec_n_points"],
    )
    config.eval.num_select = 100  # whatever the arguments say


def _complete_encoder(config: ConfigDict, case: Case) -> None:
    args = case.manifest["args"]
    config.model.update(
        num_classes=_shapes(case)["class_embed.bias"][0],
        num_patterns=args["num_patterns"],
        pe_temperature_h=float(args["pe_temperatureH"]),
        pe_temperature_w=float(args["pe_temperatureW"]),
        **_levels(case),
    )
    config.eval.num_select = args["num_select"]


def _complete_dino(config: ConfigDict, case: Case) -> None:
    args = case.manifest["args"]
    require(f"{case.name}, args", args, "num_results")
    _complete_deformable(config, case)
    config.eval.num_select = args["num_results"]
    config.model.update(
        proposal_score="objectness", decoder_norm=False, query_scale=True, indicator=True
    )
    config.dn.groups = _contrastive_groups(case) if args["use_dn"] else 0
    config.dn.contrastive = True


def _contrastive_groups(case: Case) -> int:
    """The PyTorch code takes a number of groups from 100 on for one of slots."""
    require(case.name, case.manifest, "gt_counts")
    groups, slots = case.manifest["args"]["scalar"], 2 * max(case.manifest["gt_counts"])
    return max(1, groups // slots if groups >= 100 and slots else groups)


def _shapes(case: Case) -> dict[str, list[int]]:
    return {entry["name"]: entry["shape"] for entry in case.manifest["state_dict"]}


# Values of arguments that have a counterpart here.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "position_embedding": ("sine",),
    "batch_norm_type": ("FrozenBatchNorm2d",),
    "backbone": ("resnet18", "resnet34", "resnet50", "resnet101"),
    "backbone_freeze_keywords": (None,),
    "pre_norm": (False,),
    "masks": (False,),
    "aux_loss": (True,),
    "dropout": (0.0,),
    "frozen_weights": (None,),
}
_ONE_STAGE = {"two_stage": (False,), "contrastive": (False,)}

# The official models: our variant, further values of arguments, and what completes the config.
_MODELS: dict[str, tuple[str, dict[str, tuple[Any, ...]], Callable[[ConfigDict, Case], None]]] = {
    "dn_dab_detr": (
        "dn_dab_detr",
        _ONE_STAGE | {"transformer_activation": ("prelu", "relu")},
        _complete_dab,
    ),
    "dn_dab_deformable_detr": (
        "dn_deformable_detr",
        _ONE_STAGE | {"num_patterns": (0,)},
        _complete_deformable,
    ),
    "dn_dab_deformable_detr_deformable_encoder_only": (
        "dn_deformable_encoder_detr",
        _ONE_STAGE | {"transformer_activation": ("relu",)},
        _complete_encoder,
    ),
    "dn_dab_dino_deformable_detr": (
        "dn_dino_detr",
        {"two_stage": (True,), "contrastive": (True,), "num_patterns": (0,)},
        _complete_dino,
    ),
}


def _check_supported(
    name: str, args: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]
) -> None:
    for key, values in wanted.items():
        if args.get(key, values[0]) not in values:
            raise UnsupportedCase(
                f"{name}: {key}={args[key]!r} has no counterpart in this package, only {values}"
            )


def _override(config: ConfigDict, key: str, text: str) -> None:
    if key not in flat_keys(config):
        near = nearest_key(key, flat_keys(config))
        raise ConfigError(key, text, f"no such key; {near}".rstrip("; "))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    section = config
    *sections, last = key.split(".")
    for part in sections:
        section = section[part]
    try:
        section[last] = value
    except TypeError:
        raise ConfigError(key, value, f"a value such as {section[last]!r}") from None
