"""State dicts of PyTorch to parameters and back, with a report on every tensor.

The table of `torch_names` drives both directions. Errors come before anything is used: tensors of a
wrong shape, tied heads that differ, parameters without a tensor, and a checkpoint of another model,
with the config that it would fit.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.errors import ConversionError
from dn_detr_jax.interop.state_dicts import unwrapped
from dn_detr_jax.interop.torch_names import (
    BACKBONE_PREFIX,
    canonical_name,
    tied_names,
    torch_tensors,
)
from dn_detr_jax.models.backbones.resnet import BLOCKS, BOTTLENECK_DEPTHS

PyTree = Any
# Parameters whose shape or meaning depends on the classes.
HEAD_PATHS = ("class_head/kernel", "class_head/bias", "label_embedding")
_SHOWN = 6  # names listed in an error before it says how many more there are


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Where every tensor and every parameter of a conversion went.

    Attributes:
      filled: parameters, by path, that got a value.
      unfilled: parameters that the source has no tensor for.
      unused: tensors of the source that no parameter is made of.
      tied: tensors that repeat another one.
      stripped: names of wrapping modules that were removed from the tensors' names.
    """

    filled: tuple[str, ...]
    unfilled: tuple[str, ...]
    unused: tuple[str, ...]
    tied: tuple[str, ...]
    stripped: tuple[str, ...] = ()

    def summary(self) -> str:
        """A line of counts, then what was stripped, unused tensors and unfilled parameters."""
        lines = [f"{len(self.filled)} parameters filled, {len(self.tied)} tied tensors equal"]
        if self.stripped:
            removed = ", ".join(f"{part}." for part in self.stripped)
            lines.append(f"removed from names: {removed}")
        if self.unused:
            lines.append(f"{len(self.unused)} tensors unused: {', '.join(self.unused)}")
        if self.unfilled:
            lines.append(f"{len(self.unfilled)} parameters kept: {', '.join(self.unfilled)}")
        return "\n".join(lines)


def flat(tree: PyTree) -> dict[str, Any]:
    """Nested dictionaries as one with "/" between the keys."""
    return traverse_util.flatten_dict(tree, sep="/")


def params_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """Parameters from a state dict in official names.

    Args:
      state: tensors by name, with or without names of wrapping modules such as `module.`.
      shapes: of the wanted parameters by path.

    Returns:
      float32 parameters by path, those that the state dict has, and the report.

    Raises:
      ConversionError: a wrong shape, or tied tensors that are not equal.
    """
    state, stripped = unwrapped(state)
    wanted, _ = torch_tensors(shapes)
    sources: dict[str, str] = {}
    tied = []
    for name, value in state.items():
        twin = sources.setdefault(canonical_name(name), name)
        if twin != name:
            tied.append(name)
            if not np.array_equal(value, state[twin]):
                raise ConversionError(
                    f"{name} and {twin} are one tensor in DN-DAB-DETR, but differ in the source"
                )
    wrong = [
        f"{tensor.name} has shape {tuple(state[sources[tensor.name]].shape)}, not {tensor.shape}"
        for tensor in wanted
        if tensor.name in sources and state[sources[tensor.name]].shape != tensor.shape
    ]
    if wrong:
        raise ConversionError(_some(wrong, "; "))
    params: dict[str, np.ndarray] = {}
    for tensor in wanted:
        if tensor.name in sources:
            value = np.asarray(state[sources[tensor.name]], np.float32)
            params.update(tensor.split(value))
    used = {tensor.name for tensor in wanted}
    report = ConversionReport(
        filled=tuple(path for path in shapes if path in params),
        unfilled=tuple(path for path in shapes if path not in params),
        unused=tuple(name for name in state if canonical_name(name) not in used),
        tied=tuple(tied),
        stripped=stripped,
    )
    return params, report


