"""State dicts of PyTorch to parameters and back, with a report on every tensor.

The table of the variant, see `registry.torch_names`, drives both directions. Errors come before
anything is used: tensors of a wrong shape, tied heads that differ, and parameters without a tensor.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from dn_detr_jax.errors import ConversionError, some_of
from dn_detr_jax.interop.architecture import as_flags
from dn_detr_jax.interop.names.backbones import BACKBONES, BackboneNames, buffers, is_buffer
from dn_detr_jax.interop.names.backbones import NAMES as BACKBONE_NAMES
from dn_detr_jax.interop.state_dicts import unwrapped
from dn_detr_jax.interop.torch_names import TorchNames

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Where every tensor and every parameter of a conversion went.

    Attributes:
      filled: parameters, by path, that got a value.
      unfilled: parameters that the source has no tensor for.
      unused: tensors of the source that no parameter is made of.
      tied: tensors that repeat another one.
      stripped: names of wrapping modules that were removed from the tensors' names.
      source: the code base that the names are of.
      fresh: tensors that the source does not have, with the values of a new model.
    """

    filled: tuple[str, ...]
    unfilled: tuple[str, ...]
    unused: tuple[str, ...]
    tied: tuple[str, ...]
    stripped: tuple[str, ...] = ()
    source: str = "official"
    fresh: tuple[str, ...] = ()

    def summary(self) -> str:
        """A line of counts, then what was stripped, unused tensors and unfilled parameters."""
        lines = [f"{len(self.filled)} parameters filled, {len(self.tied)} tied tensors equal"]
        if self.source != "official":
            lines[0] += f", from names of {self.source}"
        if self.stripped:
            removed = ", ".join(f"{part}." for part in self.stripped)
            lines.append(f"removed from names: {removed}")
        if self.unused:
            lines.append(f"{len(self.unused)} tensors unused: {', '.join(self.unused)}")
        if self.fresh:
            lines.append(
                f"{len(self.fresh)} tensors are not in the source and start new, for training with "
                f"denoising: {', '.join(self.fresh)}"
            )
        if self.unfilled:
            lines.append(f"{len(self.unfilled)} parameters kept: {', '.join(self.unfilled)}")
        return "\n".join(lines)


def flat(tree: PyTree) -> dict[str, Any]:
    """Nested dictionaries as one with "/" between the keys."""
    return traverse_util.flatten_dict(tree, sep="/")


def params_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], names: TorchNames
) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """Parameters from a state dict in official names.

    Args:
      state: tensors by name, with or without names of wrapping modules such as `module.`.
      shapes: of the wanted parameters by path.
      names: of the variant.

    Returns:
      float32 parameters by path, those that the state dict has, and the report.

    Raises:
      ConversionError: a wrong shape, or tied tensors that are not equal.
    """
    state, stripped = unwrapped(state)
    wanted, _ = names.tensors(shapes)
    sources: dict[str, str] = {}
    tied = []
    for name, value in state.items():
        twin = sources.setdefault(names.first_name(name), name)
        if twin != name:
            tied.append(name)
            if not np.array_equal(value, state[twin]):
                raise ConversionError(
                    f"{name} and {twin} are one tensor in the model, but differ in the source"
                )
    wrong = [
        f"{tensor.name} has shape {tuple(state[sources[tensor.name]].shape)}, not {tensor.shape}"
        for tensor in wanted
        if tensor.name in sources and state[sources[tensor.name]].shape != tensor.shape
    ]
    if wrong:
        raise ConversionError(some_of(wrong, "; "))
    params: dict[str, np.ndarray] = {}
    for tensor in wanted:
        if tensor.name in sources:
            value = np.asarray(state[sources[tensor.name]], np.float32)
            params.update(tensor.split(value))
    used = {tensor.name for tensor in wanted}
    report = ConversionReport(
        filled=tuple(path for path in shapes if path in params),
        unfilled=tuple(path for path in shapes if path not in params),
        unused=tuple(
            name for name in state if names.first_name(name) not in used and not is_buffer(name)
        ),
        tied=tuple(tied),
        stripped=stripped,
    )
    return params, report


