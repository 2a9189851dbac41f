"""What the package knows of a config key."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dn_detr_jax.config.rules import Rule

Agreement = Literal["same", "free"]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
      path: with the sections in front, for example "train.batch_size".
      default: of experiments that do not set it.
      meaning: one line.
      rule: for its value; rules across keys are in `checks`.
      resume: "free" if a resumed training may have another value than the run began with: it
        changes neither shapes nor what is trained or measured.
      machines: "free" if the processes of a run may have different values.
      evaluation: "same" if an evaluation needs the value of the training: parameters, or what is
        computed from them, depend on it.
      earlier: what runs that are older than the key had in effect, from their values by path;
        None: the default.
    """

    path: str
    default: Any
    meaning: str
    rule: Rule
    resume: Agreement = "same"
    machines: Agreement = "same"
    evaluation: Agreement = "free"
    earlier: Callable[[Mapping[str, Any]], Any] | None = None


def architecture_key(name: str, default: Any, meaning: str, rule: Rule) -> Key:
    """Makes a key of a model's architecture, `model.NAME`: checkpoints fit no other value."""
    return Key(f"model.{name}", default, meaning, rule, evaluation="same")