def params_to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """The official state dict of parameters, tied tensors under all their names.

    Args:
      params: nested dictionary of arrays of a `dn_dab_detr`.

    Raises:
      ConversionError: a parameter that the official model does not have.
    """
    params = flat(params)
    tensors, foreign = torch_tensors({path: value.shape for path, value in params.items()})
    foreign += [
        path
        for path in params
        if path == "backbone/stem_conv/kernel" and params[path].shape[0] != 7
    ]
    if foreign:
        raise ConversionError(
            f"the official model has no place for {_some(foreign)}: it has batch norm "
            "(config.model.backbone.norm) and a 7x7 stem (config.model.backbone.stem)"
        )
    state: dict[str, np.ndarray] = {}
    for tensor in tensors:
        value = tensor.join(params)
        state |= dict.fromkeys((tensor.name, *tied_names(tensor.name)), value)
    return state


def gradients_to_torch(tree: PyTree) -> dict[str, np.ndarray]:
    """Arrays shaped like parameters (gradients, updates) under official names, tied ones once."""
    tree = flat(tree)
    tensors, _ = torch_tensors({path: value.shape for path, value in tree.items()})
    return {tensor.name: tensor.join(tree) for tensor in tensors}


def backbone_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """The backbone's parameters from a ResNet in torchvision's or timm's names.

    Args:
      state: tensors by name; anything in front of `layer1.0.conv1.weight` is in front of all.
      shapes: of the model's parameters by path, those outside the backbone are ignored.

    Raises:
      ConversionError: not a ResNet, a wrong shape, or a parameter without a tensor.
    """
    state, stripped = unwrapped(state)
    first = "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
    if len(prefixes) != 1:
        raise ConversionError(
            f"a ResNet has one tensor *{first}, the source has {len(prefixes)}; "
            f"its names are like {_some(list(state), count=3)}"
        )
    renamed = {
        BACKBONE_PREFIX + name.removeprefix(prefixes[0]): value
        for name, value in state.items()
        if name.startswith(prefixes[0])
    }
    shapes = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    _, foreign = torch_tensors(shapes)
    if foreign:
        raise ConversionError(
            f"the source has batch norms, the model has not: {_some(foreign)}; set "
            "config.model.backbone.norm to 'frozen_batch_norm'"
        )
    try:
        params, report = params_from_torch(renamed, shapes)
    except ConversionError as error:
        raise ConversionError(f"{error}{_fitting_backbone(renamed)}") from None
    if report.unfilled:
        missing = _some(list(report.unfilled))
        raise ConversionError(f"nothing for {missing}{_fitting_backbone(renamed)}")
    layers = [name for name in report.unused if re.search(r"layer\d\.\d+\.conv", name)]
    if layers and any(re.search(r"layer[1-3]\.", name) for name in layers):
        raise ConversionError(f"a deeper ResNet: {_some(layers)}{_fitting_backbone(renamed)}")
    unused = tuple(name.removeprefix(BACKBONE_PREFIX) for name in report.unused)
    stripped += (prefixes[0].removesuffix("."),) if prefixes[0] else ()
    return params, dataclasses.replace(report, unused=unused, stripped=stripped)


def _fitting_backbone(state: Mapping[str, np.ndarray]) -> str:
    overrides = backbone_config(state)
    return f". The source fits {_as_flags(overrides)}" if overrides else ""


