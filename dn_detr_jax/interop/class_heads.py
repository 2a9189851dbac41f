"""The parameters that depend on the classes: new ones for other classes, or in another order.

These are the class heads, of one or of all decoder layers and of proposals, and the label embedding
of denoising queries. Rows behind those of the classes stand for no class and are kept, and so is a
proposal head that scores objectness.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

_PATH = re.compile(r"(?:.*/)?(?:class_head(?:_\d+)?/(?:kernel|bias)|label_embedding)")


def head_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Those of the parameters whose shape or meaning depends on the classes.

    Examples:
      >>> head_paths(["class_head_5/bias", "box_head_5/layer0/bias", "label_embedding"])
      ('class_head_5/bias', 'label_embedding')
    """
    return tuple(path for path in paths if _PATH.fullmatch(path))


def objectness_head(model: ConfigDict) -> str | None:
    """The class head of proposals whose logit 0 stands for any object, None without one.

    Args:
      model: `config.model`.

    Examples:
      >>> objectness_head(ConfigDict({"decoder_layers": 6, "proposal_score": "objectness"}))
      'class_head_6'
    """
    if model.get("proposal_score") != "objectness":
        return None
    return f"class_head_{model.decoder_layers}"


def reset_heads(
    params: Mapping[str, np.ndarray],
    fresh: Mapping[str, np.ndarray],
    classes: tuple[int, int],
    objectness: str | None = None,
) -> dict[str, np.ndarray]:
    """Parameters of `params` with the class heads and the label embedding of `fresh`.

    Rows that stand for no class are kept: the last one of DN-DETR's label embedding is the content
    of the matching queries.

    Args:
      params: by path, of a trained model with any number of classes.
      fresh: by path, of the wanted model.
      classes: their number in `params` and in `fresh`.
      objectness: see `objectness_head`; none of its rows stands for a class.
    """
    theirs, ours = classes
    both = min(classes)
    result = {path: params[path] for path in fresh if not _PATH.fullmatch(path)}
    for path in head_paths(fresh):
        rows = _by_class(path, np.array(fresh[path]))
        trained = _by_class(path, np.asarray(params[path]))
        rows[ours:] = trained[theirs:]
        if _belongs(path, objectness):
            rows[:both] = trained[:both]
        result[path] = _by_class(path, rows)
    return result


def reorder_heads(
    params: Mapping[str, np.ndarray],
    fresh: Mapping[str, np.ndarray],
    classes: tuple[int, int],
    labels: Sequence[int | None],
    objectness: str | None = None,
) -> dict[str, np.ndarray]:
    """Parameters of `params` with the classes in another order.

    Args:
      params: by path, of a trained model.
      fresh: values of the wanted model by path, for unused labels.
      classes: their number in `params` and in `fresh`.
      labels: for each label of the wanted model the label in `params`, None for an unused one.
      objectness: as for `reset_heads`.
    """
    result = reset_heads(params, fresh, classes, objectness)
    for path in head_paths(fresh):
        if _belongs(path, objectness):
            continue
        theirs = _by_class(path, np.asarray(params[path]))
        ours = _by_class(path, result[path])
        for label, row in enumerate(labels):
            if row is not None:
                ours[label] = theirs[row]
    return result


def _belongs(path: str, head: str | None) -> bool:
    return path.rpartition("/")[0] == head


def _by_class(path: str, array: np.ndarray) -> np.ndarray:
    """A view of a head's parameter whose first axis is the class, and back."""
    return array.T if path.endswith("/kernel") else array
