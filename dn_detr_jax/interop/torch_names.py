"""The names and layouts of the official PyTorch DN-DAB-DETR, as one table for both directions.

`MODULES` pairs every module of the official state dict with ours, `KINDS` says what tensors a
module of a kind has and how their layouts differ. Import and export read the same rows, so that a
round trip is exact by construction. The backbone's rows are torchvision's and timm's names behind
`BACKBONE_PREFIX`.

PyTorch keeps linear weights as (out, in) and convolutions as (out, in, height, width); Flax has
(in, out) and (height, width, in, out). The attention of the encoder is packed there, query, key and
value in one matrix. A head that two modules share appears under both names.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

BACKBONE_PREFIX = "backbone.0.body."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of ours becomes a tensor of theirs, and back."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


_SAME = Layout(lambda x: x, lambda x: x)
_LINEAR = Layout(np.transpose, np.transpose)
_CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
# A 1x1 convolution there, a linear map over channels here.
_POINTWISE = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)
_SCALAR = Layout(lambda x: x.reshape(1), lambda x: x.reshape(()))

# kind -> (their leaf, our leaf, layout)
KINDS: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "linear": ((".weight", "/kernel", _LINEAR), (".bias", "/bias", _SAME)),
    "packed": (("_weight", "/kernel", _LINEAR), ("_bias", "/bias", _SAME)),
    "pointwise": ((".weight", "/kernel", _POINTWISE), (".bias", "/bias", _SAME)),
    "conv": ((".weight", "/kernel", _CONV),),
    "layer_norm": ((".weight", "/scale", _SAME), (".bias", "/bias", _SAME)),
    "batch_norm": (
        (".weight", "/scale", _SAME),
        (".bias", "/bias", _SAME),
        (".running_mean", "/mean", _SAME),
        (".running_var", "/var", _SAME),
    ),
    "slope": ((".weight", "/slope", _SCALAR),),
    "table": ((".weight", "", _SAME),),
}

_BLOCK = (BACKBONE_PREFIX + "layer{s}.{b}.", "backbone/layer{s}_block{b}/")
_ENCODER = ("transformer.encoder.layers.{i}.", "encoder/layer{i}/")
_DECODER = ("transformer.decoder.layers.{i}.", "decoder/layer{i}/")


def _rows(within: tuple[str, str], *rows: tuple) -> tuple[tuple, ...]:
    """Rows of modules inside a module, with the two prefixes put in front."""
    theirs, ours = within
    return tuple(
        (kind, theirs + name, tuple(ours + path for path in np.atleast_1d(paths)))
        for kind, name, paths in rows
    )


# (kind, their module, ours); several of ours are parts of theirs along its first axis.
MODULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *_rows(
        _ENCODER,
        ("packed", "self_attn.in_proj", ("query", "key", "value")),
        ("linear", "self_attn.out_proj", "out"),
        ("linear", "linear1", "feed_forward/linear1"),
        ("linear", "linear2", "feed_forward/linear2"),
        ("layer_norm", "norm1", "attention_norm"),
        ("layer_norm", "norm2", "feed_forward/norm"),
        ("slope", "activation", "feed_forward/activation"),
    ),
    *_rows(
        _DECODER,
        ("linear", "sa_qcontent_proj", "self_query_content"),
        ("linear", "sa_qpos_proj", "self_query_position"),
        ("linear", "sa_kcontent_proj", "self_key_content"),
        ("linear", "sa_kpos_proj", "self_key_position"),
        ("linear", "sa_v_proj", "self_value"),
        ("linear", "self_attn.out_proj", "self_out"),
        ("layer_norm", "norm1", "self_norm"),
        ("linear", "ca_qcontent_proj", "cross_query_content"),
        ("linear", "ca_qpos_proj", "cross_query_position"),
        ("linear", "ca_kcontent_proj", "cross_key_content"),
        ("linear", "ca_kpos_proj", "cross_key_position"),
        ("linear", "ca_v_proj", "cross_value"),
        ("linear", "ca_qpos_sine_proj", "cross_query_sine"),
        ("linear", "cross_attn.out_proj", "cross_out"),
        ("layer_norm", "norm2", "cross_norm"),
        ("linear", "linear1", "feed_forward/linear1"),
        ("linear", "linear2", "feed_forward/linear2"),
        ("layer_norm", "norm3", "feed_forward/norm"),
        ("slope", "activation", "feed_forward/activation"),
    ),
    *_rows(
        ("transformer.", ""),
        ("linear", "encoder.query_scale.layers.{j}", "encoder/query_scale/layer{j}"),
        ("linear", "decoder.query_scale.layers.{j}", "decoder/query_scale/layer{j}"),
        ("linear", "decoder.ref_point_head.layers.{j}", "decoder/reference_point_head/layer{j}"),
        ("linear", "decoder.ref_anchor_head.layers.{j}", "decoder/reference_size_head/layer{j}"),
        ("layer_norm", "decoder.norm", "decoder/norm"),
        ("table", "patterns", "patterns"),
    ),
    *_rows(
        ("", ""),
        ("linear", "class_embed", "class_head"),
        ("linear", "bbox_embed.layers.{j}", "box_head/layer{j}"),
        ("table", "label_enc", "label_embedding"),
        ("table", "refpoint_embed", "anchors"),
        ("pointwise", "input_proj", "input_proj"),
        ("conv", BACKBONE_PREFIX + "conv1", "backbone/stem_conv"),
        ("batch_norm", BACKBONE_PREFIX + "bn1", "backbone/stem_norm"),
    ),
    *_rows(
        _BLOCK,
        ("conv", "conv{k}", "conv{k}"),
        ("batch_norm", "bn{k}", "norm{k}"),
        ("conv", "downsample.0", "downsample_conv"),
        ("batch_norm", "downsample.1", "downsample_norm"),
    ),
)

# Their modules that are the same tensors under a second name: (pattern, the name in `MODULES`).
TIED: tuple[tuple[str, str], ...] = ((r"^transformer\.decoder\.(?=bbox_embed\.)", ""),)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One tensor of the official state dict.

    Attributes:
      name: in the official state dict.
      shape: there.
      paths: our parameters made of it, "/" between the parts; several are equal parts along its
        first axis.
      layout: of each part.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layout: Layout

    def split(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Our arrays by path, from their tensor of the right shape."""
        parts = np.split(tensor, len(self.paths)) if len(self.paths) > 1 else [tensor]
        return {
            path: np.ascontiguousarray(self.layout.from_torch(part)).reshape(self._part_shape(part))
            for path, part in zip(self.paths, parts, strict=True)
        }

    def _part_shape(self, part: np.ndarray) -> tuple[int, ...]:
        # `ascontiguousarray` makes scalars one-dimensional.
        return self.layout.from_torch(part).shape

    def join(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Their tensor from our arrays by path."""
        parts = [self.layout.to_torch(np.asarray(params[path])) for path in self.paths]
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A tensor of a row: templates of its name, of our paths, and of all leaves of our module."""

    pattern: re.Pattern
    name: str
    paths: tuple[str, ...]
    leaves: tuple[str, ...]
    layout: Layout


@functools.cache
def _rules() -> tuple[_Rule, ...]:
    rules = []
    for kind, theirs, ours in MODULES:
        leaves = tuple(ours[0] + leaf for _, leaf, _ in KINDS[kind])
        for their_leaf, our_leaf, layout in KINDS[kind]:
            paths = tuple(path + our_leaf for path in ours)
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(paths[0]))
            rules.append(_Rule(re.compile(pattern), theirs + their_leaf, paths, leaves, layout))
    return tuple(rules)


