"""Classes of a run against classes of data: labels are matched by class name.

A label is an output of the model. Two annotation files of the same classes may number them
differently, so that their labels differ; the names say which label is which.
"""

from collections import Counter
from collections.abc import Sequence

from dn_detr_jax.data.coco_classes import Category, assumed_categories
from dn_detr_jax.errors import CheckpointError

_MOST_NAMED = 5  # classes named in an error


def match_labels(
    run: Sequence[Category], data: Sequence[Category], run_name: str, data_name: str
) -> tuple[int, ...]:
    """Finds the label of the run for every label of the data.

    Args:
      run: categories of the run by label, an empty name where a label is unused; none, or those
        of `assumed_categories`, if the run does not know its classes.
      data: categories of the data by label, an empty name where a label is unused.
      run_name: of the run, for the message.
      data_name: of the data, for the message.

    Returns:
      For each label of the data the label of the run with the same class name. Labels keep their
      position if the run does not know its classes, and where a label of the data is unused.

    Raises:
      CheckpointError: the sets of class names differ, or a name occurs twice in another order.

    Examples:
      >>> run = [Category(1, "square"), Category(2, "disc")]
      >>> match_labels(run, [Category(4, "disc"), Category(7, "square")], "the run", "the data")
      (1, 0)
    """
    unknown = not run or tuple(run) == assumed_categories(len(run))
    if (unknown and len(run) in (0, len(data))) or _names(run) == _names(data):
        return tuple(range(len(data)))
    _check_same_names(run, data, run_name, data_name)
    label_of = {category.name: label for label, category in enumerate(run)}
    return tuple(
        label_of[category.name] if category.name else label for label, category in enumerate(data)
    )


def matched_categories(
    run: Sequence[Category], data: Sequence[Category], labels: Sequence[int]
) -> tuple[Category, ...]:
    """Returns the categories of the data in the order of the run's labels.

    Args:
      run: categories of the run by label.
      data: categories of the data by label.
      labels: from `match_labels`.

    Examples:
      >>> run = [Category(1, "square"), Category(2, "disc")]
      >>> matched_categories(run, [Category(4, "disc"), Category(7, "square")], (1, 0))
      (Category(id=7, name='square'), Category(id=4, name='disc'))
    """
    if tuple(labels) == tuple(range(len(data))) and len(run) in (0, len(data)):
        return tuple(data)
    found = {label: category for label, category in zip(labels, data, strict=True) if category.name}
    unused = [Category(-1 - label, "") for label in range(len(run))]
    return tuple(found.get(label, unused[label]) for label in range(len(run)))


def _names(categories: Sequence[Category]) -> list[str]:
    return [category.name for category in categories]


def _check_same_names(
    run: Sequence[Category], data: Sequence[Category], run_name: str, data_name: str
) -> None:
    counts = [Counter(name for name in _names(part) if name) for part in (run, data)]
    missing, unknown = (counts[0] - counts[1]), (counts[1] - counts[0])
    if missing or unknown:
        differing = [
            f"only {where}: {_listed(sorted(part))}"
            for where, part in ((f"in {run_name}", missing), (f"in {data_name}", unknown))
            if part
        ]
        raise CheckpointError(
            f"{data_name} has other classes than {run_name}: {'; '.join(differing)}"
        )
    twice = sorted(name for name, count in counts[0].items() if count > 1)
    if twice:
        raise CheckpointError(
            f"{data_name} numbers its classes differently from {run_name}, and {_listed(twice)} "
            "is the name of several classes: labels can't be matched by name"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_NAMED]))
    more = len(names) - _MOST_NAMED
    return shown + (f" and {more} more" if more > 0 else "")
