"""The package against stored numbers of the official PyTorch DN-DETR.

The whole detector is compiled once for evaluation and once for training; all tests read one report.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fast_jit
import jax
import numpy as np
import pytest

from dn_detr_jax.commands import check_reference
from dn_detr_jax.config import base_config
from dn_detr_jax.errors import UnsupportedCase
from dn_detr_jax.interop.convert import flat
from dn_detr_jax.interop.names.dn_dab_detr import NAMES
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.parity import check_evaluation, check_training, reference
from dn_detr_jax.parity.check import check
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.prepared import prepare

DATA = Path(__file__).parent / "data" / "reference"
# Most clipped gradients are near AdamW's epsilon, so that updates amplify rounding; single draws of
# such noise differ by more than a factor of 5.
AMPLIFIED = (
    "steps.total_loss[1]",
    "steps.total_loss[2]",
    "step1.param_sample",
    "step1.update_norm",
)


@pytest.fixture(scope="module")
def components():
    """Returns the output of the command, in a process that does not optimize the programs."""
    environment = os.environ | {"PYTHONPATH": str(DATA.parents[2])}
    path = DATA / "components.npz"
    command = [sys.executable, "-m", "dn_detr_jax", "check-reference", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    printed = json.loads(done.stdout)
    assert done.returncode == (0 if printed["ok"] else 1)
    return SimpleNamespace(
        entries=printed["results"], left_out=printed["left_out"], case=reference.Case(path)
    )


@pytest.fixture(scope="module")
def run():
    """Compiles the whole detector once; returns it with its results for the case."""
    prepared = prepare(reference.Case(DATA / "dn_dab_detr_r50.npz"))
    prepared.compiler_options = fast_jit.OPTIONS
    with jax.default_matmul_precision("highest"):
        evaluation = check_evaluation.run(prepared)
        return SimpleNamespace(
            prepared=prepared, evaluation=evaluation, steps=check_training.run_steps(prepared)
        )


def compare(run, case, training=True):
    """Returns the report on the results of `run` against its case, or a changed copy of it."""
    prepared = dataclasses.replace(run.prepared, case=case)
    report = Report(case)
    check_evaluation.compare(report, prepared, *run.evaluation)
    if training:
        check_training.compare(report, prepared, run.steps)
    return report


@pytest.fixture(scope="module")
def detector(run):
    return compare(run, run.prepared.case)


def of(report, *prefixes):
    entries = {k: v for k, v in report.entries.items() if k.startswith(prefixes)}
    assert entries, f"the report has nothing on {prefixes}"
    return entries


def assert_ok(entries):
    assert {name: entry for name, entry in entries.items() if not entry["ok"]} == {}


@pytest.mark.smoke
def test_components(components):
    assert_ok(components.entries)


def test_all_components_are_compared(components):
    """Catches a case that is silently skipped, which would look like agreement."""
    assert components.left_out == {}
    cases = components.case.manifest["dn_cases"]
    assert len(cases) == 11
    for settings in cases:
        assert len(of(components, f"dn.{settings['name']}.")) >= 9
    of(components, "focal.loss_ce"), of(components, "crit.empty.losses")
    left = set(components.case.outputs()) - set(components.entries)
    assert left == set()
    assert len(components.entries) > 150


def test_weights_follow_the_recipe(detector):
    """Checks sampled values of each parameter to the bit: recipe, importer and names agree."""
    assert of(detector, "init.param_sample")["init.param_sample"]["abs"] == 0.0


def test_backbone_encodings_and_encoder(detector):
    assert_ok(of(detector, "eval.backbone", "eval.pos", "eval.src", "eval.enc", "eval.memory"))


def test_decoder_states_references_logits_and_boxes(detector):
    names = ("eval.dec", "eval.hs", "eval.ref", "eval.logits", "eval.boxes", "train.logits")
    assert_ok(of(detector, *names, "train.boxes", "train.dn_logits", "train.dn_boxes"))


def test_denoising_queries_and_mask(detector):
    assert_ok(of(detector, "train.input_query", "train.attn_mask", "train.md_"))


def test_matched_queries_of_all_layers(detector):
    matches = of(detector, "train.match_l")
    assert len(matches) == 12
    assert_ok(matches)


def test_detections(detector):
    assert_ok(of(detector, "eval.post_"))


def test_losses_of_evaluation_and_of_three_steps(detector):
    assert_ok(of(detector, "eval.losses", "eval.total_loss", "steps.", "as_matched."))


def test_gradients_and_updates(detector):
    assert of(detector, "train.grad_norm")["train.grad_norm"]["count"] == 338
    assert_ok(of(detector, "train.grad", "step1.", "step3."))


def test_errors_are_of_the_size_of_float32_noise(detector):
    """Compares errors with the difference of float32 and float64 runs of the PyTorch code."""
    ratios = {k: e["noise_ratio"] for k, e in detector.entries.items() if e.get("noise_ratio")}
    assert len(ratios) > 30
    assert {k: r for k, r in ratios.items() if r > 5 and k not in AMPLIFIED} == {}


def test_everything_in_the_case_is_compared(detector):
    assert detector.left_out == {}
    assert detector.exit_status == 0
    assert len(detector.case.outputs()) == 58


# --- arrays stored in part, and incomplete cases -------------------------------------------------


def written(folder, arrays, manifest):
    """Writes a case of these arrays."""
    np.savez(folder / "case.npz", **arrays)
    (folder / "case.json").write_text(json.dumps(manifest))
    return reference.Case(folder / "case.npz")


def strided(folder, case, steps):
    """Writes a copy of a case that stores `arrays[::step, ...]` of some arrays, by name."""
    arrays, described = stored_arrays(case), dict(case.manifest["arrays"])
    for name, step in steps.items():
        before = described[name].get("step") or [1] * len(step)
        arrays[name] = arrays[name][tuple(slice(None, None, s) for s in step)]
        described[name] = {
            "step": [a * b for a, b in zip(before, step, strict=True)],
            "full_shape": case.full_shape(name),
        }
    return written(folder, arrays, case.manifest | {"arrays": described})


def test_encoder_states_stored_in_part(tmp_path, run):
    """Catches padded tokens in the comparison: the mask must be strided with the array."""
    names = ["eval.memory", *(f"eval.enc{i}" for i in range(6))]
    case = strided(tmp_path, run.prepared.case, dict.fromkeys(names, (2, 1, 1)))
    report = compare(run, case, training=False)
    assert_ok(of(report, *names))
    assert set(names) <= set(report.entries)
    # (tokens, batch): image 1 is padded, so that token 34 is real in image 0 alone.
    for image, failing in ((0, ["eval.enc3"]), (1, [])):
        arrays = stored_arrays(case)
        arrays["eval.enc3"] = arrays["eval.enc3"].copy()
        arrays["eval.enc3"][17, image] += 1
        changed = written(tmp_path, arrays, case.manifest)
        assert compare(run, changed, training=False).failures == failing


def test_outputs_stored_in_part_along_any_dimension(tmp_path, run):
    case, rng = run.prepared.case, np.random.default_rng(0)
    whole = ("eval.losses", "eval.total_loss", "steps.", "train.match")
    steps = {
        name: tuple(rng.integers(1, 4, len(case.full_shape(name))).tolist())
        for name in [*case.outputs(), "train.sample_idx"]
        if not name.startswith(whole)
    }
    report = compare(run, strided(tmp_path, case, steps))
    assert report.failures == []
    assert report.left_out == {}


def test_inputs_must_be_stored_whole(tmp_path, run):
    case = strided(tmp_path, run.prepared.case, {"in.images": (1, 1, 2, 2)})
    with pytest.raises(UnsupportedCase, match=r"in.images is stored in part, but needed whole"):
        prepare(case)


@pytest.mark.parametrize("step", [[2], [0, 1, 1], [2, 1, 1], "abc"])
def test_steps_that_do_not_fit_are_named(tmp_path, run, step):
    """Catches a wrong slice in the comparison, and a traceback."""
    described = {"step": step, "full_shape": [99, 2, 256]}
    arrays = run.prepared.case.manifest["arrays"] | {"eval.memory": described}
    manifest = run.prepared.case.manifest | {"arrays": arrays}
    case = written(tmp_path, stored_arrays(run.prepared.case), manifest)
    with pytest.raises(UnsupportedCase, match=r"eval.memory has"):
        compare(run, case, training=False)


def test_outputs_that_nothing_is_compared_with_are_listed(tmp_path, run, capsys):
    """Catches a check that passes because it compares nothing."""
    case = run.prepared.case
    arrays = stored_arrays(case)
    arrays["eval.init_ref"] = np.zeros(3)
    del arrays["eval.hs"]
    report = compare(run, written(tmp_path, arrays, case.manifest), training=False)
    assert report.exit_status == 2 and not report.as_json()["ok"]
    left_out = [name for name in report.left_out if name.startswith("eval.")]
    assert left_out == ["eval.hs", "eval.init_ref"]
    assert "does not have it" in report.left_out["eval.hs"]
    # Padding alone is nothing to compare either: the last token of the padded image.
    name = "eval.memory"
    alone = case.manifest["arrays"] | {name: {"step": [100, 100, 100], "full_shape": [1, 1, 1]}}
    report = Report(written(tmp_path, {name: np.ones((1, 1, 1))}, {"case": "x", "arrays": alone}))
    report.array(name, np.ones((1, 1, 1)), atol=1.0, where=np.zeros((1, 1, 1), bool))
    assert "no stored value can be compared" in report.left_out[name]
    # Nothing at all, by the command.
    arrays = {"other.logits": np.zeros((2, 3))}
    written(tmp_path, arrays, {"case": "another model", "arrays": {"other.logits": {}}})
    assert check_reference.run(tmp_path / "case.npz") == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"].keys() == {"other.logits"}
    assert printed.err.startswith("error: another model: 0 comparisons, 1 outputs left out")


def test_a_case_of_inputs_alone_does_not_pass(tmp_path):
    case = written(tmp_path, {"in.x": np.zeros(2)}, {"case": "x", "arrays": {"in.x": {}}})
    assert check(case).exit_status == 2


def test_images_without_objects(tmp_path):
    """Covers empty lists, which NumPy writes in several shapes and as floats."""
    arrays = {
        "in.images": np.zeros((2, 3, 8, 8), np.float32),
        "in.target_labels_0": np.zeros(0),
        "in.target_boxes_0": np.zeros(0),
        "in.target_labels_1": np.array([3]),
        "in.target_boxes_1": np.array([[0.5, 0.5, 0.1, 0.1]]),
        "train.match_l0_i0": np.zeros((2, 0)),
        "train.match_l0_i1": np.array([[4], [0]]),
    }
    manifest = {"case": "x", "arrays": {}, "image_sizes_hw": [[8, 8], [8, 8]]}
    case = written(tmp_path, arrays, manifest)
    batch = reference.batch_of(case)
    np.testing.assert_array_equal(batch["valid"], [[False], [True]])
    np.testing.assert_array_equal(batch["labels"], [[0], [3]])
    model = SimpleNamespace(decoder_layers=1)
    prepared = SimpleNamespace(case=case, batch=batch, config=SimpleNamespace(model=model))
    np.testing.assert_array_equal(check_training.stored_assignment(prepared), [[[-1]], [[4]]])
    report = Report(case)
    report.equal("train.match_l0_i0", np.zeros((2, 0), int))
    assert report.failures == []


def test_samples_of_gradients(tmp_path):
    """Catches a gradient of 0 that divides by 0, samples at unknown places, and lost errors."""
    names, index = ["a", "b", "c", "d"], np.array([[0, 2]] * 4)
    ours = {"a": np.zeros(3), **dict.fromkeys("bcd", np.array([3.0, 9.0, 4.0]))}
    manifest = {
        "case": "x",
        "param_names": names,
        "params_without_gradient": [],
        "params_with_mathematically_zero_gradient": [],
        "arrays": {
            "train.grad_norm": {"step": [2], "full_shape": [4]},
            "train.sample_idx": {"step": [1, 2], "full_shape": [4, 2]},
        },
    }
    for wrong, failures in ((None, []), ((1, 0), ["train.grad_sample"]), ((1, 1), [])):
        samples = np.stack([ours[name][[0, 2]] for name in names])
        if wrong:
            samples[wrong] += 1.0
        arrays = {
            "train.sample_idx": index[:, ::2],
            "train.grad_norm": np.array([0.0, 106.0**0.5]),  # of a and c
            "train.grad_sample": samples,
        }
        case = written(tmp_path, arrays, manifest)
        report = Report(case)
        check_training.compare_gradients(report, SimpleNamespace(case=case, exact=True), ours)
        assert report.failures == failures and report.left_out == {}


# --- the command ----------------------------------------------------------------------------------


def stored_arrays(case):
    return {name: case.stored(name) for name in case.names()}


def small_case(folder, change=None):
    """The focal loss alone."""
    case = reference.Case(DATA / "components.npz")
    arrays = {k: v for k, v in stored_arrays(case).items() if k.startswith("focal.")}
    if change:
        arrays[change] = arrays[change] * (1 + 1e-3)
    manifest = case.manifest | {
        "arrays": {k: case.manifest["arrays"][k] for k in arrays},
        "dn_cases": [],
    }
    np.savez(folder / "case.npz", **arrays)
    (folder / "case.json").write_text(json.dumps(manifest))
    return str(folder / "case.npz")


def test_command_prints_one_json_object(tmp_path, capsys):
    assert check_reference.run(small_case(tmp_path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert set(printed["results"]) == {
        "focal.loss",
        "focal.loss_noalpha",
        "focal.loss_ce",
        "focal.grad",
    }


def test_command_notices_a_difference_of_a_thousandth(tmp_path, capsys):
    assert check_reference.run(small_case(tmp_path, change="focal.grad")) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert printed["out_of_tolerance"] == ["focal.grad"]


def test_command_refuses_other_models(tmp_path, capsys):
    manifest = json.loads((DATA / "dn_dab_detr_r50.json").read_text())
    shutil.copy(DATA / "components.npz", tmp_path / "case.npz")
    for change, words in (
        ({"modelname": "conditional_detr"}, "is not a model of this package"),
        ({"args": manifest["args"] | {"pre_norm": True}}, "pre_norm=True has no counterpart"),
    ):
        (tmp_path / "case.json").write_text(json.dumps(manifest | change))
        assert check_reference.run(tmp_path / "case.npz") == 2
        assert words in capsys.readouterr().err
    assert check_reference.run(tmp_path / "none.npz") == 2
    assert "none.npz: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.num_header=2", r"model.num_header.*did you mean model.num_heads"),
        ("model.num_heads=many", r"model.num_heads = 'many': a value such as 8"),
        ("model.num_heads=7", r"a divisor of model.hidden_dim = 256"),
        ("model.num_classes=7", r"class_embed.bias has shape \(91,\), not \(7,\)"),
    ],
)
def test_wrong_overrides_are_one_line(setting, words, capsys):
    """Catches a traceback, and an error only after the computation."""
    assert check_reference.run(DATA / "dn_dab_detr_r50.npz", settings=[setting]) == 2
    printed = capsys.readouterr().err
    assert re.search(words, printed)
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_files_that_are_no_cases_are_one_line(tmp_path, capsys):
    complete = json.loads((DATA / "dn_dab_detr_r50.json").read_text())
    args = {k: v for k, v in complete["args"].items() if k != "nheads"}
    arrays = {"in.images": np.zeros((2, 3, 8, 8), np.float32)}
    for manifest, words in (
        ("", r"case.npz: no reference case"),
        ({"case": "x"}, r"there is no arrays"),
        ({"case": "x", "arrays": {}, "modelname": "dn_dab_detr"}, r"no args, seed, state_dict"),
        (complete | {"args": args}, r"args: there is no nheads"),
        (complete, r"there is no in.target_labels_0 in the case"),
    ):
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (tmp_path / "case.json").write_text(text)
        np.savez(tmp_path / "case.npz", **arrays)
        assert check_reference.run(tmp_path / "case.npz") == 2
        printed = capsys.readouterr().err
        assert re.search(words, printed), printed
        assert printed.startswith("error: ") and printed.count("\n") == 1
    assert check_reference.run(DATA / "components.npz", "bfloat16") == 2
    assert "components have no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "change"),
    [
        ((2, 0, 1), {}),
        ((0, 0), {}),
        ((3,), {"num_patterns": 3, "dilation": True}),
        ((1, 1), {"use_dn": False}),
    ],
)
def test_other_cases_are_set_up(tmp_path, counts, change):
    """Covers other numbers of images and objects, none at all, and variants of the model.

    The names and shapes of each are those of the weights: see the tests of the import.
    """
    case = reference.Case(DATA / "dn_dab_detr_r50.npz")
    manifest = case.manifest
    small = {"hidden_dim": 32, "dim_feedforward": 16, "num_queries": 4, "num_select": 8}
    small |= {"enc_layers": 1, "dec_layers": 2, "backbone": "resnet18"}
    small |= {"transformer_activation": "relu"} | change
    config = base_config()
    config.model.update(hidden_dim=32, ffn_dim=16, num_queries=4, encoder_layers=1)
    config.model.update(decoder_layers=2, activation="relu")
    config.model.num_patterns = change.get("num_patterns", 0)
    config.model.backbone.update(depth=18, dilation=change.get("dilation", False))
    shapes = {k: v.shape for k, v in flat(abstract_params(build_model(config.model))).items()}
    entries = [
        {"name": name, "shape": list(tensor.shape)}
        for tensor in NAMES.tensors(shapes)[0]
        for name in (tensor.name, *NAMES.second_names(tensor.name))
    ]
    rng, total = np.random.default_rng(0), 5 * sum(counts)
    arrays = {
        "in.images": np.zeros((len(counts), 3, 64, 48), np.float32),
        "in.noise_label_u": rng.random(total),
        "in.noise_label_new": rng.integers(0, 91, total),
        "in.noise_box_u": rng.random((total, 4)),
    }
    for i, count in enumerate(counts):
        arrays[f"in.target_labels_{i}"] = rng.integers(1, 91, count)
        arrays[f"in.target_boxes_{i}"] = rng.uniform(0.2, 0.4, (count, 4)).astype(np.float32)
    np.savez(tmp_path / "case.npz", **arrays)
    manifest = manifest | {
        "args": manifest["args"] | small,
        "state_dict": entries,
        "image_sizes_hw": [[64, 48]] * len(counts),
        "arrays": {},
    }
    (tmp_path / "case.json").write_text(json.dumps(manifest))
    case = reference.Case(tmp_path / "case.npz")
    prepared = prepare(case, overrides={"matcher.cost_giou": "3.0"})
    assert prepared.config.matcher.cost_giou == 3.0
    np.testing.assert_array_equal(prepared.batch["valid"].sum(axis=1), counts)
    if sum(counts) and change.get("use_dn", True):
        assert prepared.dn.valid.sum() == total
        rows = reference.slots_of(prepared.batch["valid"], 5)
        flipped = np.where(
            arrays["in.noise_label_u"] < 0.2,
            arrays["in.noise_label_new"],
            np.tile(
                np.concatenate([arrays[f"in.target_labels_{i}"] for i in range(len(counts))]), 5
            ),
        )
        np.testing.assert_array_equal(np.asarray(prepared.dn.labels)[rows], flipped)
    else:
        assert prepared.dn is None