def torch_tensors(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[TorchTensor], list[str]]:
    """The official tensors that hold the given parameters.

    Args:
      shapes: shape of every parameter by path, for example {"class_head/bias": (91,)}.

    Returns:
      The tensors, and the paths that have no place in the official model (group norms).
    """
    tensors: list[TorchTensor] = []
    covered: set[str] = set()
    for path in shapes:
        for rule in _rules():
            match = rule.pattern.fullmatch(path)
            if not match:
                continue
            indices = match.groupdict()
            # A group norm has a scale and a bias as a batch norm has, and nothing else.
            if any(leaf.format(**indices) not in shapes for leaf in rule.leaves):
                continue
            paths = tuple(template.format(**indices) for template in rule.paths)
            # Shapes alone: a broadcast zero takes no memory.
            part = rule.layout.to_torch(np.broadcast_to(np.float32(0), shapes[path])).shape
            shape = (part[0] * len(paths), *part[1:])
            tensors.append(TorchTensor(rule.name.format(**indices), shape, paths, rule.layout))
            covered.update(paths)
            break
    return tensors, [path for path in shapes if path not in covered]


def canonical_name(name: str) -> str:
    """The name under which a tensor is in the table: of a tied one, that of its twin.

    Examples:
      >>> canonical_name("transformer.decoder.bbox_embed.layers.0.bias")
      'bbox_embed.layers.0.bias'
    """
    for pattern, replacement in TIED:
        name = re.sub(pattern, replacement, name)
    return name


def tied_names(name: str) -> tuple[str, ...]:
    """The other names under which the official state dict has the tensor `name`.

    Examples:
      >>> tied_names("bbox_embed.layers.0.bias")
      ('transformer.decoder.bbox_embed.layers.0.bias',)
    """
    return (f"transformer.decoder.{name}",) if name.startswith("bbox_embed.") else ()
