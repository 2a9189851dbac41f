"""The study: what each part of denoising is worth on scenes of digits, over several seeds.

    python -m benchmarks.study                                  # trains what is missing
    python -m benchmarks.study --only '^(dn|none)$' --seeds 0,1,2,3,4
    python -m benchmarks.study --only '^trees'                  # after `make trees`
    python -m benchmarks.study --report docs/evidence.md        # no training

A row is one setting; it differs from the row `dn` in the named config keys alone. Every row is
trained with every seed, for the same number of steps. The rows of `FAMILY` are other variants.
Those of `CONFIGS` are whole configs with their own schedules. Those of `TREES` are trained only if
`--only` matches them.

A finished training leaves its metrics in `benchmarks/study/ROW/seed_N.jsonl`: the settings in the
first line, then a line for each evaluation. The command can be interrupted at any time: finished
trainings are skipped, and the others resume from their checkpoints. A training uses all cores that
the process may use; on Linux, `taskset --cpu-list 0` in front of the command, and other seeds with
another core, use them better.

`--report` makes all tables and figures from these files. In the document, a table stands between
the lines `<!-- study: NAME -->` and `<!-- end -->`, and is replaced; figures are written to
`images/study_NAME.png` beside it.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import dn_detr_jax
from benchmarks.common import ROOT, positive
from dn_detr_jax.commands.command_line import define_path_flag, run_main
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.files import read_json_lines

FLAGS = flags.FLAGS
RESULTS = ROOT / "benchmarks" / "study"
EARLIER_LAYERS = tuple(f"eval/instability_layer_{number}" for number in range(1, 6))
KEPT = (
    *("eval/AP", "eval/AP50", "eval/instability", *EARLIER_LAYERS),
    *("train/loss", "train/loss_ce", "train/dn_loss_ce"),
)
# Equal for all rows. Of `digits_quick`, whose schedule ends with the training.
COMMON = {
    "train.duration": "750 steps",
    "train.eval_every": "75 steps",
    "train.checkpoint_every": "150 steps",
    "eval.pictures": 0,
}
# Label noise 0.2 is that of the paper; the configs of the digits have 0.5.
DN = {"dn.groups": 5, "dn.label_noise": 0.2, "dn.box_noise": 0.4}
ROWS: dict[str, dict[str, Any]] = {
    "dn": {},
    "none": {"dn.groups": 0},
    "dn_450_steps": {"train.duration": "450 steps"},
    **{f"groups_{n}": {"dn.groups": n} for n in (1, 3, 10)},
    **{f"box_{n}": {"dn.box_noise": n} for n in (0.0, 0.2, 0.8)},
    "box_center": {"dn.box_parts": "center"},
    "box_size": {"dn.box_parts": "size"},
    **{f"label_{n}": {"dn.label_noise": n} for n in (0.0, 0.5, 0.8, 1.0)},
    "label_off": {"dn.label_denoising": False},
    "mask_off": {"dn.mask": False},
    "indicator_off": {"model.indicator": False},
    "contrastive": {"dn.contrastive": True},
    "normal": {"dn.box_distribution": "normal"},
    "truncated_normal": {"dn.box_distribution": "truncated_normal"},
    "box_by_group": {"dn.box_noise_by_group": (0.1, 0.7)},
    "label_by_group": {"dn.label_noise_by_group": (0.0, 0.8)},
    "paper_layout": {"dn.layout": "paper"},
    "few_slots": {"dn.slots": 12},
}
# Rows of other configs. One level learns slower, in cheaper steps: AP is 0.03 at step 750 of 1,500.
_ONE_LEVEL = {
    "train.duration": "3000 steps",
    "train.eval_every": "300 steps",
    "train.checkpoint_every": "600 steps",
}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "dab_dn": ("digits", _ONE_LEVEL),
    "dab_none": ("digits", _ONE_LEVEL | {"dn.groups": 0}),
    "dino_dn": ("digits_dino", {}),
    "dino_none": ("digits_dino", {"dn.groups": 0}),
}
# Configs that are compared as they are, but for a few values; with the steps of their schedules.
CONFIGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "digits": ("digits", {}, 3000),
    "digits_deformable": ("digits_deformable", {}, 1500),
    "digits_quick": ("digits_quick", {}, 1350),
}
# The same on photographs, whose data and weights `make trees` fetches: trained only if named.
_FRESH = {
    "init.backbone": "",
    "model.backbone.frozen_stages": -1,
    "optimizer.lr_multipliers": (),
}
TREES = {
    "trees": ("trees", {}, 1200),
    "trees_none": ("trees", {"dn.groups": 0}, 1200),
    "trees_fresh": ("trees", _FRESH, 1200),
    "trees_fresh_none": ("trees", _FRESH | {"dn.groups": 0}, 1200),
}
CONFIGS |= TREES


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the document, and its figure.

    Attributes:
      rows: names, the one that the others are compared with first.
      figure: whether AP and instability by step are drawn.
      ap50: whether it has a column of AP50.
    """

    rows: tuple[str, ...]
    figure: bool = False
    ap50: bool = False


