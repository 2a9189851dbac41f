"""Checkpoints in the names of other code: detrex, transformers, and the official DAB-DETR."""

from pathlib import Path

import jax
import numpy as np
import pytest
from data import tiny as tiny_config
from flax import traverse_util
from tiny_detector import random_params

from dn_detr_jax.config import base_config, validate
from dn_detr_jax.data.coco_classes import COCO_CATEGORIES
from dn_detr_jax.errors import ConversionError
from dn_detr_jax.interop.convert import flat, params_to_torch
from dn_detr_jax.interop.import_torch import convert
from dn_detr_jax.interop.names import dn_dab_detr, elsewhere
from dn_detr_jax.models.registry import abstract_params, build_model, torch_names

NAMES = Path(__file__).parent / "data" / "names"
LISTED = {
    "detrex_dn_detr": elsewhere.DETREX_DN_DETR,
    "detrex_dn_deformable_detr": elsewhere.DETREX_DN_DEFORMABLE_DETR,
    "transformers_dab_detr": elsewhere.TRANSFORMERS_DAB_DETR,
}
SLOPE = "transformer.encoder.layers.0.ffns.0."


def listed(name):
    """Returns (their name, official name, part of a packed tensor or None) of a stored list."""
    rows = [line.split() for line in (NAMES / f"{name}.txt").read_text().splitlines()]
    return [(row[0], row[1], int(row[2]) if len(row) == 3 else None) for row in rows]


def config_with(num_classes=80, **model):
    config = tiny_config.weights(num_classes=num_classes, activation="prelu", **model)
    config.eval.num_select = 10
    validate(config)
    return config


@pytest.fixture(scope="module")
def official():
    """The official state dict of a small model with 80 classes."""
    shapes = flat(abstract_params(build_model(config_with().model)))
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
    return params_to_torch(traverse_util.unflatten_dict(params, sep="/"), dn_dab_detr.NAMES)


@pytest.fixture(scope="module")
def without_content(official):
    """As `official`, with matching queries that have no content."""
    table = official["label_enc.weight"].copy()
    table[-1] = 0.0
    return official | {"label_enc.weight": table}


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_name_has_its_official_name(name):
    """Catches a rule for the wrong tensor: a pair of norms or projections of equal shapes.

    The lists are of layers 0 and 1 of the real models. They were checked by running the official
    code with weights that were renamed so.
    """
    source, rows = LISTED[name], listed(name)
    first = {theirs: source.first_name(theirs) for theirs, _, _ in rows}
    values = {theirs: np.full((3, 3), i, np.float32) for i, theirs in enumerate(first)}
    state = {theirs: values[first[theirs]] for theirs in first}  # twins are equal
    found = source.to_official(state)
    for theirs, official, part in rows:
        own = found[official] if part is None else np.split(found[official], 3)[part]
        np.testing.assert_array_equal(own, state[theirs], err_msg=theirs)
    labels = {"label_enc.weight"}
    assert found.keys() | labels == {official for _, official, _ in rows} | labels
    back = source.from_official(found | {"label_enc.weight": np.zeros((3, 3), np.float32)})
    assert back.keys() == state.keys()
    for theirs in state.keys() - {"denoising_generator.label_encoder.weight"}:
        np.testing.assert_array_equal(back[theirs], state[theirs], err_msg=theirs)


def test_a_checkpoint_of_detrex(official):
    """Catches a source that is not recognized, and classes or settings that do not follow it."""
    state = elsewhere.DETREX_DN_DETR.from_official(official)
    config = config_with(num_classes=91, num_queries=5)
    found = convert(state, config)
    assert found.report.source == "detrex"
    assert found.report.unused == found.report.unfilled == ()
    assert found.followed == {
        "model.num_classes": 80,
        "data.labels": "contiguous",
        "eval.num_select": 300,
    }
    assert found.config.model.num_classes == 80 and found.config.eval.num_select == 300
    assert config.model.num_classes == 91 and config.eval.num_select == 10
    assert found.categories == COCO_CATEGORIES
    again = params_to_torch(found.params, dn_dab_detr.NAMES)
    assert again.keys() == official.keys()
    jax.tree.map(np.testing.assert_array_equal, again, official)


def test_other_numbers_of_classes_are_not_those_of_coco(official):
    """Catches the names of COCO's classes for a model that detrex trained on other data."""
    reduced = {name: official[f"class_embed.{name}"][:7] for name in ("weight", "bias")}
    state = official | {f"class_embed.{name}": value for name, value in reduced.items()}
    state["label_enc.weight"] = official["label_enc.weight"][-8:]
    state = elsewhere.DETREX_DN_DETR.from_official(state)
    with pytest.raises(ConversionError, match=r"fits --config\.model\.num_classes=7"):
        convert(state, config_with())
    found = convert(state, config_with(num_classes=0))
    assert [category.name for category in found.categories] == [f"class {i}" for i in range(7)]
    assert "data.labels" not in found.followed


