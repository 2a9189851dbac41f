"""Official weights and reference cases of the variants with feature levels."""

import dataclasses
import json
import re
from pathlib import Path

import fast_jit
import numpy as np
import pytest
from tiny_detector import random_params

from dn_detr_jax.commands import check_reference
from dn_detr_jax.config import base_config
from dn_detr_jax.errors import ConversionError
from dn_detr_jax.interop.architecture import check_config, official_config
from dn_detr_jax.interop.convert import flat, params_from_torch, params_to_torch
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names
from dn_detr_jax.parity import check, check_evaluation, reference
from dn_detr_jax.parity.case_config import case_config
from dn_detr_jax.parity.check_queries import check_queries
from dn_detr_jax.parity.comparison import Report
from dn_detr_jax.parity.prepared import prepare

MANIFEST = Path(__file__).parent / "data" / "reference" / "dn_dab_detr_r50.json"
OFFICIAL = {
    "dn_deformable_detr": ("dn_dab_deformable_detr", {}),
    "dn_deformable_encoder_detr": (
        "dn_dab_deformable_detr_deformable_encoder_only",
        {"transformer_activation": "relu", "num_patterns": 3},
    ),
    "dn_dino_detr": ("dn_dab_dino_deformable_detr", {"two_stage": True, "contrastive": True}),
}
# What the PyTorch code has of each kind of module, with the numbers of the whole model.
NAMES = {
    "dn_deformable_detr": """
        backbone.0.body.layer4.2.conv3.weight (2048,512,1,1)
        input_proj.0.0.weight (256,512,1,1)
        input_proj.3.0.weight (256,2048,3,3)
        input_proj.3.0.bias (256,)
        input_proj.3.1.weight (256,)
        transformer.level_embed (4,256)
        transformer.encoder.layers.5.self_attn.sampling_offsets.weight (256,256)
        transformer.encoder.layers.5.self_attn.attention_weights.bias (128,)
        transformer.encoder.layers.5.self_attn.value_proj.weight (256,256)
        transformer.encoder.layers.5.self_attn.output_proj.weight (256,256)
        transformer.encoder.layers.5.norm1.weight (256,)
        transformer.encoder.layers.5.linear1.weight (2048,256)
        transformer.encoder.layers.5.norm2.weight (256,)
        transformer.decoder.layers.5.cross_attn.sampling_offsets.bias (256,)
        transformer.decoder.layers.5.cross_attn.output_proj.bias (256,)
        transformer.decoder.layers.5.norm1.weight (256,)
        transformer.decoder.layers.5.self_attn.in_proj_weight (768,256)
        transformer.decoder.layers.5.self_attn.out_proj.weight (256,256)
        transformer.decoder.layers.5.norm3.bias (256,)
        transformer.decoder.query_scale.layers.1.weight (256,256)
        transformer.decoder.ref_point_head.layers.0.weight (256,512)
        transformer.decoder.bbox_embed.5.layers.2.weight (4,256)
        class_embed.5.weight (91,256)
        bbox_embed.5.layers.2.weight (4,256)
        label_enc.weight (92,255)
        tgt_embed.weight (300,255)
        refpoint_embed.weight (300,4)
    """,
    "dn_deformable_encoder_detr": """
        transformer.level_embed (4,256)
        transformer.encoder.layers.5.self_attn.sampling_offsets.weight (256,256)
        transformer.patterns.weight (3,256)
        transformer.decoder.layers.5.sa_qcontent_proj.weight (256,256)
        transformer.decoder.layers.0.ca_qpos_proj.bias (256,)
        transformer.decoder.layers.5.ca_out_v_proj.weight (256,256)
        transformer.decoder.layers.5.lvl_attn.weight (4,256)
        transformer.decoder.layers.5.lvl_attn.bias (4,)
        transformer.decoder.ref_anchor_head.layers.1.weight (2,256)
        transformer.decoder.bbox_embed.layers.2.weight (4,256)
        input_proj.3.0.weight (256,2048,3,3)
        class_embed.weight (91,256)
        refpoint_embed.weight (300,4)
    """,
    "dn_dino_detr": """
        transformer.tgt_embed.weight (300,256)
        transformer.enc_output.weight (256,256)
        transformer.enc_output_norm.weight (256,)
        transformer.decoder.class_embed.6.weight (91,256)
        class_embed.6.bias (91,)
        bbox_embed.6.layers.0.weight (256,256)
        label_enc.weight (92,255)
    """,
}