TABLES = {
    "denoising": Table(("none", "dn"), figure=True),
    "schedules": Table(("none", "dn_450_steps")),
    "dab": Table(("dab_none", "dab_dn"), figure=True),
    "dino": Table(("dino_none", "dino_dn"), figure=True),
    "groups": Table(("dn", "groups_1", "groups_3", "groups_10")),
    "box_noise": Table(("dn", "box_0.0", "box_0.2", "box_0.8", "box_center", "box_size")),
    "label_noise": Table(("dn", "label_0.0", "label_0.5", "label_0.8", "label_1.0", "label_off")),
    "ablations": Table(("dn", "mask_off", "indicator_off"), figure=True),
    "questions": Table(
        (
            *("dn", "contrastive", "normal", "truncated_normal"),
            *("box_by_group", "label_by_group"),
        )
    ),
    "layouts": Table(("dn", "paper_layout", "few_slots")),
    "variants": Table(("digits", "digits_deformable", "digits_quick"), figure=True),
    "trees": Table(
        ("trees_none", "trees", "trees_fresh_none", "trees_fresh"), figure=True, ap50=True
    ),
}


def settings(row: str) -> dict[str, Any]:
    """Returns the config values of a row by key, without the seed."""
    if row in TREES:
        return CONFIGS[row][1]
    if row in CONFIGS:
        return {"train.eval_every": "250 steps"} | CONFIGS[row][1]
    if row in FAMILY:
        return COMMON | DN | FAMILY[row][1]
    return COMMON | DN | ROWS[row]


def last_step(row: str) -> int:
    """Returns the number of steps of a training of a row."""
    return CONFIGS[row][2] if row in CONFIGS else int(settings(row)["train.duration"].split()[0])


def result_file(row: str, seed: int, results: Path | None = None) -> Path:
    """Returns the file with the metrics of a training."""
    return (results or RESULTS) / row / f"seed_{seed}.jsonl"


