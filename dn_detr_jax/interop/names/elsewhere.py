"""The sources: detrex's models, transformers' DAB-DETR, and the official DAB-DETR and DETR.

Names of detrex are those of its release 0.5 and of the files in its model zoo since 0.1.0.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dn_detr_jax.config import flat_values
from dn_detr_jax.errors import ConversionError
from dn_detr_jax.interop.names import dn_detr_plain
from dn_detr_jax.interop.sources import Pairs, Source, State

OFFICIAL = Source("official", "", ())  # of every variant that has official names

# --- detrex ---------------------------------------------------------------------------------------


def _detectron2_resnet() -> Pairs:
    """ResNets of detectron2, whose stages count from 2."""
    pairs: list[tuple[str, str]] = [
        ("backbone.0.body.conv1.", "backbone.stem.conv1."),
        ("backbone.0.body.bn1.", "backbone.stem.conv1.norm."),
    ]
    for stage in range(1, 5):
        ours = f"backbone.0.body.layer{stage}.{{b}}."
        theirs = f"backbone.res{stage + 1}.{{b}}."
        pairs += [
            (ours + "bn{k}.", theirs + "conv{k}.norm."),
            (ours + "conv{k}.", theirs + "conv{k}."),
            (ours + "downsample.1.", theirs + "shortcut.norm."),
            (ours + "downsample.0.", theirs + "shortcut."),
        ]
    return tuple(sorted(pairs, key=lambda pair: -len(pair[1])))  # .norm. before what it is part of


_BACKBONE = _detectron2_resnet()
_ENCODER, _DECODER = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
_FEED_FORWARD = tuple(
    (layer + official, layer + theirs)
    for layer in (_ENCODER, _DECODER)
    for official, theirs in (
        ("linear1.", "ffns.0.layers.0.0."),
        ("linear2.", "ffns.0.layers.1."),
        ("activation.", "ffns.0.activation."),
    )
)
_SLOPES = tuple(
    (layer + "ffns.0.layers.0.1.", layer + "ffns.0.activation.") for layer in (_ENCODER, _DECODER)
)
_ENCODER_NORMS = tuple((f"{_ENCODER}norm{k + 1}.", f"{_ENCODER}norms.{k}.") for k in range(2))
_LABELS = ("label_enc.", "denoising_generator.label_encoder.")

_PROJECTIONS = tuple(
    (f"{_DECODER}{ours}_{short}_proj.", f"{_DECODER}attentions.{number}.{long}_proj.")
    for number, ours in enumerate(("sa", "ca"))
    for short, long in (
        ("qpos_sine", "query_pos_sine"),
        ("qcontent", "query_content"),
        ("qpos", "query_pos"),
        ("kcontent", "key_content"),
        ("kpos", "key_pos"),
        ("v", "value"),
    )
)

DETREX_DN_DETR = Source(
    name="detrex",
    variant="dn_dab_detr",
    marks=(
        "backbone.stem.conv1.weight",
        "transformer.encoder.layers.0.attentions.0.attn.in_proj_weight",
        "transformer.decoder.layers.0.attentions.1.query_pos_sine_proj.weight",
    ),
    renames=(
        *_BACKBONE,
        _LABELS,
        ("refpoint_embed.", "anchor_box_embed."),
        ("transformer.decoder.norm.", "transformer.decoder.post_norm_layer."),
        (_ENCODER + "self_attn.", _ENCODER + "attentions.0.attn."),
        *_FEED_FORWARD,
        *_ENCODER_NORMS,
        *((f"{_DECODER}norm{k + 1}.", f"{_DECODER}norms.{k}.") for k in range(3)),
        *_PROJECTIONS,
        (_DECODER + "self_attn.out_proj.", _DECODER + "attentions.0.out_proj."),
        (_DECODER + "cross_attn.out_proj.", _DECODER + "attentions.1.out_proj."),
    ),
    twins=_SLOPES,
    older=(
        ("label_encoder.", "denoising_generator.label_encoder."),
        ("refpoint_embed.", "anchor_box_embed."),
    ),
    decides=(("model.backbone.dilation", False),),
    config=(("eval.num_select", 300),),
    contiguous_coco=True,
)

# Its DC5 models have torchvision's ResNet, all others that of detectron2.
DETREX_DN_DETR_DC5 = dataclasses.replace(
    DETREX_DN_DETR,
    marks=("backbone.body.conv1.weight", *DETREX_DN_DETR.marks[1:]),
    renames=(
        ("backbone.0.body.", "backbone.body."),
        *(pair for pair in DETREX_DN_DETR.renames if pair not in _BACKBONE),
    ),
    decides=(("model.backbone.dilation", True),),
)

_DEFORMABLE_LAYERS = (
    ("transformer.level_embed", "transformer.level_embeds"),
    (_ENCODER + "self_attn.", _ENCODER + "attentions.0."),
    *_FEED_FORWARD,
    *_ENCODER_NORMS,
    (_DECODER + "self_attn.", _DECODER + "attentions.0.attn."),
    (_DECODER + "cross_attn.", _DECODER + "attentions.1."),
    # detrex numbers norms in the order of their use, the official code does not.
    (_DECODER + "norm2.", _DECODER + "norms.0."),
    (_DECODER + "norm1.", _DECODER + "norms.1."),
    (_DECODER + "norm3.", _DECODER + "norms.2."),
)


def _neck(backbone_levels: int) -> Pairs:
    """The levels: the official code numbers the extra one behind those of the backbone."""
    extra = f"input_proj.{backbone_levels}"
    return (
        (extra + ".0.", "neck.extra_convs.0.conv."),
        (extra + ".1.", "neck.extra_convs.0.norm."),
        ("input_proj.{l}.0.", "neck.convs.{l}.conv."),
        ("input_proj.{l}.1.", "neck.convs.{l}.norm."),
    )


DETREX_DN_DEFORMABLE_DETR = Source(
    name="detrex",
    variant="dn_deformable_detr",
    marks=(
        "backbone.stem.conv1.weight",
        "neck.extra_convs.0.conv.weight",
        "refpoint_embed.weight",
    ),
    renames=(*_BACKBONE, *_neck(3), _LABELS, *_DEFORMABLE_LAYERS),
    older=(("label_encoder.", "denoising_generator.label_encoder."),),
    decides=(
        ("model.backbone.kind", "resnet"),
        ("model.backbone_levels", 3),
        ("model.extra_levels", 1),
    ),
    config=(("eval.num_select", 300),),
    contiguous_coco=True,
)

_LABEL_TABLE = "label_enc.weight"


def _with_no_object(state: State) -> dict[str, np.ndarray]:
    """The label table with a row "no object", the content of negatives here.

    The row is that of a new model: only training with denoising uses it. In detrex negatives have
    the content of their class.
    """
    table = state.get(_LABEL_TABLE)
    classes = state.get("class_embed.0.bias")
    if table is None or classes is None or len(table) != len(classes):
        return {}
    row = np.random.default_rng(0).standard_normal((1, table.shape[1]), np.float32)
    return {_LABEL_TABLE: np.concatenate([table, row])}


def _without_no_object(state: State) -> State:
    return {**state, _LABEL_TABLE: state[_LABEL_TABLE][:-1]}


DETREX_DINO = Source(
    name="detrex",
    variant="dn_dino_detr",
    marks=(
        "backbone.stem.conv1.weight",
        "neck.extra_convs.0.conv.weight",
        "transformer.enc_output.weight",
    ),
    absent=("neck.convs.3.conv.weight",),
    renames=(*_BACKBONE, *_neck(3), *_DEFORMABLE_LAYERS),
    decides=(
        ("model.backbone.kind", "resnet"),
        ("model.backbone_levels", 3),
        ("model.extra_levels", 1),
        ("model.indicator", False),
        ("model.query_scale", False),
        ("model.decoder_norm", True),
        ("model.proposal_score", "class"),
    ),
    config=(("eval.num_select", 300),),
    contiguous_coco=True,
    complete=_with_no_object,
    reduce=_without_no_object,
)

DETREX_DINO_5_LEVELS = dataclasses.replace(
    DETREX_DINO,
    marks=(*DETREX_DINO.marks, "neck.convs.3.conv.weight"),
    absent=(),
    renames=(*_BACKBONE, *_neck(4), *_DEFORMABLE_LAYERS),
    decides=tuple((dict(DETREX_DINO.decides) | {"model.backbone_levels": 4}).items()),
)

# Swin Transformers have the names of their authors there.
DETREX_DINO_SWIN = dataclasses.replace(
    DETREX_DINO,
    marks=("backbone.patch_embed.proj.weight", *DETREX_DINO.marks[1:]),
    renames=(("backbone.0.", "backbone."), *_neck(3), *_DEFORMABLE_LAYERS),
    decides=tuple((dict(DETREX_DINO.decides) | {"model.backbone.kind": "swin"}).items()),
)


# --- DAB-DETR: DN-DAB-DETR without the label table ------------------------------------------------


def _label_table(state: State) -> dict[str, np.ndarray]:
    """A label table whose matching queries have the content zero, as in DAB-DETR.

    The rows of the classes are those of a new model: only training with denoising uses them.
    """
    if "class_embed.weight" not in state:
        return {}
    classes, hidden_dim = state["class_embed.weight"].shape
    table = np.random.default_rng(0).standard_normal((classes + 1, hidden_dim - 1), np.float32)
    table[-1] = 0.0
    return {"label_enc.weight": table}


def _without_labels(state: State) -> State:
    if np.any(state["label_enc.weight"][-1]):
        raise ConversionError(
            "DAB-DETR has no place for the content of the matching queries (the last row of the "
            "label embedding), which is not zero in this model"
        )
    return {name: value for name, value in state.items() if name != "label_enc.weight"}


OFFICIAL_DAB_DETR = Source(
    name="dab-detr",
    variant="dn_dab_detr",
    marks=("refpoint_embed.weight", "transformer.decoder.layers.0.ca_qpos_sine_proj.weight"),
    absent=("label_enc.weight",),
    complete=_label_table,
    reduce=_without_labels,
)

# --- DETR: plain DN-DETR without what denoising adds ----------------------------------------------


def _denoising(state: State) -> dict[str, np.ndarray]:
    """The label table and the encoding of boxes of a new model."""
    if "class_embed.weight" not in state:
        return {}
    outputs, width = state["class_embed.weight"].shape
    rng = np.random.default_rng(0)
    found = {"label_enc.weight": rng.standard_normal((outputs, width - 1), np.float32)}
    for layer, inputs in enumerate((2 * width, width)):
        for leaf, shape in (("weight", (width, inputs)), ("bias", (width,))):
            values = rng.uniform(-1, 1, shape) / np.sqrt(inputs)
            found[f"box_enc.layers.{layer}.{leaf}"] = values.astype(np.float32)
    return found


OFFICIAL_DETR = Source(
    name="detr",
    variant="dn_detr_plain",
    marks=("query_embed.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_weight"),
    absent=("label_enc.weight",),
    complete=_denoising,
    reduce=lambda state: {k: v for k, v in state.items() if k not in dn_detr_plain.DENOISING},
)

# --- transformers ---------------------------------------------------------------------------------

_HF_ENCODER, _HF_DECODER = "model.encoder.layers.{i}.", "model.decoder.layers.{i}."
TRANSFORMERS_DAB_DETR = Source(
    name="transformers",
    variant="dn_dab_detr",
    marks=("model.query_refpoint_embeddings.weight", "model.encoder.layers.0.fc1.weight"),
    renames=(
        ("backbone.0.body.", "model.backbone.conv_encoder.model._backbone."),
        ("input_proj.", "model.input_projection."),
        ("refpoint_embed.", "model.query_refpoint_embeddings."),
        ("transformer.patterns.", "model.patterns."),
        ("transformer.decoder.norm.", "model.decoder.layernorm."),
        ("transformer.decoder.bbox_embed.", "model.decoder.bbox_embed."),
        ("bbox_embed.", "bbox_predictor."),
        *(
            (_ENCODER + official, _HF_ENCODER + theirs)
            for official, theirs in (
                ("norm1.", "self_attn_layer_norm."),
                ("norm2.", "final_layer_norm."),
                ("linear1.", "fc1."),
                ("linear2.", "fc2."),
                ("activation.", "activation_fn."),
            )
        ),
        *(
            (
                f"{_DECODER}{short}_{part}_proj.",
                f"{_HF_DECODER}{long}.{long}_{name}_proj.",
            )
            for short, long in (("sa", "self_attn"), ("ca", "cross_attn"))
            for part, name in (
                ("qpos_sine", "query_pos_sine"),
                ("qcontent", "query_content"),
                ("qpos", "query_pos"),
                ("kcontent", "key_content"),
                ("kpos", "key_pos"),
                ("v", "value"),
            )
        ),
        *(
            (_DECODER + official, _HF_DECODER + theirs)
            for official, theirs in (
                ("self_attn.out_proj.", "self_attn.self_attn.output_proj."),
                ("norm1.", "self_attn.self_attn_layer_norm."),
                ("cross_attn.out_proj.", "cross_attn.cross_attn.output_proj."),
                ("norm2.", "cross_attn.cross_attn_layer_norm."),
                ("norm3.", "mlp.final_layer_norm."),
                ("linear1.", "mlp.fc1."),
                ("linear2.", "mlp.fc2."),
                ("activation.", "mlp.activation_fn."),
            )
        ),
        ("transformer.encoder.", "model.encoder."),
        ("transformer.decoder.", "model.decoder."),
    ),
    packed=(
        (
            _ENCODER + "self_attn.in_proj_",
            tuple(f"{_HF_ENCODER}self_attn.{part}_proj." for part in "qkv"),
        ),
    ),
    config=(("eval.num_select", 100),),
    complete=_label_table,
    reduce=_without_labels,
)

SOURCES = (
    DETREX_DN_DETR,
    DETREX_DN_DETR_DC5,
    DETREX_DN_DEFORMABLE_DETR,
    DETREX_DINO,
    DETREX_DINO_5_LEVELS,
    DETREX_DINO_SWIN,
    TRANSFORMERS_DAB_DETR,
    OFFICIAL_DAB_DETR,
    OFFICIAL_DETR,
)


def source_of(state: State) -> Source:
    """The source that a state dict is of by its names, `OFFICIAL` if it is of none of `SOURCES`."""
    return next((source for source in SOURCES if source.is_of(state)), OFFICIAL)


def source_named(name: str, model: ConfigDict) -> Source:
    """The source of a name that has the model of `config.model`.

    Raises:
      ConversionError: there is none, with those that there are.
    """
    own = {f"model.{key}": value for key, value in flat_values(model).items()}
    known = {OFFICIAL.name: OFFICIAL}
    for source in SOURCES:
        if source.variant == model.name and all(own[key] == x for key, x in source.decides):
            known[source.name] = source
    if name not in known:
        raise ConversionError(
            f"{model.name} has no names of {name!r}, only of {', '.join(sorted(known))}"
        )
    return known[name]
