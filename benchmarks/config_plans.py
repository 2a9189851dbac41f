"""Compiles the training step of every config for TPU v5e, and makes a table of the plans.

    python -m benchmarks.config_plans
    python -m benchmarks.config_plans --only deformable --set model.remat="('encoder',)"
    python -m benchmarks.config_plans --report docs/models.md      # compiles nothing

Each config is compiled by `dn_detr_jax preflight` in a process of its own, for its largest canvas,
at its batch size, with one image on each chip. Its plan is one line of `--rows`, so the command can
be interrupted at any time: configs that have a line are skipped, also those that failed, until
their line is deleted. A config that differs from another one in its schedule alone takes over the
plan. `--set` changes all chosen configs; such plans are lines of their own. The multiply-adds of
detection are half of jax's count of operations before any compilation, of one image that fills the
canvas.

`--report` writes the tables of a document between the lines `<!-- config_plans: models -->` or
`<!-- config_plans: steps -->` and `<!-- end -->`.
"""

import datetime
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks.common import FULL_TRACEBACKS, ROOT
from dn_detr_jax.commands.command_line import define_path_flag, run_main
from dn_detr_jax.config import flat_values, load_config
from dn_detr_jax.config.experiments import experiment_names
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.files import read_json_lines, write_text_atomically
from dn_detr_jax.preflight.report import GIB, quantity

FLAGS = flags.FLAGS
ROWS = ROOT / "benchmarks" / "config_plans.jsonl"
# A square of chips for the number of images of a step, one on each chip.
TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4"}
# What a preflight can't take from the data; the numbers are those of COCO.
FROM_DATA = {"model.num_classes": 91, "data.max_objects": 100}
# They change numbers in the program, not its form.
SCHEDULE = "train.duration", "optimizer.step_at"

# GFLOP of detection and millions of parameters in the papers: Li et al., "DN-DETR", CVPR 2022,
# tables 1 to 3, which do not say for which size of image.
_R50_DC5_3PAT, _R101_DC5 = (216, 44), (282, 63)
PUBLISHED = {
    "coco_r50": (94, 44),
    "coco_r101": (174, 63),
    "coco_r50_dc5": (202, 44),
    "coco_r101_dc5": _R101_DC5,
    "coco_r50_dc5_3pat_12ep": _R50_DC5_3PAT,
    "coco_r101_dc5_3pat_12ep": _R101_DC5,
    "coco_deformable_encoder_r50_12ep": (195, 48),
    "coco_deformable_encoder_r50_50ep": (195, 48),
    "coco_deformable_encoder_r101_12ep": (275, 67),
}


