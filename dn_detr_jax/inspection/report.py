"""One HTML file that shows what a run has learned, or two runs side by side.

The file needs no network and no other file. Text, tables, diagrams and images are there without
scripts, which only choose, sort and filter.
"""

import base64
import dataclasses
import hashlib
import logging
import re
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from dn_detr_jax.errors import DataError
from dn_detr_jax.files import write_text_atomically
from dn_detr_jax.inspection import decoding, detections, figures
from dn_detr_jax.inspection.markup import Html, element, joined
from dn_detr_jax.inspection.runs import (
    Run,
    View,
    check_same_images,
    errors_by_image,
    evaluated_steps,
    measure_stability,
    open_run,
    view_images,
)
from dn_detr_jax.inspection.scenes import library
from dn_detr_jax.inspection.stability import Stability

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a report shows.

    Attributes:
      step: "best", "latest" or a number.
      hardest: number of images with the most errors.
      traced: ids of the images whose decoding is shown; empty: the hardest one, and one with the
        median number of errors.
      stability_images: number of images that kept checkpoints are compared on.
      data_dir: folder of the data, if it is not where the config says.
    """

    step: str | int = "best"
    hardest: int = 8
    traced: tuple[int, ...] = ()
    stability_images: int = 100
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A run with everything that a report shows of it.

    Attributes:
      run: evaluated.
      views: images by id.
      stability: of its kept checkpoints.
      evaluated: steps at which the training evaluated.
    """

    run: Run
    views: dict[int, View]
    stability: Stability
    evaluated: list[int]


def write_report(workdirs: Sequence[Path], out: Path, options: Options) -> None:
    """Inspects one run or several, and writes the report.

    Args:
      workdirs: of the runs; several are compared.
      out: HTML file, which is replaced.
      options: what is shown.

    Raises:
      CheckpointError, ConfigError, DataError: a run, its data or an image is missing, or the runs
        can't be compared.
    """
    names = _names(workdirs)
    runs = [
        open_run(name, workdir, options.step, options.data_dir)
        for name, workdir in zip(names, workdirs, strict=True)
    ]
    check_same_images(runs)
    hardest, traced = _choose_images(runs, options)
    inspected = []
    for run in runs:
        views = view_images(run, hardest, traced)
        shown = [image_id for image_id in traced if image_id in views]
        stability = measure_stability(run, shown, options.stability_images)
        inspected.append(Inspected(run, views, stability, evaluated_steps(run)))
    write_text_atomically(out, render(inspected, hardest, traced))


def render(inspected: Sequence[Inspected], hardest: Sequence[int], traced: Sequence[int]) -> str:
    """Returns the page of inspected runs.

    Args:
      inspected: the runs.
      hardest: ids of the images with the most errors.
      traced: ids of the images whose decoding is shown.
    """
    runs = [of_run.run for of_run in inspected]
    views = {image_id: view for of_run in inspected for image_id, view in of_run.views.items()}
    sections = (
        ("summary", "Summary", figures.summary(runs)),
        ("curves", "Curves", figures.curves(runs)),
        ("classes", "Classes and sizes", figures.classes(runs)),
        ("confusion", "Confusion", figures.confusion(runs)),
        ("thresholds", "Thresholds", figures.thresholds(runs)),
        ("calibration", "Calibration", figures.calibration(runs)),
        ("images", "Hardest images", detections.hardest(inspected, hardest)),
        ("decoding", "Decoding", decoding.decoded(inspected, traced)),
        ("denoising", "Denoising", decoding.denoised(inspected, traced)),
        ("matching", "Matching", decoding.matched(inspected, traced)),
    )
    navigation = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    parts = [
        element("section", element("h2", title), content, id=name)
        for name, title, content in sections
    ]
    title = " and ".join(run.name for run in runs)
    pixels = {f"image-{image_id}": view.pixels for image_id, view in views.items()}
    body = joined(
        [
            element("h1", title),
            element("nav", *navigation),
            library(pixels),
            *parts,
        ]
    )
    return _page(title, body)


def _page(title: str, body: Html) -> str:
    """Fills the template; its policy allows the template's own script alone."""
    template = (resources.files("dn_detr_jax.inspection") / "page.html").read_text("utf-8")
    found = re.search(r"<script>(.*)</script>", template, re.DOTALL)
    assert found is not None
    digest = hashlib.sha256(found[1].encode()).digest()
    return string.Template(template).substitute(
        title=element("title", title)[len("<title>") : -len("</title>")],
        body=body,
        script_hash=base64.b64encode(digest).decode(),
    )


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Names runs by their folders; by whole paths if those are equal."""
    short = [workdir.resolve().name for workdir in workdirs]
    return short if len(set(short)) == len(short) else [str(workdir) for workdir in workdirs]


def _choose_images(runs: Sequence[Run], options: Options) -> tuple[list[int], list[int]]:
    """Chooses the images with the most errors of all runs together, and those to trace."""
    errors = [errors_by_image(run) for run in runs]
    total = {image_id: sum(of_run[image_id] for of_run in errors) for image_id in errors[0]}
    order = sorted(total, key=lambda image_id: (-total[image_id], image_id))
    missing = [image_id for image_id in options.traced if image_id not in total]
    if missing:
        raise DataError(
            f"--images: there is no image {missing[0]} in the validation split; ids go from "
            f"{min(total)} to {max(total)}"
        )
    traced = options.traced or tuple(dict.fromkeys((order[0], order[len(order) // 2])))
    return order[: options.hardest], list(traced)