def params_to_torch(params: PyTree, names: TorchNames) -> dict[str, np.ndarray]:
    """The official state dict of parameters: tied tensors under all their names, and buffers.

    Args:
      params: nested dictionary of arrays.
      names: of the variant.

    Raises:
      ConversionError: a parameter that the official model does not have.
    """
    params = flat(params)
    tensors, foreign = names.tensors({path: value.shape for path, value in params.items()})
    foreign += [
        path
        for path in params
        if path == "backbone/stem_conv/kernel" and params[path].shape[0] != 7
    ]
    if foreign:
        raise ConversionError(
            f"the official model has no place for {some_of(foreign)}: it has batch norm "
            "(config.model.backbone.norm) and a 7x7 stem (config.model.backbone.stem)"
        )
    state: dict[str, np.ndarray] = {}
    for tensor in tensors:
        value = tensor.join(params)
        state |= dict.fromkeys((tensor.name, *names.second_names(tensor.name)), value)
    return state | buffers(state)


def gradients_to_torch(tree: PyTree, names: TorchNames) -> dict[str, np.ndarray]:
    """Arrays shaped like parameters (gradients, updates) under official names, tied ones once."""
    tree = flat(tree)
    tensors, _ = names.tensors({path: value.shape for path, value in tree.items()})
    return {tensor.name: tensor.join(tree) for tensor in tensors}


def backbone_from_torch(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """The backbone's parameters from a file of a backbone alone, such as torchvision's and timm's.

    Args:
      state: tensors by name; anything in front of the name that marks a family, such as a ResNet's
        `layer1.0.conv1.weight`, is in front of all names.
      shapes: of the model's parameters by path, those outside the backbone are ignored.

    Raises:
      ConversionError: no backbone, a wrong shape, or a parameter without a tensor.
    """
    state, stripped = unwrapped(state)
    family, prefix = _family(state)
    renamed = family.renamed(
        {
            family.prefix + name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
    )
    shapes = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    _, foreign = BACKBONE_NAMES.tensors(shapes)
    if foreign:
        raise ConversionError(
            f"the source has batch norms, the model has not: {some_of(foreign)}; set "
            "config.model.backbone.norm to 'frozen_batch_norm'"
        )
    fitting = f". The source fits {as_flags(family.config(renamed))}"
    try:
        params, report = params_from_torch(renamed, shapes, BACKBONE_NAMES)
    except ConversionError as error:
        raise ConversionError(f"{error}{fitting}") from None
    missing = [path for path in report.unfilled if not re.fullmatch(family.fresh, path)]
    if missing:
        raise ConversionError(f"nothing for {some_of(missing)}{fitting}")
    blocks = r"layer\d\.\d+\.conv|blocks\.\d+\.attn\.qkv"
    layers = [name for name in report.unused if re.search(blocks, name)]
    if layers and any(re.search(r"layer[1-3]\.|blocks", name) for name in layers):
        raise ConversionError(f"a deeper {family.title}: {some_of(layers)}{fitting}")
    unused = tuple(name.removeprefix(family.prefix) for name in report.unused)
    stripped += (prefix.removesuffix("."),) if prefix else ()
    return params, dataclasses.replace(report, unused=unused, stripped=stripped)


def _family(state: Mapping[str, np.ndarray]) -> tuple[BackboneNames, str]:
    """The family that a backbone's state dict is of, and what is in front of all its names."""
    expected = []
    for family in BACKBONES:
        prefixes = [name.removesuffix(family.mark) for name in state if name.endswith(family.mark)]
        if len(prefixes) == 1:
            return family, prefixes[0]
        expected.append(
            f"a {family.title} has one tensor *{family.mark}, the source has {len(prefixes)}"
        )
    raise ConversionError(f"{'; '.join(expected)}; its names are like {some_of(state, count=3)}")