def test_one_name_of_twins_is_enough(official):
    state = elsewhere.DETREX_DN_DETR.from_official(official)
    for second in (SLOPE + "layers.0.1.weight", SLOPE + "activation.weight"):
        assert convert({k: v for k, v in state.items() if k != second}, config_with())
    state[SLOPE + "layers.0.1.weight"] = np.float32([3.0])
    with pytest.raises(ConversionError, match=r"activation\.weight and .*0\.1\.weight .* differ"):
        convert(state, config_with())


def test_names_of_early_files(official):
    """The files of detrex 0.1.0 have names that its models do not have any more."""
    state = elsewhere.DETREX_DN_DETR.from_official(official)
    early = {
        name.replace("denoising_generator.", "").replace("anchor_box_", "refpoint_"): value
        for name, value in state.items()
    }
    assert "label_encoder.weight" in early and "refpoint_embed.weight" in early
    assert convert(early, config_with()).report.unused == ()


def test_dc5_of_detrex_is_told_by_its_backbone(official):
    state = elsewhere.DETREX_DN_DETR_DC5.from_official(official)
    assert "backbone.body.layer1.0.bn1.running_mean" in state
    with pytest.raises(ConversionError, match=r"backbone\.dilation=True"):
        convert(state, config_with())
    config = config_with()
    config.model.backbone.dilation = True
    assert convert(state, config).report.unused == ()
    assert elsewhere.source_named("detrex", config.model) is elsewhere.DETREX_DN_DETR_DC5
    assert elsewhere.source_named("detrex", config_with().model) is elsewhere.DETREX_DN_DETR


def levels_config(name, **model):
    """Returns a config of a variant with the levels of the published models, and 80 classes."""
    config = tiny_config.levels(name)
    config.model.update({"num_classes": 80, "backbone_levels": 3, "extra_levels": 1} | model)
    config.model.backbone.update(stages=4, stem="standard", norm="frozen_batch_norm")
    return config


def random_state(config):
    """Returns an official state dict of the config's model."""
    shapes = flat(abstract_params(build_model(config.model)))
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
    nested = traverse_util.unflatten_dict(params, sep="/")
    return params_to_torch(nested, torch_names(config.model))


@pytest.mark.parametrize("label_name", ["denoising_generator.label_encoder", "label_encoder"])
def test_dn_deformable_detr_of_detrex(label_name):
    """Catches a level, norm or attention in the place of another, and the early label table."""
    config = levels_config("dn_deformable_detr")
    official = random_state(config)
    source = elsewhere.source_named("detrex", config.model)
    state = source.from_official(official)
    table = state.pop("denoising_generator.label_encoder.weight")
    found = convert(state | {f"{label_name}.weight": table}, config)
    assert found.report.source == "detrex" and found.report.unused == ()
    assert found.followed == {"data.labels": "contiguous", "eval.num_select": 300}
    assert found.categories == COCO_CATEGORIES
    again = params_to_torch(found.params, torch_names(config.model))
    assert again.keys() == official.keys()
    jax.tree.map(np.testing.assert_array_equal, again, official)


@pytest.mark.parametrize("backbone_levels", [3, 4])
def test_dino_of_detrex(backbone_levels):
    """Catches lost rows of the label table, and the level numbers of the model with five."""
    config = levels_config("dn_dino_detr", backbone_levels=backbone_levels, indicator=False)
    official = random_state(config)
    state = elsewhere.source_named("detrex", config.model).from_official(official)
    assert state["label_enc.weight"].shape == (80, 32)  # none is of "no object"
    extra = "neck.extra_convs.0.conv.weight"
    np.testing.assert_array_equal(state[extra], official[f"input_proj.{backbone_levels}.0.weight"])
    found = convert(state, config)
    assert found.report.source == "detrex" and found.report.unused == ()
    assert found.followed == {"data.labels": "contiguous", "eval.num_select": 300}
    again = params_to_torch(found.params, torch_names(config.model))
    table, row = again["label_enc.weight"][:-1], again["label_enc.weight"][-1]
    np.testing.assert_array_equal(table, official["label_enc.weight"][:-1])
    assert row.std() == pytest.approx(1, abs=0.4)
    for name in official.keys() - {"label_enc.weight"}:
        np.testing.assert_array_equal(again[name], official[name], err_msg=name)


def test_dino_of_detrex_scores_proposals_by_class():
    """Catches weights for a model that selects other proposals, whose shapes are the same."""
    config = levels_config("dn_dino_detr", indicator=False)
    state = elsewhere.DETREX_DINO.from_official(random_state(config))
    config.model.proposal_score = "objectness"
    with pytest.raises(ConversionError, match=r"fits --config\.model\.proposal_score=class"):
        convert(state, config)


