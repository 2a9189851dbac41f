"""The reference of all keys: of one config on the terminal, and of all variants as a document.

    python -m dn_detr_jax.config.reference > docs/config.md

writes the document.
"""

import textwrap

from ml_collections import ConfigDict

from dn_detr_jax.config import variants
from dn_detr_jax.config.checks import SHARED_CHECKS, Check
from dn_detr_jax.config.config import flat_values
from dn_detr_jax.config.key import Key
from dn_detr_jax.config.keys import SHARED_KEYS

_HEAD = """\
# Config keys

Made by `python -m dn_detr_jax.config.reference > docs/config.md`; a test compares. The values of
one experiment: `python train.py --config configs/coco_r50.py --help_config`.

Override a key with `--config.section.key=value`. The last column says when the value may differ
from that of the training: in an *evaluation* of the run; on *resume*, and so in an evaluation; on
each *machine* of a run of several processes.
"""


def describe_config(config: ConfigDict) -> str:
    """Describes every key of a config: value, default, meaning, rule, and when it may change.

    Args:
      config: with the keys of its variant; values may be wrong.

    Raises:
      ConfigError: unknown variant.
    """
    schema = variants.schema_of(config.model.name)
    values = flat_values(config)
    blocks = []
    for path, key in schema.keys.items():
        value = values.get(path)
        changed = "" if value == key.default else f"  (default {key.default!r})"
        sentences = _sentence(key.meaning), _sentence(key.rule.expected), _CHANGES[_changes(key)]
        body = textwrap.fill(
            " ".join(sentences), 96, initial_indent="    ", subsequent_indent="    "
        )
        blocks.append(f"{path} = {value!r}{changed}\n{body}")
    return "\n".join([*blocks, "", "Rules across keys", *_listed(schema.checks)]) + "\n"


def reference_document() -> str:
    """Makes docs/config.md: a table for each section, and for the keys of each variant."""
    parts = [_HEAD]
    for section in dict.fromkeys(_section(key) for key in SHARED_KEYS):
        title = f"`{section}`" if section else "The run"
        parts += [f"## {title}", _table([k for k in SHARED_KEYS if _section(k) == section])]
    parts += ["## Rules across keys", "\n".join(_listed(SHARED_CHECKS)) + "\n"]
    shared = {key.path: key for key in SHARED_KEYS}
    for name in variants.names():
        schema = variants.schema_of(name)
        own = [
            key
            for path, key in schema.keys.items()
            if path != "model.name" and shared.get(path) != key
        ]
        checks = [check for check in schema.checks if check not in SHARED_CHECKS]
        parts += [f"## The model `{name}`", _table(own), "\n".join(_listed(checks)) + "\n"]
    return "\n".join(parts).rstrip() + "\n"


def _section(key: Key) -> str:
    return key.path.split(".")[0] if "." in key.path else ""


def _table(keys: list[Key]) -> str:
    rows = ["| key | default | meaning | value | may differ |", "|---|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.path}`", f"`{key.default!r}`", key.meaning, key.rule.expected)
        rows.append("| " + " | ".join([*map(_escaped, cells), ", ".join(_changes(key))]) + " |")
    return "\n".join(rows) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


def _changes(key: Key) -> tuple[str, ...]:
    """When the value may differ from that of the training, without what is implied."""
    if key.evaluation == "same":
        return ()
    if key.resume == "same":
        return ("evaluation",)
    return ("resume", "machine") if key.machines == "free" else ("resume",)


_CHANGES = {
    (): "An evaluation needs the value of the training.",
    ("evaluation",): "A resumed training keeps the value.",
    ("resume",): "May change on resume.",
    ("resume", "machine"): "May change on resume, and differ between machines.",
}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _listed(checks: tuple[Check, ...] | list[Check]) -> list[str]:
    return [f"- {(check.__doc__ or check.__name__).splitlines()[0]}" for check in checks]


if __name__ == "__main__":
    print(reference_document(), end="")
