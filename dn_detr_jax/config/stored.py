"""The config that a run was stored with: reading it, and what a later start may change of it."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dn_detr_jax.config import dn_dab_detr, variants
from dn_detr_jax.config.config import (
    base_config,
    flat_values,
    nearest_key,
    nested_values,
    validate,
)
from dn_detr_jax.config.key import Key
from dn_detr_jax.errors import ConfigError


def restored_config(stored: Mapping[str, Any]) -> ConfigDict:
    """Makes a valid config of the one that a run was stored with, perhaps by an older version.

    Keys that the run did not have get their defaults, or the values of `Key.earlier`. Removed keys
    are ignored, except those of the model, which raise an error.

    Args:
      stored: nested dictionaries, as JSON has them.

    Raises:
      ConfigError: the config is not valid in this version.
    """
    values = flat_values(stored)
    name = values.get("model.name", dn_dab_detr.NAME)
    config = base_config(name)
    known = flat_values(config)
    values = _earlier(values, variants.schema_of(name).keys) | values
    for path, value in values.items():
        if path.startswith("model.") and path not in known:
            reason = f"unknown to this version; {nearest_key(path, known)}".rstrip("; ")
            raise ConfigError(path, value, reason)
    config.update(nested_values({path: v for path, v in values.items() if path in known}))
    validate(config)
    return config


def changed_values(
    stored: Mapping[str, Any], present: Mapping[str, Any], *, evaluation: bool = False
) -> list[str]:
    """Lists what differs between a run's config and that of a later start, and must not.

    Args:
      stored: config of the run, nested dictionaries as JSON has them. A key that is newer than the
        run had, in effect, its default or the value of `Key.earlier`.
      present: config of the start, likewise.
      evaluation: the start is an evaluation, which needs only the same model.

    Returns:
      Texts such as "train.batch_size was 16, now 8", by key.

    Examples:
      >>> changed_values({"seed": 0, "mesh": {"data": 8}}, {"seed": 1})
      ['seed was 0, now 1']
    """
    was, now = flat_values(stored), flat_values(present)
    rows: dict[str, Key] = {}
    for values in was, now:
        name = values.get("model.name", dn_dab_detr.NAME)
        rows |= variants.schema_of(name).keys if name in variants.names() else {}
    defaults = {path: _as_json(key.default) for path, key in rows.items()} | _earlier(was, rows)
    was = {path: value for path, value in defaults.items() if path in now} | was
    missing = object()
    return [
        f"{path} was {was.get(path, 'missing')!r}, now {now.get(path, 'missing')!r}"
        for path in sorted(was.keys() | now.keys())
        if was.get(path, missing) != now.get(path, missing)
        and _is_fixed(path, rows.get(path), evaluation)
    ]


def _is_fixed(path: str, key: Key | None, evaluation: bool) -> bool:
    if key is None:  # removed in this version
        return path.startswith("model.") or not evaluation
    return (key.evaluation if evaluation else key.resume) == "same"


def _earlier(values: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The keys whose default is not what a run without them had in effect, by path."""
    return {
        path: key.earlier(values)
        for path, key in keys.items()
        if key.earlier and path not in values
    }


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value
