"""Shows how the cost of the training step grows with the number of devices, for TPUs.

    python -m benchmarks.scaling --config configs/coco_r50.py --config.model.dtype=bfloat16 \\
        --json scaling.json --plot docs/images/scaling.png

The benchmark compiles the training step for each of `--topologies` with the same number of images
per device. It needs no TPU, but `pip install "jax[tpu]"` (see dn_detr_jax/preflight). It prints a
table in Markdown; the JSON has all figures of the preflight, and is written after each topology.
Each topology takes minutes; `--resume` reuses those of the JSON file.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
from absl import flags
from ml_collections import config_flags

from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.preflight import run_preflight, versions
from dn_detr_jax.preflight.report import memory_text, quantity

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.")
flags.DEFINE_list("topologies", ["v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16"], "To compile for.")
flags.DEFINE_integer("batch_per_device", 2, "Images per device.", lower_bound=1)
flags.DEFINE_string("json", None, "File to write all figures to.")
flags.DEFINE_bool("resume", False, "Reuse the topologies in the JSON file.")
flags.DEFINE_string("plot", None, "File to draw the figure into.")
flags.mark_flag_as_required("config")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row for each topology."""
    names = ["devices", "memory", "operations", "memory traffic", "collectives", "sent"]
    names += ["least time", "collectives alone", "images per second, at most"]
    rows = [names, ["---"] * len(names)]
    for record in records:
        cost, bound = record["cost"], record["roofline_seconds"]
        fields = ("compute", "memory", "collectives")
        rate = record["devices"] * record["batch_per_device"] / max(bound[f] for f in fields)
        rows.append(
            [
                f"{record['devices']}",
                memory_text(record["bytes_needed"]),
                quantity(cost["flops"], "FLOP"),
                quantity(cost["main_memory"], "B"),
                f"{sum(c['count'] for c in cost['collectives'])}",
                quantity(cost["bytes_sent"], "B"),
                f"{quantity(bound[bound['bound']], 's')} ({bound['bound']})",
                quantity(bound["collectives"], "s"),
                f"{rate:,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws bytes per device and least times by number of devices, on logarithmic axes."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    devices = [record["devices"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    series = {
        "memory traffic": [r["cost"]["main_memory"] for r in records],
        "memory needed": [r["bytes_needed"] for r in records],
        "sent to other devices": [r["cost"]["bytes_sent"] for r in records],
    }
    for name, values in series.items():
        left.plot(devices, [v / 1e9 or None for v in values], marker="o", label=name)
    left.set_title("GB per device and step")
    for name in ("memory", "compute", "collectives"):
        values = [r["roofline_seconds"][name] * 1e3 or None for r in records]
        right.plot(devices, values, marker="o", label=name)
    right.set_title(f"least time of a step on {records[0]['chip']['name']}, ms")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(devices, [str(n) for n in devices])
        axes.set_xlabel("devices")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _recorded() -> list[dict[str, Any]]:
    """Returns the records of an earlier run with the same options, with `--resume`."""
    if not (FLAGS.resume and FLAGS.json and Path(FLAGS.json).exists()):
        return []
    wanted = (FLAGS.batch_per_device, FLAGS.config.model.dtype, versions())
    records = json.loads(Path(FLAGS.json).read_text(encoding="utf-8"))
    return [r for r in records if (r["batch_per_device"], r["dtype"], r["versions"]) == wanted]


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    records = []
    done = {record["topology"]: record for record in _recorded()}
    for topology in FLAGS.topologies:
        if topology in done:
            records.append(done[topology])
            continue
        print(f"compiling for {topology} ...", file=sys.stderr, flush=True)
        result = run_preflight(FLAGS.config, topology, FLAGS.batch_per_device)
        if result.cost is None or result.chip is None:
            raise PreflightError(f"{topology}: the step does not fit, or the chip is unknown")
        records.append(result.record())
        if FLAGS.json:
            Path(FLAGS.json).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    print(table(records))
    if FLAGS.plot:
        draw(records, Path(FLAGS.plot))


if __name__ == "__main__":
    run_main(main)
