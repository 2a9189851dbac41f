"""From a configuration to a detector, by `config.model.name`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from dn_detr_jax.errors import ConfigError
from dn_detr_jax.models.backbones.resnet import ResNet
from dn_detr_jax.models.dn_dab_detr import DNDabDetr


def _dn_dab_detr(config: ConfigDict, attention: str) -> DNDabDetr:
    dtype = jnp.dtype(config.dtype)
    sizes = config.backbone.to_dict()
    sizes.pop("frozen_stages")
    remat = tuple(config.remat)
    given = ("name", "backbone", "dtype", "remat")
    options = {k: v for k, v in config.items() if k not in given}
    backbone = ResNet(**sizes, dtype=dtype, remat="backbone" in remat)
    return DNDabDetr(backbone=backbone, **options, dtype=dtype, remat=remat, attention=attention)


MODELS = {"dn_dab_detr": _dn_dab_detr}


def build_model(config: ConfigDict, attention: str = "xla") -> nn.Module:
    """Builds a detector.

    Args:
      config: `config.model`.
      attention: `config.compile.attention`; parameters are the same, and results but for rounding.

    Raises:
      ConfigError: unknown name.
    """
    if config.name not in MODELS:
        raise ConfigError("model.name", config.name, f"unknown; known: {', '.join(MODELS)}")
    return MODELS[config.name](config, attention)


def num_matching_queries(config: ConfigDict) -> int:
    """Matching queries N of `config.model`: every anchor with every pattern."""
    return config.num_queries * max(config.num_patterns, 1)


def abstract_params(model: nn.Module, canvas: tuple[int, int] = (64, 64)) -> dict:
    """Shapes and dtypes of the parameters, without computing anything."""
    image = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.float32)
    size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), image, size)["params"]


def trainable(params: dict, config: ConfigDict) -> dict[str, bool]:
    """Which parameters are trained, by their path.

    Args:
      params: nested dictionary of arrays or shapes.
      config: `config.model`.

    Returns:
      {"backbone/stem_conv/kernel": False, ...}: False for frozen batch norm, and for the stem and
      the first `backbone.frozen_stages` stages.
    """
    frozen = []
    if config.backbone.norm == "frozen_batch_norm":
        frozen.append(r"^backbone/.*norm\d?/")
    if config.backbone.frozen_stages >= 0:
        frozen.append(r"^backbone/stem")
        frozen += [rf"^backbone/layer{i + 1}_" for i in range(config.backbone.frozen_stages)]
    paths = traverse_util.flatten_dict(params, sep="/")
    return {path: not any(re.search(p, path) for p in frozen) for path in paths}


def parameter_table(params: dict, is_trainable: dict[str, bool]) -> str:
    """A readable table of all parameters: path, shape, size, and whether they are trained."""
    flat = traverse_util.flatten_dict(params, sep="/")
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flat.items()}
    width = max(map(len, flat))
    lines = [
        f"{path:<{width}}  {'x'.join(map(str, leaf.shape)) or '1':>14}  {sizes[path]:>11,}"
        f"{'' if is_trainable[path] else '  frozen'}"
        for path, leaf in flat.items()
    ]
    trained = sum(size for path, size in sizes.items() if is_trainable[path])
    lines.append(f"{sum(sizes.values()):,} parameters, {trained:,} of them trained")
    return "\n".join(lines)