def train(row: str, seed: int, config: str, runs: Path, results: Path | None = None) -> None:
    """Trains a row with a seed unless its metrics are there, and keeps them.

    Args:
      row: name.
      seed: of the training.
      config: experiment that the row changes, unless the row names its own.
      runs: folder of the work directories.
      results: folder of the kept metrics.

    Raises:
      DataError: the metrics are of other settings, or the training failed or was interrupted.
    """
    kept = result_file(row, seed, results)
    values, config = settings(row) | {"seed": seed}, (FAMILY | CONFIGS).get(row, (config,))[0]
    head = {"row": row, "config": config, "settings": values}
    head = json.loads(json.dumps(head))  # tuples become lists, as in the file
    if kept.exists():
        made = next(iter(read_json_lines(kept)), {})
        if any(made.get(key) != value for key, value in head.items()):
            raise DataError(f"{kept}: made with other settings; delete it to train the row again")
        return
    workdir = runs / row / f"seed_{seed}"
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
    start = time.monotonic()
    done = subprocess.run([*command, *overrides], cwd=ROOT, check=False)
    if done.returncode:
        raise DataError(f"{row}, seed {seed}: the training ended with status {done.returncode}")
    found = evaluations(workdir / "metrics.jsonl")
    if not found or found[-1]["step"] != last_step(row):
        raise DataError(f"{row}, seed {seed}: interrupted; the same command continues")
    head |= {"version": dn_detr_jax.__version__, "seconds": round(time.monotonic() - start)}
    lines = [head, *found]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def evaluations(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file with an evaluation, each with the last training metrics.

    Args:
      path: `metrics.jsonl` of a work directory. Of a step that was written twice, as after a
        restart, the last line counts.
    """
    by_step: dict[int, dict[str, float]] = {}
    last: dict[str, float] = {}
    for line in read_json_lines(path):
        found = {key: round(line[key], 5) for key in KEPT if key in line}
        last |= {key: value for key, value in found.items() if key.startswith("train/")}
        if "eval/AP" in found:
            by_step[line["step"]] = {"step": line["step"], **last, **found}
    return [by_step[step] for step in sorted(by_step)]


@dataclasses.dataclass(frozen=True)
class Curves:
    """The metrics of all seeds of a row.

    Attributes:
      steps: int [T] of the evaluations.
      values: float [seeds, T] by name; NaN where a metric is missing.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]

    def final(self, name: str) -> np.ndarray:
        """Returns the values [seeds] of the last evaluation."""
        return self.values[name][:, -1]

    def instability_by_layer(self) -> list[float]:
        """Returns the mean of the last evaluation for each layer; empty if a seed lacks them."""
        earlier = [self.final(name).mean() for name in EARLIER_LAYERS]
        known = [float(value) for value in earlier if not np.isnan(value)]
        return [*known, float(self.final("eval/instability").mean())] if known else []

    def reached(self, value: float) -> int | None:
        """Returns the first step with a mean AP of at least `value`; None if there is none."""
        above = self.values["eval/AP"].mean(axis=0) >= value
        return int(self.steps[np.argmax(above)]) if above.any() else None


def read_curves(row: str, results: Path | None = None) -> Curves | None:
    """Reads the metrics of all seeds of a row; None if there are none.

    Raises:
      DataError: the seeds were evaluated at different steps.
    """
    folder = (results or RESULTS) / row
    runs = [list(read_json_lines(path))[1:] for path in sorted(folder.glob("seed_*.jsonl"))]
    if not runs:
        return None
    steps = [[line["step"] for line in run] for run in runs]
    if any(other != steps[0] for other in steps):
        raise DataError(f"{folder}: the seeds were evaluated at different steps")
    values = {
        name: np.array([[line.get(name, np.nan) for line in run] for run in runs]) for name in KEPT
    }
    return Curves(np.array(steps[0]), values)


