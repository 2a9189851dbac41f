"""The study's tables and figures from stored metrics, and trainings that are skipped or kept."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import study
from dn_detr_jax.config import load_config, validate
from dn_detr_jax.errors import ConfigError, DataError
from dn_detr_jax.files import read_json_lines
from dn_detr_jax.training.setup import Plan

STEPS = (250, 500, 750)


def write(results, row, finals, instability=2.0):
    """Writes metrics of one seed for each final AP, which is reached linearly."""
    for seed, final in enumerate(finals):
        path = study.result_file(row, seed, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"row": row}]
        for step in STEPS:
            line = {"step": step, "eval/AP": final * step / STEPS[-1], "eval/AP50": final + 0.1}
            if step > STEPS[0]:
                line["eval/instability"] = instability + seed
                if instability > 1:
                    line["eval/instability_layer_1"] = 5.0 + seed
            lines.append(line)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_has_means_ranges_and_what_exceeds_the_spread(tmp_path):
    """Catches a difference of the wrong sign, a spread of one seed, and a wrong first step."""
    write(tmp_path, "none", [0.2, 0.25, 0.3])
    write(tmp_path, "dn", [0.6, 0.5, 0.7], instability=1.0)
    write(tmp_path, "groups_1", [0.28, 0.5])
    table = study.Table(("none", "dn", "groups_1", "groups_3"))
    curves = {row: study.read_curves(row, tmp_path) for row in table.rows[:3]}
    assert study.read_curves("groups_3", tmp_path) is None
    head, _, *rows = study.render_table(table, curves).splitlines()
    assert head.endswith("| IS | IS by layer | steps to AP 0.250 |")
    assert rows == [
        "| `none` | 3 | 0.250 (0.200 to 0.300) |  |  | 3.00 (2.00 to 4.00) | 6.00 / 3.00 | 750 |",
        "| `dn` | 3 | 0.600 (0.500 to 0.700) | +0.350 | yes | 2.00 (1.00 to 3.00) |  | 500 |",
        "| `groups_1` | 2 | 0.390 (0.280 to 0.500) | +0.140 | no | 2.50 (2.00 to 3.00) | "
        "5.50 / 2.50 | 500 |",
    ]
    with_ap50 = study.render_table(dataclasses.replace(table, ap50=True), curves)
    assert with_ap50.splitlines()[3].startswith(
        "| `dn` | 3 | 0.600 (0.500 to 0.700) | +0.350 | yes | 0.700 (0.600 to 0.800) | 2.00 ("
    )
    write(tmp_path, "groups_10", [0.9])
    alone = study.render_table(
        table, curves | {"groups_3": study.read_curves("groups_10", tmp_path)}
    )
    assert "| +0.650 | one seed has none |" in alone
    with pytest.raises(DataError, match="none: no metrics"):
        study.render_table(table, {"dn": curves["dn"]})


def test_a_report_replaces_marked_tables_alone(tmp_path):
    write(tmp_path, "none", [0.2, 0.3])
    write(tmp_path, "dn", [0.6, 0.5])
    document = tmp_path / "docs" / "evidence.md"
    document.parent.mkdir()
    text = "# A\n<!-- study: denoising -->\n<!-- end -->\nkept\n"
    document.write_text(text)
    assert study.write_report(document, tmp_path) == ["denoising"]
    once = document.read_text()
    assert "| `dn` | 2 | 0.550" in once and once.endswith("<!-- end -->\nkept\n")
    study.write_report(document, tmp_path)
    assert document.read_text() == once
    with Image.open(document.parent / "images" / "study_denoising.png") as image:
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 10
    document.write_text(text.replace("denoising", "nonsense"))
    with pytest.raises(DataError, match="no table 'nonsense'; tables: denoising, schedules"):
        study.write_report(document, tmp_path)


def test_seeds_of_other_lengths_are_refused(tmp_path):
    write(tmp_path, "dn", [0.5, 0.6])
    path = study.result_file("dn", 1, tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="different steps"):
        study.read_curves("dn", tmp_path)


def test_a_training_is_kept_and_not_repeated(tmp_path, monkeypatch):
    """Catches a training that is run twice, one whose failure is kept, and mixed settings."""
    commands = []

    def run(command, **_):
        commands.append(command)
        workdir = tmp_path / "runs" / "dn" / "seed_1"
        workdir.mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": 50, "train/loss": 5.0, "train/grad_norm": 1.0},
            {"step": last, "eval/AP": 0.1, "eval/AR100": 0.5},
            {"step": 300, "train/loss": 4.0},
            {"step": last, "eval/AP": 0.123456789},
        ]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(study.subprocess, "run", run)
    status, last = 1, 750
    arguments = ("dn", 1, "digits", tmp_path / "runs", tmp_path / "kept")
    with pytest.raises(DataError, match="dn, seed 1: the training ended with status 1"):
        study.train(*arguments)
    status, last = 0, 675  # a signal: the training has saved, and ends without an error
    with pytest.raises(DataError, match="dn, seed 1: interrupted"):
        study.train(*arguments)
    (tmp_path / "runs" / "dn" / "seed_1" / "metrics.jsonl").unlink()
    last = 750
    study.train(*arguments)
    study.train(*arguments)
    assert len(commands) == 3 and commands[0][0] == sys.executable
    assert {"--config=digits", "--config.dn.groups=5", "--config.seed=1"} <= set(commands[0])
    head, *lines = map(json.loads, study.result_file("dn", 1, tmp_path / "kept").open())
    assert head["row"] == "dn" and head["settings"]["dn.box_noise"] == 0.4
    assert lines == [{"step": 750, "train/loss": 4.0, "eval/AP": 0.12346}]
    monkeypatch.setitem(study.ROWS, "dn", {"dn.box_noise": 0.5})
    with pytest.raises(DataError, match="made with other settings"):
        study.train(*arguments)


@pytest.mark.parametrize("row", [*study.ROWS, *study.FAMILY, *study.CONFIGS])
def test_every_row_is_a_right_config(row):
    """Catches a misspelled key hours into a study; `update` refuses unknown keys."""
    config = load_config((study.FAMILY | study.CONFIGS).get(row, ("digits_quick", {}))[0])
    config.update_from_flattened_dict(study.settings(row))
    validate(config)
    images = 6000 if config.data.name == "digits" else 56
    assert Plan.of(config, images).total == study.last_step(row)


def test_kept_metrics_are_of_the_settings_of_their_rows():
    """Catches settings that changed after the trainings whose metrics the documents show."""
    kept = sorted(study.RESULTS.glob("*/seed_*.jsonl"))
    assert kept
    for path in kept:
        head, *lines = read_json_lines(path)
        assert lines[-1]["step"] == study.last_step(path.parent.name)
        values = study.settings(path.parent.name) | {"seed": int(path.stem.removeprefix("seed_"))}
        assert head["settings"] == json.loads(json.dumps(values))


def test_every_table_has_known_rows_and_every_row_a_table():
    named = {row for table in study.TABLES.values() for row in table.rows}
    assert named == {*study.ROWS, *study.FAMILY, *study.CONFIGS}
    every = {*study.ROWS, *study.FAMILY, "digits", "digits_deformable", "digits_quick"}
    assert set(study.chosen_rows("")) == every
    assert study.chosen_rows("^trees") == list(study.TREES)
    assert study.chosen_rows("^groups") == ["groups_1", "groups_3", "groups_10"]
    with pytest.raises(ConfigError, match="--only"):
        study.chosen_rows("nothing")