def test_detrex_has_one_extra_level():
    """Catches a wrong number of the extra level in a model with other levels."""
    config = levels_config("dn_deformable_detr")
    config.model.extra_levels = 2
    with pytest.raises(ConversionError, match="no names of 'detrex'"):
        elsewhere.source_named("detrex", config.model)


@pytest.mark.parametrize("name", ["transformers", "dab-detr"])
def test_dab_detr_has_matching_queries_without_content(without_content, name):
    """Catches a random row for the matching queries, which DAB-DETR has no content for."""
    source = elsewhere.source_named(name, config_with().model)
    state = source.from_official(without_content)
    found = convert(state, config_with())
    assert found.report.source == name and found.report.unused == ()
    table = found.params["label_embedding"]
    assert not table[-1].any() and table[:-1].std() == pytest.approx(1, abs=0.1)
    again = params_to_torch(found.params, dn_dab_detr.NAMES)
    for key in without_content.keys() - {"label_enc.weight"}:
        np.testing.assert_array_equal(again[key], without_content[key], err_msg=key)


def test_content_of_queries_has_no_place_in_dab_detr(official):
    with pytest.raises(ConversionError, match="no place for the content of the matching queries"):
        elsewhere.TRANSFORMERS_DAB_DETR.from_official(official)


def test_a_part_of_a_packed_tensor_is_missing(without_content):
    state = elsewhere.TRANSFORMERS_DAB_DETR.from_official(without_content)
    del state["model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(ConversionError, match=r"q_proj\.bias is there, but not .*k_proj\.bias"):
        convert(state, config_with())


def test_names_that_a_variant_does_not_have():
    with pytest.raises(ConversionError, match=r"no names of 'mmdet', only of dab-detr, detrex"):
        elsewhere.source_named("mmdet", config_with().model)


def plain_config():
    config = base_config("dn_detr_plain")
    own, tiny = config.model, tiny_config.weights(num_classes=5).model
    own.update({k: v for k, v in tiny.items() if k in own and k not in ("name", "backbone")})
    own.backbone.update(tiny.backbone)
    config.eval.num_select = 10
    validate(config)
    return config


def test_detr_has_nothing_for_denoising():
    """Catches a checkpoint of DETR that is refused, or whose new tensors nobody mentions."""
    config = plain_config()
    params = random_params(abstract_params(build_model(config.model)))
    state = elsewhere.OFFICIAL_DETR.from_official(
        params_to_torch(params, torch_names(config.model))
    )
    layer = params["decoder"]["layer0"]
    for name, ours in {
        "query_embed.weight": params["query_position"],
        "class_embed.bias": params["class_head"]["bias"],
        "transformer.decoder.layers.0.norm2.weight": layer["cross_norm"]["scale"],
        "transformer.decoder.layers.0.multihead_attn.in_proj_bias": np.concatenate(
            [layer[f"cross_{part}"]["bias"] for part in ("query", "key", "value")]
        ),
        "transformer.decoder.layers.0.self_attn.out_proj.bias": layer["self_out"]["bias"],
    }.items():
        np.testing.assert_array_equal(state[name], ours, err_msg=name)
    assert not [name for name in state if name.startswith(("label_enc", "box_enc"))]
    found = convert(state, config)
    assert found.report.source == "detr" and found.report.unused == ()
    assert (
        "5 tensors are not in the source and start new, for training with denoising: label_enc"
        in (found.report.summary())
    )
    again = params_to_torch(found.params, torch_names(config.model))
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    with pytest.raises(ConversionError, match="the checkpoint is a dn_detr_plain, the config is"):
        convert(state, config_with())


def test_an_export_has_the_buffers_of_a_swin_transformer():
    """Catches a strict `load_state_dict` that misses them, and an import that finds them unused.

    The reference is counted: rows of the table are offsets, first vertical ones, from the smallest.
    """
    config = config_with(num_classes=5)
    config.model.backbone.kind = "swin"
    config.model.backbone.swin.update(channels=8, depths=(1, 1), heads=(2, 2), window=3)
    params = random_params(abstract_params(build_model(config.model)))
    state = params_to_torch(params, dn_dab_detr.NAMES)
    index = state["backbone.0.layers.1.blocks.0.attn.relative_position_index"]
    assert index.dtype == np.int64 and index.shape == (9, 9)
    offsets = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    for query, key in np.ndindex(9, 9):
        offset = query // 3 - key // 3, query % 3 - key % 3
        assert offsets[index[query, key]] == offset
    assert convert(state, config).report.unused == ()