def render_table(table: Table, curves: Mapping[str, Curves]) -> str:
    """Makes the Markdown table of the rows that have metrics.

    A value is the mean over the seeds, with the least and the greatest. A difference from the first
    row counts as larger than the spread if the ranges of the two do not overlap.

    Raises:
      DataError: the first row has no metrics.
    """
    first = curves.get(table.rows[0])
    if first is None:
        raise DataError(f"{table.rows[0]}: no metrics to compare the other rows with")
    base = first.final("eval/AP")
    by_layer = any(own.instability_by_layer() for own in curves.values())
    titles = ["row", "seeds", "AP", "difference", "larger than the spread"]
    titles += [*(["AP50"] if table.ap50 else []), "IS"]
    titles += [*(["IS by layer"] if by_layer else []), f"steps to AP {base.mean():.3f}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in table.rows:
        if name not in curves:
            continue
        own = curves[name]
        ap = own.final("eval/AP")
        apart = "yes" if ap.min() > base.max() or ap.max() < base.min() else "no"
        if min(len(ap), len(base)) < 2:
            apart = "one seed has none"
        same = name == table.rows[0]
        cells = [
            f"`{name}`",
            str(len(ap)),
            _spread(ap, 3),
            "" if same else f"{ap.mean() - base.mean():+.3f}",
            "" if same else apart,
            *([_spread(own.final("eval/AP50"), 3)] if table.ap50 else []),
            _spread(own.final("eval/instability"), 2),
            *([" / ".join(f"{x:.2f}" for x in own.instability_by_layer())] if by_layer else []),
            str(own.reached(base.mean()) or "not reached"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, digits: int) -> str:
    low, mean, high = (f"{x:.{digits}f}" for x in (values.min(), values.mean(), values.max()))
    return f"{mean} ({low} to {high})"


def render_figure(curves: Mapping[str, Curves]) -> np.ndarray:
    """Draws AP and instability by step: means as lines, least to greatest as bands; RGB uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dn_detr_jax.visualize.colors import BY_RUN

    figure = Figure(figsize=(10.4, 3.9), dpi=100, layout="constrained")
    panels = (("eval/AP", "AP"), ("eval/instability", "instability, changes per image"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for color, (name, own) in zip(BY_RUN, curves.items(), strict=False):
            present = ~np.isnan(own.values[key]).any(axis=0)
            steps, values = own.steps[present], own.values[key][:, present]
            axes.plot(steps, values.mean(axis=0), color=color, label=name)
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.25, linewidth=0
            )
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_report(document: Path, results: Path | None = None) -> list[str]:
    """Replaces the tables of a document and writes its figures.

    Returns:
      The names of the tables that were written.

    Raises:
      DataError: the document names an unknown table, or one without metrics.
    """
    from dn_detr_jax.visualize.save import save_png

    written: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise DataError(f"{document}: no table {name!r}; tables: {', '.join(TABLES)}")
        table = TABLES[name]
        found = {row: read_curves(row, results) for row in table.rows}
        curves = {row: own for row, own in found.items() if own is not None}
        text = render_table(table, curves)
        if table.figure:
            save_png(render_figure(curves), document.parent / "images" / f"study_{name}.png")
            text += f"\n\n![AP and instability by step](images/study_{name}.png)"
        written.append(name)
        return f"<!-- study: {name} -->\n{text}\n<!-- end -->"

    pattern = r"<!-- study: (\S+) -->\n.*?<!-- end -->"
    text = re.sub(pattern, replaced, document.read_text(encoding="utf-8"), flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")
    return written


def chosen_rows(only: str) -> list[str]:
    """Returns the rows whose names match a regular expression; all but `TREES` for an empty one.

    Raises:
      ConfigError: it is malformed, or matches none.
    """
    known = (*ROWS, *FAMILY, *CONFIGS)
    try:
        rows = [row for row in known if re.search(only, row) and (only or row not in TREES)]
    except re.error as error:
        raise ConfigError("--only", only, f"a regular expression: {error}") from None
    if not rows:
        raise ConfigError("--only", only, f"a pattern of one of {', '.join(known)}")
    return rows


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, or writes the report."""
    del argv
    if FLAGS.report:
        names = write_report(Path(FLAGS.report))
        print(f"{FLAGS.report}: {', '.join(names) or 'no table'}")
        return
    seeds = [0 if text == "0" else positive("--seeds", text) for text in FLAGS.seeds]
    for seed in seeds:  # all rows of a seed first, so that an interrupted study has whole tables
        for row in chosen_rows(FLAGS.only):
            train(row, seed, FLAGS.experiment, Path(FLAGS.runs).absolute())


if __name__ == "__main__":
    flags.DEFINE_string(
        "only", "", "Regular expression for the names of rows; empty: all on digits."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, several by commas.")
    flags.DEFINE_string("experiment", "digits_quick", "Name of the config that the rows change.")
    define_path_flag("runs", "Folder of the work directories.")
    define_path_flag("report", "Document whose tables and figures are written.")
    FLAGS.set_default("runs", "runs/study")
    run_main(main)
