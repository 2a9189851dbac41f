"""Makes the default config of a variant and checks a config before anything is read or compiled.

A file in `configs/` starts from `base_config()` and changes what its experiment changes; the
command line overrides any value with `--config.section.key=value`. `config.keys` and
`config.variants` have the rows that everything here is made from.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.config import dn_dab_detr, variants
from dn_detr_jax.errors import ConfigError


def base_config(model: str = dn_dab_detr.NAME) -> ConfigDict:
    """Makes a config with the default of every key.

    Args:
      model: variant, see `dn_detr_jax.config.variants`.

    Returns:
      A `ConfigDict` with locked keys and types.

    Raises:
      ConfigError: unknown variant.

    Examples:
      >>> base_config().train.batch_size
      16
    """
    return ConfigDict(nested_values(variants.schema_of(model).defaults()))


def validate(config: ConfigDict) -> None:
    """Checks every rule that the config alone decides.

    Args:
      config: an experiment's config, the command line's overrides applied.

    Raises:
      ConfigError: naming the first wrong key, its value and what would be right.
    """
    values = flat_values(config)
    name = values.get("model.name", dn_dab_detr.NAME)
    schema = variants.schema_of(name)
    _check_paths(values, schema)
    for path, key in schema.keys.items():
        if problem := key.rule.problem(values[path]):
            raise ConfigError(path, values[path], problem)
    for check in schema.checks:
        check(values)


def _check_paths(values: Mapping[str, Any], schema: variants.Schema) -> None:
    """Raises for unknown and missing keys."""
    for path, value in values.items():
        if path in schema.keys:
            continue
        if others := variants.variants_with(path):
            name = schema.keys["model.name"].default
            reason = f"a key of the model {' and '.join(others)}; {name} has none of that name"
        else:
            reason = f"no such key; {nearest_key(path, schema.keys)}".rstrip("; ")
        raise ConfigError(path, value, reason)
    for path, key in schema.keys.items():
        if path not in values:
            expected = f"the key is missing; its default is {key.default!r}"
            raise ConfigError(path, None, expected)


def overridden(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a config with other values, as the command line's overrides give it.

    Args:
      config: whole configuration; is not changed.
      overrides: values by key, sections as dictionaries or as dotted keys.

    Raises:
      ConfigError: an unknown key, or a value of another type than the key's. `validate` checks the
        values themselves.

    Examples:
      >>> overridden(base_config(), {"dn": {"groups": 0}, "train.batch_size": 4}).dn.groups
      0
    """
    config = copy.deepcopy(config)
    keys = variants.schema_of(flat_values(config).get("model.name", dn_dab_detr.NAME)).keys
    for path, value in flat_values(overrides).items():
        if path not in keys:
            reason = f"no such key; {nearest_key(path, keys)}".rstrip("; ")
            raise ConfigError(path, value, reason)
        try:
            config.update_from_flattened_dict({path: value})
        except (TypeError, ValueError, AttributeError):
            raise ConfigError(path, value, keys[path].rule.expected) from None
    return config


def flat_values(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested config by dotted path, sorted; sections are left out.

    Examples:
      >>> flat_values({"seed": 0, "dn": {"groups": 5, "slots": 200}})
      {'dn.groups': 5, 'dn.slots': 200, 'seed': 0}
    """
    values: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        path = f"{prefix}{key}"
        section = isinstance(value, ConfigDict | Mapping)
        values |= flat_values(value, f"{path}.") if section else {path: value}
    return values


def nested_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted path as nested dictionaries, the inverse of `flat_values`.

    Examples:
      >>> nested_values({"dn.groups": 5, "dn.slots": 200, "seed": 0})
      {'dn': {'groups': 5, 'slots': 200}, 'seed': 0}
    """
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *sections, last = path.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def flat_keys(config: ConfigDict) -> list[str]:
    """Returns the dotted path of every value of a config, sections left out.

    Examples:
      >>> flat_keys(ConfigDict({"dn": {"groups": 5}, "seed": 0}))
      ['dn.groups', 'seed']
    """
    return list(flat_values(config))


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """Returns a "did you mean" for an unknown dotted key; an empty text if no key is similar.

    Examples:
      >>> nearest_key("model.num_head", ["model.num_heads", "model.num_classes"])
      'did you mean model.num_heads?'
      >>> nearest_key("groups", ["dn.groups", "seed"])
      'did you mean dn.groups?'
    """
    keys = list(keys)
    by_name = {path.rsplit(".", 1)[-1]: path for path in reversed(keys)}
    last = key.rsplit(".", 1)[-1]
    near = [by_name[last]] if last in by_name else []  # the right name in the wrong section
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [by_name[name] for name in difflib.get_close_matches(last, by_name, cutoff=0.8)]
    return f"did you mean {near[0]}?" if near else ""


def expand_user(path: str, key: str) -> Path:
    """Returns a local path with `~` replaced by the home directory.

    Args:
      path: of a file or folder.
      key: config key or flag of the path, for the error.

    Raises:
      ConfigError: a URL such as that of a bucket, an unknown user, or no home directory.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ConfigError(
            key, path, "expected a local path; mount a bucket first, for example with gcsfuse"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(key, path, f"a path; {error}") from None
