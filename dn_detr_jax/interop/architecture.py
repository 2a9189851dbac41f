"""What a state dict tells of a model: the variant and the config keys that it decides."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.errors import ConversionError, some_of
from dn_detr_jax.interop.names.backbones import backbone_config
from dn_detr_jax.interop.state_dicts import unwrapped
from dn_detr_jax.models import registry


def official_config(
    state: Mapping[str, np.ndarray], args: Mapping[str, Any], model: ConfigDict
) -> dict[str, Any]:
    """Config keys that an official checkpoint decides.

    Args:
      state: tensors by official name.
      args: the command line stored with it, or {}. It alone tells dilation (DC5), the number of
        heads and the temperatures, which leave no trace in the shapes.
      model: `config.model` that the checkpoint is wanted for.

    Returns:
      {"model.num_queries": 300, ...}; of another variant than the wanted one, {"model.name": its
      name, ...}.

    Raises:
      ConfigError: the wanted variant has no official weights.
      ConversionError: a model that is not of this package.
    """
    state, _ = unwrapped(state)
    wanted = registry.torch_names(model)
    misfit = wanted.misfit(state)
    if not misfit:
        return wanted.config(state, args)
    for name, names in registry.all_torch_names().items():
        if not names.misfit(state):
            return {"model.name": name} | names.config(state, args)
    raise ConversionError(
        f"the source is no {model.name} ({misfit}), and no other model of this package; its names "
        f"are like {some_of(state, count=3)}"
    )


def transformer_config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a backbone and a transformer in the official names, for `TorchNames.config`."""

    def layers(part: str) -> int:
        pattern = rf"transformer\.{part}\.layers\.(\d+)\."
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    linear = "transformer.decoder.layers.0.linear1.weight"
    found: dict[str, Any] = {
        "model.encoder_layers": layers("encoder"),
        "model.decoder_layers": layers("decoder"),
        **({"model.ffn_dim": state[linear].shape[0]} if linear in state else {}),
        **backbone_config(state),
    }
    known = {"dilation": "model.backbone.dilation", "nheads": "model.num_heads"}
    return found | from_args(args, known)


def from_args(args: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The values of a stored command line under config keys.

    Args:
      args: by the names of the PyTorch code; those that are missing are left out.
      keys: config key of each name.

    Examples:
      >>> from_args({"nheads": 8, "lr": 1e-4}, {"nheads": "model.num_heads", "dilation": "x"})
      {'model.num_heads': 8}
    """
    return {key: args[name] for name, key in keys.items() if name in args}


def check_config(found: Mapping[str, Any], config: ConfigDict, *, reset_heads: bool) -> None:
    """Compares what a checkpoint decides with a config.

    Args:
      found: from `official_config`.
      config: whole configuration.
      reset_heads: the number of classes may differ.

    Raises:
      ConversionError: with the overrides that would fit.
    """
    variant = found.get("model.name", config.model.name)
    if variant != config.model.name:
        rest = {key: value for key, value in found.items() if key != "model.name"}
        raise ConversionError(
            f"the checkpoint is a {variant}, the config is of {config.model.name}; it fits a "
            f"--config with model.name={variant!r} and {as_flags(rest)}"
        )
    wrong = {}
    for key, value in found.items():
        own = config
        for part in key.split("."):
            own = own[part]
        own = tuple(own) if isinstance(own, list) else own
        if own != value and not (reset_heads and key == "model.num_classes"):
            wrong[key] = value
    if wrong:
        hint = ""
        if set(wrong) == {"model.num_classes"}:
            hint = ", or --config.init.reset_heads=True to keep all but the classes"
        raise ConversionError(
            f"the checkpoint is of another model; it fits {as_flags(wrong)}{hint}"
        )


def as_flags(overrides: Mapping[str, Any]) -> str:
    """Config keys as flags of the command line."""
    return " ".join(f"--config.{key}={shlex.quote(f'{value}')}" for key, value in overrides.items())
