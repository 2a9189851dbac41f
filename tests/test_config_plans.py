"""The table of the configs' plans: what is compiled, what is taken over, and what a row says."""

import json
import subprocess

import pytest

from benchmarks import config_plans
from dn_detr_jax.config import load_config
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.files import read_json_lines

RECORD = {
    "topology": "v5e:4x4",
    "parameters": 43694977,
    "fits": True,
    "bytes_needed": 3 * 2**30,
    "bytes_usable": 15.75 * 2**30,
    "chip": {"name": "TPU v5e"},
    "cost": {
        "flops": 1.27e12,
        "bytes_accessed": 53.6e9,
        "bytes_sent": 2e6,
        "collectives": [
            {"kind": "all-reduce", "count": 2},
            {"kind": "all-gather", "count": 1},
            {"kind": "all-reduce", "count": 3},
        ],
    },
}


@pytest.fixture
def preflight(monkeypatch):
    """Replaces the preflight's process; returns its commands, and what it writes or raises."""
    state = {"commands": [], "record": RECORD, "error": None}
    counted = {"parameters": 43694977, "forward_flops": 215.484e9}
    monkeypatch.setattr(config_plans, "count_model", lambda config: counted)

    def run(command, **options):
        state["commands"].append(command)
        if state["error"]:
            raise state["error"]
        if state["record"]:
            out = next(a for a in command if a.startswith("--json=")).removeprefix("--json=")
            with open(out, "w") as file:
                json.dump(state["record"], file)
        return subprocess.CompletedProcess(command, 1, "", "a log line\nerror: the reason\n")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_a_plan_is_made_once_and_taken_over_by_another_schedule(tmp_path, preflight):
    """Catches a config that is compiled again after a stop, and a plan of another model."""
    path = tmp_path / "plans.jsonl"
    names = ["coco_deformable_r50_24ep", "coco_deformable_r50_50ep"]
    config_plans.add_missing(names[:1], {}, path, 10)
    config_plans.add_missing(names, {}, path, 10)
    config_plans.add_missing(["coco_r50"], {}, path, 10)
    config_plans.add_missing(["coco_r50"], {"model.remat": "('encoder',)"}, path, 10)
    assert [c[4] for c in preflight["commands"]] == [
        "--config=coco_deformable_r50_24ep",
        "--config=coco_r50",
        "--config=coco_r50",
    ]
    assert all("--topology=v5e:4x4" in command for command in preflight["commands"])
    assert "--config.model.remat=('encoder',)" in preflight["commands"][-1]
    rows = list(read_json_lines(path))
    assert [row["config"] for row in rows] == [*names, "coco_r50", "coco_r50"]
    assert rows[1]["plan of"] == names[0] and rows[1]["cost"] == rows[0]["cost"]
    assert rows[0]["cost"]["collectives"] == {"all-gather": 1, "all-reduce": 5}
    assert "plan of" not in rows[2]


def test_what_the_data_says_is_given_and_the_batch_finds_its_chips(tmp_path, preflight):
    """Catches `finetune`, whose classes the preflight can't read, and a wrong slice."""
    config_plans.add_missing(["finetune"], {}, tmp_path / "plans.jsonl", 10)
    (command,) = preflight["commands"]
    assert "--topology=v5e:2x4" in command
    assert "--config.model.num_classes=91" in command
    assert "--config.data.max_objects=100" in command


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "error: the reason"),
        (subprocess.TimeoutExpired("preflight", 10), "not compiled within 10 s"),
    ],
)
def test_a_failure_is_a_row(tmp_path, preflight, error, reason):
    """Catches a config without a plan that vanishes from the table."""
    preflight.update(record=None, error=error)
    path = tmp_path / "plans.jsonl"
    config_plans.add_missing(["digits"], {}, path, 10)
    (row,) = read_json_lines(path)
    assert config_plans.steps_table([row]).splitlines()[-1].startswith(f"| `digits` | {reason} |")


def test_the_tables_of_a_document_are_replaced(tmp_path):
    """Catches wrong units, a step that seems to fit, and text of the document that is lost."""
    row = RECORD | {"config": "coco_r50", "settings": {}, "fingerprint": "0"}
    row |= {"forward_flops": 215.484e9}
    row["cost"] = RECORD["cost"] | {"collectives": {"all-reduce": 5}}
    large = RECORD | {"fits": False, "bytes_needed": 20 * 2**30, "cost": None}
    large |= {"config": "coco_r50", "settings": {"model.dtype": "float32"}}
    path, document = tmp_path / "plans.jsonl", tmp_path / "models.md"
    text = "<!-- config_plans: models -->\nold\n<!-- end -->\nbetween\n"
    text += "<!-- config_plans: steps -->\n<!-- end -->\nafter\n"
    document.write_text(text)
    with pytest.raises(DataError, match="no plans"):
        config_plans.write_report(document, path)
    path.write_text("".join(json.dumps(r) + "\n" for r in (large, row)))
    config_plans.write_report(document, path)
    lines = document.read_text().splitlines()
    assert lines[3:6] == [
        "| `coco_r50` | 43,694,977 | 44 M | 107.7 G | 94 G |",
        "<!-- end -->",
        "between",
    ]
    assert lines[-4:] == [
        "| `coco_r50` | v5e:4x4 | 3.00 | 1.27 TFLOP | 53.6 GB | 5 all-reduce | 2 MB |",
        "| `coco_r50` `model.dtype=float32` | v5e:4x4 | 20.00 of 15.75: does not fit |  |  |  |  |",
        "<!-- end -->",
        "after",
    ]
    document.write_text("no place\n")
    with pytest.raises(DataError, match="no line <!-- config_plans"):
        config_plans.write_report(document, path)


def test_wrong_arguments_are_named():
    """Catches a traceback in place of one line, and a pattern that compiles nothing."""
    with pytest.raises(ConfigError, match=r"--set.*KEY=VALUE"):
        config_plans.parse_changes(["model.remat"])
    for only, expected in (("[", "a regular expression"), ("coco_r49", "the name of a config")):
        with pytest.raises(ConfigError, match=rf"--only.*{expected}"):
            config_plans.chosen_configs(only)


def test_a_change_of_the_model_has_a_plan_of_its_own():
    """Catches a plan that is taken over from a config of another size."""
    plain, config = load_config("digits"), load_config("digits")
    config.train.duration = "9 epochs"
    assert config_plans.fingerprint(config, {}) == config_plans.fingerprint(plain, {})
    config.train.batch_size = 16
    assert config_plans.fingerprint(config, {}) != config_plans.fingerprint(plain, {})
