"""The variants of the model as far as the config knows them: keys and rules by `model.name`.

A key of one variant is unknown to the others. `dn_detr_jax.models.registry` adds what is built of
them; nothing here knows of it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dn_detr_jax.config.checks import SHARED_CHECKS, Check
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.keys import SHARED_KEYS
from dn_detr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Schema:
    """All keys and checks of the configs of one variant.

    Attributes:
      keys: rows by path, in the order of the reference.
      checks: rules across keys.
    """

    keys: dict[str, Key]
    checks: tuple[Check, ...]

    def defaults(self) -> dict[str, Any]:
        """Returns the default of every key, by path."""
        return {path: key.default for path, key in self.keys.items()}


_schemas: dict[str, Schema] = {}


def register(name: str, keys: Iterable[Key], rules: Iterable[Check] = ()) -> None:
    """Makes a variant known to the config.

    Args:
      name: value of `model.name`.
      keys: its own rows; a row with the path of a shared key, such as `dn.groups` with another
        default, takes its place.
      rules: its own rules across keys.

    Raises:
      ValueError: two rows with the same path, or the name belongs to another variant.
    """
    keys, rules = tuple(keys), tuple(rules)
    own = {key.path: key for key in keys}
    if len(own) < len(keys):
        raise ValueError(f"variant {name!r}: two keys with the same path")
    shared = {key.path: key for key in SHARED_KEYS}
    shared["model.name"] = dataclasses.replace(shared["model.name"], default=name)
    # Rows stay in the order of the sections: those of the variant follow the shared model keys.
    sections = list(dict.fromkeys(path.split(".")[0] for path in [*shared, *own]))
    merged = shared | own
    ordered = sorted(merged, key=lambda path: sections.index(path.split(".")[0]))
    schema = Schema({path: merged[path] for path in ordered}, (*SHARED_CHECKS, *rules))
    if name in _schemas and _schemas[name].defaults() != schema.defaults():
        raise ValueError(f"variant {name!r}: the name is registered with other keys")
    _schemas[name] = schema


def names() -> list[str]:
    """Returns the names of all known variants."""
    return sorted(_schemas)


def schema_of(name: object) -> Schema:
    """Returns keys and checks of a variant.

    Raises:
      ConfigError: unknown name.
    """
    if not isinstance(name, str) or name not in _schemas:
        known = ", ".join(names())
        raise ConfigError(
            "model.name",
            name,
            f"unknown; known: {known}; the module of another variant has to be imported first",
        )
    return _schemas[name]


def variants_with(path: str) -> list[str]:
    """Returns the names of the variants that have a key."""
    return [name for name in names() if path in _schemas[name].keys]