def settings_of(config: ConfigDict, changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the values to compile a config with: `changes`, and what it leaves to the data."""
    missing = {k: str(v) for k, v in FROM_DATA.items() if not flat_values(config)[k]}
    return missing | dict(changes)


def fingerprint(config: ConfigDict, settings: Mapping[str, str]) -> str:
    """Returns a text that is equal for configs which differ in their schedule alone."""
    values = {k: v for k, v in flat_values(config).items() if k not in SCHEDULE}
    text = json.dumps([values, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_config(name: str, settings: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Runs the preflight of a config.

    Args:
      name: of the config.
      settings: texts by config key.
      seconds: the most that it may take.

    Returns:
      The figures, or the reason of a failure as "failed".

    Raises:
      ConfigError: `train.batch_size` has no topology.
    """
    batch = load_config(name).train.batch_size
    if batch not in TOPOLOGIES:
        raise ConfigError("train.batch_size", batch, f"one of {', '.join(map(str, TOPOLOGIES))}")
    command = [sys.executable, "-m", "dn_detr_jax", "preflight", f"--config={name}", "--nosuggest"]
    command += [f"--topology={TOPOLOGIES[batch]}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        try:
            done = subprocess.run(
                [*command, f"--json={out}"],
                cwd=ROOT,
                env=os.environ | FULL_TRACEBACKS,
                check=False,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not compiled within {seconds:.0f} s"}
        if not out.exists():  # a step that does not fit has a file, and status 1
            lines = done.stderr.strip().splitlines()
            return {"failed": lines[-1] if lines else f"ended with status {done.returncode}"}
        return _figures(json.loads(out.read_text()))


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record of the preflight with the number of collectives in place of their list."""
    figures = {k: v for k, v in record.items() if k not in ("chip", "cost", "roofline_seconds")}
    if cost := record.get("cost"):
        kinds = sorted({c["kind"] for c in cost["collectives"]})
        counts = {k: sum(c["count"] for c in cost["collectives"] if c["kind"] == k) for k in kinds}
        figures["cost"] = cost | {"collectives": counts}
    return figures


def add_missing(names: Iterable[str], changes: Mapping[str, str], path: Path, limit: float) -> None:
    """Compiles the configs without a line, and appends lines.

    Args:
      names: of configs.
      changes: texts by config key, for all configs.
      path: of the lines.
      limit: seconds for one config.
    """
    rows = list(read_json_lines(path)) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        config = load_config(name)
        settings = settings_of(config, changes)
        mark = fingerprint(config, settings)
        same = [row for row in rows if row["fingerprint"] == mark]
        if any(row["config"] == name for row in same):
            continue
        head = {"config": name, "settings": settings, "fingerprint": mark}
        head |= {"date": datetime.date.today().isoformat()}
        print(f"{name} ...", file=sys.stderr, flush=True)
        plan = same[0] | {"plan of": same[0]["config"]} if same else {}
        if not plan:
            plan = count_model(config) | compile_config(name, settings, limit)
        rows.append(plan | head)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(rows[-1])}\n")
        print(steps_table(rows[-1:]), file=sys.stderr, flush=True)


def count_model(config: ConfigDict) -> dict[str, float]:
    """Counts the parameters, and the operations of detecting objects in one image.

    The image fills the largest canvas. Nothing is compiled: jax counts in the program before any
    optimization. It is the program for GPUs, which has no loops, so that none of the sampled points
    is left out.
    """
    import jax
    import jax.numpy as jnp

    from dn_detr_jax.evaluation.detect import detect
    from dn_detr_jax.models.registry import abstract_params, build_model

    jax.config.update("jax_platforms", "cpu")
    config = config.copy_and_resolve_references()
    for key, value in FROM_DATA.items():
        section, name = key.split(".")
        config[section][name] = config[section][name] or value
    model = build_model(config.model)
    height, width = max(map(tuple, config.data.canvases), key=math.prod)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    function = jax.jit(lambda *arguments: detect(*arguments, model=model, config=config))
    params = abstract_params(model)
    lowered = function.trace(params, image, size).lower(lowering_platforms=("cuda",))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return {"parameters": parameters, "forward_flops": lowered.cost_analysis()["flops"]}


def models_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makes the Markdown table of parameters and multiply-adds, beside the published ones."""
    titles = ("config", "parameters", "published", "multiply-adds of detection", "published")
    cells = []
    for row in rows:
        if row["settings"].keys() - FROM_DATA:
            continue
        published = PUBLISHED.get(row["config"])
        flops, millions = (f"{published[0]} G", f"{published[1]} M") if published else ("", "")
        count = f"{row['forward_flops'] / 2e9:.4g} G"
        cells.append([f"`{row['config']}`", f"{row['parameters']:,}", millions, count, flops])
    return _markdown(titles, sorted(cells))


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makes the Markdown table of the training steps' plans, for one chip."""
    titles = (*("config", "chips", "memory, GiB", "operations", "accessed", "collectives", "sent"),)
    cells = []
    for row in rows:
        changed = [f"`{k}={v}`" for k, v in row["settings"].items() if k not in FROM_DATA]
        name = " ".join([f"`{row['config']}`", *changed])
        cells.append([name, *_plan_cells(row), *[""] * len(titles)][: len(titles)])
    return _markdown(titles, sorted(cells))


def _plan_cells(row: Mapping[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["failed"]]
    needed = "unknown" if row["bytes_needed"] is None else f"{row['bytes_needed'] / GIB:.2f}"
    if not row["fits"]:
        needed += f" of {row['bytes_usable'] / GIB:.2f}: does not fit"
    cells = [row["topology"], needed]
    if not (cost := row.get("cost")):
        return cells
    kinds = ", ".join(f"{count} {kind}" for kind, count in cost["collectives"].items())
    flops, traffic = quantity(cost["flops"], "FLOP"), quantity(cost["bytes_accessed"], "B")
    return [*cells, flops, traffic, kinds, quantity(cost["bytes_sent"], "B")]


def _markdown(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *lines])


TABLES = {"models": models_table, "steps": steps_table}


def write_report(document: Path, path: Path) -> None:
    """Replaces the tables of a document.

    Raises:
      DataError: the document has no place for one, or an unknown one, or there are no plans.
    """
    rows = list(read_json_lines(path)) if path.exists() else []
    if not rows:
        raise DataError(f"{path}: no plans")

    def replaced(match: re.Match[str]) -> str:
        if (name := match[1]) not in TABLES:
            raise DataError(f"{document}: no table {name!r}; tables: {', '.join(TABLES)}")
        return f"<!-- config_plans: {name} -->\n{TABLES[name](rows)}\n<!-- end -->"

    pattern = r"<!-- config_plans: (\S+) -->\n.*?<!-- end -->"
    text = document.read_text(encoding="utf-8")
    text, found = re.subn(pattern, replaced, text, flags=re.DOTALL)
    if not found:
        raise DataError(f"{document}: no line <!-- config_plans: TABLE --> before an <!-- end -->")
    write_text_atomically(document, text)


def parse_changes(texts: Iterable[str]) -> dict[str, str]:
    """Returns the texts of KEY=VALUE by key; ConfigError for a text without "="."""
    for text in texts:
        if "=" not in text:
            raise ConfigError("--set", text, "KEY=VALUE")
    return dict(text.split("=", 1) for text in texts)


def chosen_configs(only: str) -> list[str]:
    """Returns the names of the configs that match a regular expression.

    Raises:
      ConfigError: it is malformed, or matches none.
    """
    try:
        names = [name for name in experiment_names() if re.search(only, name)]
    except re.error as error:
        raise ConfigError("--only", only, f"a regular expression: {error}") from None
    if not names:
        raise ConfigError("--only", only, "a pattern of the name of a config")
    return names


def main(argv: Sequence[str]) -> None:
    """Compiles what is missing, or writes the report."""
    del argv
    path = Path(FLAGS.rows)
    if FLAGS.report:
        write_report(Path(FLAGS.report), path)
        return
    add_missing(chosen_configs(FLAGS.only), parse_changes(FLAGS.set), path, FLAGS.timeout)


if __name__ == "__main__":
    flags.DEFINE_string("only", "", "Regular expression for the names of configs; empty: all.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE of the configs; several by repeating the flag.")
    flags.DEFINE_float("timeout", 1800, "Seconds for one config.")
    define_path_flag("rows", "File of the plans, one a line.")
    define_path_flag("report", "Document whose table is written.")
    FLAGS.set_default("rows", str(ROWS))
    run_main(main)