def official(name, **small):
    """Returns a config of the official architecture."""
    config = base_config(name)
    config.model.update(num_queries=300, indicator=True)
    if name == "dn_dino_detr":
        config.model.update(proposal_score="objectness", decoder_norm=False, query_scale=True)
    config.model.update(small)
    return config


def shapes_of(config):
    params = flat(abstract_params(build_model(config.model)))
    return {path: leaf.shape for path, leaf in params.items()}


@pytest.mark.parametrize("name", NAMES)
def test_official_names_and_shapes(name):
    """Catches a wrong name or shape, a parameter without a tensor, and a second one without."""
    names = torch_names(official(name).model)
    shapes = shapes_of(official(name))
    tensors, foreign = names.tensors(shapes)
    assert foreign == []
    assert sorted(path for tensor in tensors for path in tensor.paths) == sorted(shapes)
    ours = {n: t.shape for t in tensors for n in (t.name, *names.second_names(t.name))}
    wanted = dict(re.findall(r"(\S+) (\(.*\))", NAMES[name]))
    found = {k: str(v).replace(" ", "") for k, v in ours.items() if k in wanted}
    assert found == wanted
    assert "refpoint_embed.weight" not in ours or name != "dn_dino_detr"


@pytest.fixture(scope="module", params=OFFICIAL)
def small(request):
    """A small official model: its config, parameters and state dict."""
    config = official(
        request.param, hidden_dim=32, ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=4
    )
    config.model.backbone.depth = 18
    params = random_params(abstract_params(build_model(config.model)))
    names = torch_names(config.model)
    return config, params, params_to_torch(params, names), names


def test_round_trip_is_exact(small):
    config, params, state, names = small
    back, report = params_from_torch(state, shapes_of(config), names)
    assert report.unfilled == report.unused == () and report.tied
    for path, value in flat(params).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path, strict=True)


def test_the_weights_tell_their_variant_and_its_keys(small):
    """Catches variants that are taken for each other, and keys that the shapes decide."""
    config, _, state, _ = small
    found = official_config(state, {"nheads": 8}, config.model)
    check_config(found, config, reset_heads=False)
    assert found["model.encoder_points"] == 4 and found["model.extra_levels"] == 1
    wrong = base_config("dn_dab_detr")
    found = official_config(state, {}, wrong.model)
    with pytest.raises(ConversionError, match=f"the checkpoint is a {config.model.name}, "):
        check_config(found, wrong, reset_heads=False)


def small_case(folder, small, counts, change):
    """Writes a case of inputs and denoising queries, without any output of a model."""
    config, _, state, _ = small
    modelname, own = OFFICIAL[config.model.name]
    manifest = json.loads(MANIFEST.read_text())
    args = manifest["args"] | {"hidden_dim": 32, "dim_feedforward": 16, "enc_layers": 1}
    args |= {"dec_layers": 2, "num_queries": 4, "backbone": "resnet18", "num_results": 20}
    args |= own | change
    copies = 2 if args["contrastive"] else 1
    rng, total = np.random.default_rng(0), copies * args["scalar"] * sum(counts)
    arrays = {
        "in.images": np.zeros((len(counts), 3, 64, 48), np.float32),
        "in.noise_label_u": rng.random(total),
        "in.noise_label_new": rng.integers(0, 91, total),
        "in.noise_box_u": rng.random((total, 4)),
        "in.noise_box_sign01": rng.integers(0, 2, (total, 4)),
    }
    for i, count in enumerate(counts):
        arrays[f"in.target_labels_{i}"] = rng.integers(1, 91, count)
        arrays[f"in.target_boxes_{i}"] = rng.uniform(0.2, 0.4, (count, 4)).astype(np.float32)
    # The slots of an image: its objects, then its negatives, in each group.
    slots = copies * max(counts)
    arrays["train.md_map_known_indice"] = np.concatenate(
        [g * slots + np.arange(copies * count) for g in range(args["scalar"]) for count in counts]
    )
    labels = [arrays[f"in.target_labels_{i}"] for i in range(len(counts))]
    doubled = [np.append(x, [91] * len(x)) if copies == 2 else x for x in labels]
    arrays["train.md_known_labels"] = np.tile(np.concatenate(doubled), args["scalar"])
    manifest |= {
        "modelname": modelname,
        "args": args,
        "gt_counts": list(counts),
        "state_dict": [{"name": k, "shape": list(v.shape)} for k, v in state.items()],
        "image_sizes_hw": [[64, 48]] * len(counts),
        "arrays": {},
    }
    np.savez(folder / "case.npz", **arrays)
    (folder / "case.json").write_text(json.dumps(manifest))
    return reference.Case(folder / "case.npz")


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_cases_are_set_up(tmp_path, small, counts):
    """Catches denoising slots in another order than the PyTorch code's, and images without any."""
    case = small_case(tmp_path, small, counts, {"scalar": 3})
    prepared = prepare(case)
    name = prepared.config.model.name
    dino, dab_decoder = name == "dn_dino_detr", name == "dn_deformable_encoder_detr"
    # The deformable model keeps 100 whatever the arguments say.
    kept = {"dn_dino_detr": 20, "dn_deformable_encoder_detr": 300}.get(name, 100)
    assert prepared.config.eval.num_select == kept
    assert prepared.config.model.pe_temperature_h == (20.0 if dab_decoder else 10000.0)
    assert prepared.config.dn.contrastive == dino
    if not sum(counts):
        assert prepared.dn is None
        return
    report = Report(case)
    check_queries(report, prepared)
    assert report.failures == [] and len(report.entries) == 2
    slots = np.asarray(prepared.dn.valid).sum(axis=1)
    assert slots.tolist() == [3 * count * (1 + dino) for count in counts]