def backbone_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Config keys that a ResNet's state dict in official names decides, empty if it is none."""
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(re.escape(BACKBONE_PREFIX) + r"layer(\d)\.(\d+)\.conv1\.weight", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    stem = state.get(BACKBONE_PREFIX + "conv1.weight")
    if not blocks or stem is None:
        return {}
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    bottleneck = BACKBONE_PREFIX + "layer1.0.conv3.weight" in state
    found = {"model.backbone.stages": len(counts), "model.backbone.width": stem.shape[0]}
    for depth, known in BLOCKS.items():
        if known[: len(counts)] == counts and bottleneck == (depth in BOTTLENECK_DEPTHS):
            found["model.backbone.depth"] = depth
            break
    return found


def official_config(state: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> dict[str, Any]:
    """Config keys that an official DN-DAB-DETR checkpoint decides.

    Args:
      state: tensors by official name.
      args: the command line stored with it, or {}. It alone tells dilation (DC5), the number of
        heads and the temperatures, which leave no trace in the shapes.

    Returns:
      {"model.num_queries": 300, ...}

    Raises:
      ConversionError: another kind of model.
    """
    state, _ = unwrapped(state)
    if any("sampling_offsets" in name for name in state):
        raise ConversionError(
            "the source is a deformable variant (it has sampling offsets), which is not a model "
            "of this package"
        )
    needed = ("class_embed.weight", "refpoint_embed.weight", "label_enc.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ConversionError(
            f"the source is no DN-DAB-DETR: it has no {_some(missing)}; its names are like "
            f"{_some(list(state), count=3)}"
        )

    def layers(part):
        pattern = rf"transformer\.{part}\.layers\.(\d+)\."
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    patterns = state.get("transformer.patterns.weight")
    slope, linear = (f"transformer.decoder.layers.0.{x}.weight" for x in ("activation", "linear1"))
    found = {
        "model.num_classes": state["class_embed.weight"].shape[0],
        "model.hidden_dim": state["class_embed.weight"].shape[1],
        "model.num_queries": state["refpoint_embed.weight"].shape[0],
        "model.num_patterns": 0 if patterns is None else patterns.shape[0],
        "model.encoder_layers": layers("encoder"),
        "model.decoder_layers": layers("decoder"),
        "model.activation": "prelu" if slope in state else "relu",
        **({"model.ffn_dim": state[linear].shape[0]} if linear in state else {}),
        **backbone_config(state),
    }
    from_args = {
        "dilation": "model.backbone.dilation",
        "nheads": "model.num_heads",
        "pe_temperatureH": "model.pe_temperature_h",
        "pe_temperatureW": "model.pe_temperature_w",
    }
    return found | {key: args[name] for name, key in from_args.items() if name in args}


def check_config(found: Mapping[str, Any], config: ConfigDict, *, reset_heads: bool) -> None:
    """Compares what a checkpoint decides with a config.

    Args:
      found: from `official_config`.
      config: whole configuration.
      reset_heads: the number of classes may differ.

    Raises:
      ConversionError: with the overrides that would fit.
    """
    wrong = {}
    for key, value in found.items():
        own = config
        for part in key.split("."):
            own = own[part]
        if own != value and not (reset_heads and key == "model.num_classes"):
            wrong[key] = value
    if wrong:
        hint = ""
        if set(wrong) == {"model.num_classes"}:
            hint = ", or --config.init.reset_heads=True to keep all but the classes"
        raise ConversionError(
            f"the checkpoint is of another model; it fits {_as_flags(wrong)}{hint}"
        )


def reset_heads(
    params: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Parameters of `params` with the class head and the label embedding of `fresh`.

    The last row of the label embedding is kept: it stands for no class, it is the content of the
    matching queries.

    Args:
      params: by path, of a trained model with any number of classes.
      fresh: by path, of the wanted model.
    """
    result = {path: params.get(path, value) for path, value in fresh.items()}
    result |= {path: np.asarray(fresh[path]) for path in HEAD_PATHS}
    if "label_embedding" in params:
        table = np.array(fresh["label_embedding"])
        table[-1] = params["label_embedding"][-1]
        result["label_embedding"] = table
    return result


def reorder_heads(
    params: Mapping[str, np.ndarray],
    fresh: Mapping[str, np.ndarray],
    rows: Sequence[int | None],
) -> dict[str, np.ndarray]:
    """Parameters of `params` with the classes in another order.

    Args:
      params: by path, of a trained model.
      fresh: values of the wanted model by path, for unused labels.
      rows: for each label of the wanted model the label in `params`, None for an unused one.
    """
    result = reset_heads(params, fresh)
    for path in HEAD_PATHS:
        by_class = -1 if path.endswith("kernel") else 0
        theirs = np.moveaxis(np.asarray(params[path]), by_class, 0)
        ours = np.moveaxis(np.array(result[path]), by_class, 0)
        for label, row in enumerate(rows):
            if row is not None:
                ours[label] = theirs[row]
        result[path] = np.moveaxis(ours, 0, by_class)
    return result


def _as_flags(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _some(names: list[str], separator: str = ", ", count: int = _SHOWN) -> str:
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more
