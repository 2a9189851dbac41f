"""The uses of an imported checkpoint: evaluation, fine-tuning, and training in its directory.

The real loop and evaluation run on a tiny detector with weights from a `.pth`.
"""

import json
import re
import runpy
from pathlib import Path

import fast_jit
import jax
import numpy as np
import pytest
from tiny_detector import random_params

from dn_detr_jax.checkpoints.manager import Checkpoints
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.interop import torch_files
from dn_detr_jax.interop.class_heads import head_paths
from dn_detr_jax.interop.convert import flat, params_to_torch
from dn_detr_jax.interop.import_torch import import_file
from dn_detr_jax.interop.names.dn_dab_detr import NAMES
from dn_detr_jax.models.registry import abstract_params, build_model
from dn_detr_jax.training import loop, report

TINY = Path(__file__).parent / "data" / "tiny.py"


def official_like(digits_dir, num_classes=10):
    """Returns the tiny config with frozen batch norms and a 7x7 stem, as in official models."""
    config = runpy.run_path(str(TINY))["get_config"]()
    config.data.dir = str(digits_dir)
    config.model.num_classes = num_classes
    config.model.backbone.update(norm="frozen_batch_norm", stem="standard")
    config.model.backbone.update(stages=1, frozen_stages=0)
    config.model.decoder_layers = 1
    config.eval.update(instability_images=0, pictures=2)
    config.compile.options = fast_jit.CONFIG
    return config


def imported(folder, config):
    """Returns a work directory with the random weights of a `.pth`, and the weights by path."""
    params = random_params(abstract_params(build_model(config.model)))
    torch_files.write(folder / "official.pth", params_to_torch(params, NAMES))
    account = import_file(folder / "official.pth", config, folder / "imported")
    assert account.unused == account.unfilled == ()
    return folder / "imported", flat(params)


def stored(workdir, config, step):
    shapes = abstract_params(build_model(config.model))
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        return flat(jax.device_get(checkpoints.restore_params(shapes, step)))


def test_evaluation_of_an_import(tmp_path, digits_dir, capsys, monkeypatch):
    """Catches a step "best" that an import lacks, and files that only trainings write.

    The training split is missing, and only `evaluations` is written.
    """
    config = official_like(digits_dir)
    config.train.batch_size = 10_000  # more than there are images
    workdir, _ = imported(tmp_path, config)
    monkeypatch.setattr(report, "open_dataset", None)
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    evaluation = report.evaluate(config, workdir)
    assert 0 <= evaluation.metrics["AP"] < 0.2  # random weights
    printed = capsys.readouterr().out
    assert re.search(r"^Average Precision  AP .*IoU=0.50:0.95", printed, re.MULTILINE)
    assert f"checkpoint  {workdir / 'checkpoints' / '0'}" in printed
    written = {p for p in workdir.rglob("*") if p.is_file()} - before.keys()
    folder = workdir / "evaluations"
    assert written == {folder / "step_0.json", folder / "step_0" / "detections.png"}
    assert all(p.read_bytes() == content for p, content in before.items())
    record = json.loads((folder / "step_0.json").read_text())
    assert record["step"] == 0 and record["metrics"]["AP"] == evaluation.metrics["AP"]
    assert record["per_class"].keys() == evaluation.per_class.keys()


@pytest.mark.slow
def test_fine_tuning_starts_from_an_import_with_other_classes(tmp_path, digits_dir):
    """Two steps with a negligible rate keep the imported values in all parts but the heads.

    Denoising is contrastive, so that the whole loop covers that too.
    """
    workdir, params = imported(tmp_path, official_like(digits_dir, num_classes=7))
    config = official_like(digits_dir)
    config.dn.contrastive = True
    config.init.update(checkpoint=str(workdir), reset_heads=True)
    config.optimizer.update(learning_rate=1e-12, weight_decay=0.0, warmup="0 steps")
    config.train.update(duration="2 steps", eval_every="2 steps", checkpoint_every="2 steps")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    assert loop.train(config, tmp_path / "tuned") is not None
    tuned = stored(tmp_path / "tuned", config, 2)
    assert tuned["class_head/bias"].shape == (10,)
    heads = head_paths(params)
    for path, value in params.items():
        if path not in heads:
            np.testing.assert_allclose(tuned[path], value, atol=1e-9, err_msg=path)
    table = params["label_embedding"]
    np.testing.assert_allclose(tuned["label_embedding"][-1], table[-1], atol=1e-9)
    assert np.abs(tuned["label_embedding"][:7] - table[:7]).max() > 0.1
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    metrics = [
        json.loads(x) for x in (tmp_path / "tuned" / "metrics.jsonl").read_text().split("\n") if x
    ]
    losses = [line["train/dn_loss_ce"] for line in metrics if "train/dn_loss_ce" in line]
    assert len(losses) == 2 and np.all(np.isfinite(losses))
    assert (tmp_path / "tuned" / "pictures" / "noised_boxes.png").stat().st_size > 1000


def test_training_in_the_directory_of_an_import_says_what_to_do(tmp_path, digits_dir):
    """Catches an import that is overwritten; it has no optimizer state to continue from."""
    config = official_like(digits_dir)
    workdir, _ = imported(tmp_path, config)
    with pytest.raises(ConfigError, match=r"--config.init.checkpoint=.*imported"):
        loop.train(config, workdir)


def test_number_of_classes_may_come_from_the_file(tmp_path, digits_dir):
    config = official_like(digits_dir, num_classes=7)
    params = random_params(abstract_params(build_model(config.model)))
    torch_files.write(tmp_path / "official.npz", params_to_torch(params, NAMES))
    config.model.num_classes = 0
    import_file(tmp_path / "official.npz", config, tmp_path / "imported")
    written = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert written["config"]["model"]["num_classes"] == 7
    assert config.model.num_classes == 0