def test_a_case_is_checked(tmp_path, small, monkeypatch, capsys):
    """Catches outputs of a variant that the check can't compare, and one whose error is lost.

    What the package computes stands in for what PyTorch stores.
    """
    case = small_case(tmp_path, small, (2, 1), {"scalar": 3})
    rng, images = np.random.default_rng(1), case["in.images"]
    stored = {name: case.stored(name) for name in case.names() if name.startswith("in.")}
    stored["in.images"] = rng.normal(size=images.shape).astype(np.float32)
    np.savez(tmp_path / "case.npz", **stored)
    prepared = prepare(reference.Case(tmp_path / "case.npz"))
    prepared.compiler_options = fast_jit.OPTIONS
    outputs, collected = check_evaluation.run(prepared)
    found = {"eval.logits": outputs["pred_logits"], "eval.boxes": outputs["pred_boxes"]}
    found |= {"eval.hs": collected["hs"][0], "eval.post_scores": outputs["scores"]}
    found |= {"eval.post_labels": outputs["labels"]}
    if "selected" in collected:
        found |= {"eval.topk_idx": collected["selected"][0]}
        found |= {"eval.enc_logits": outputs["objectness_logits"][0]}

    def run(changed):
        np.savez(tmp_path / "case.npz", **stored | found | changed)
        status = check_reference.run(tmp_path / "case.npz")
        return status, json.loads(capsys.readouterr().out)

    with monkeypatch.context() as patch:  # it compiles once
        patch.setattr(check, "prepare", lambda c, *_: dataclasses.replace(prepared, case=c))
        patch.setattr(check_evaluation, "run", lambda _: (outputs, collected))
        status, printed = run({})
        assert (status, printed["ok"], printed["left_out"]) == (0, True, {})
        assert set(printed["results"]) == set(found)
        boxes = found["eval.boxes"].copy()
        boxes[-1, 1, 2] += 1e-3
        status, printed = run({"eval.boxes": boxes})
        wrong = {name for name, result in printed["results"].items() if not result["ok"]}
        assert (status, wrong) == (1, {"eval.boxes"})
        status, printed = run({"eval.unknown": boxes})
        assert status == 2 and list(printed["left_out"]) == ["eval.unknown"]


def test_arguments_without_counterpart(tmp_path, small):
    change = {
        "dn_deformable_detr": {"num_patterns": 3},
        "dn_deformable_encoder_detr": {"transformer_activation": "prelu"},
        "dn_dino_detr": {"two_stage": False},
    }[small[0].model.name]
    with pytest.raises(reference.UnsupportedCase, match=next(iter(change))):
        case_config(small_case(tmp_path, small, (1,), change))


def test_many_contrastive_groups_are_a_number_of_slots(tmp_path, small):
    """The PyTorch code divides 100 groups and more by the slots of one."""
    case = small_case(tmp_path, small, (3, 1), {"scalar": 5})
    case.manifest["args"]["scalar"] = 100
    dino = small[0].model.name == "dn_dino_detr"
    assert case_config(case).dn.groups == (100 // 6 if dino else 100)
