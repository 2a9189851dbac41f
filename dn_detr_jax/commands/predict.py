"""Finds the objects in pictures: detections as JSON, and the pictures with boxes drawn.

    python -m dn_detr_jax predict --workdir runs/coco_r50 street.jpg photographs/ --out found

Arguments are pictures and folders, of which the pictures are taken, without those of subfolders.
`found` then holds

- `detections.json`: a list of {"image_id", "category_id", "bbox": [left, top, width, height],
  "score", "file_name"}, as pycocotools' `loadRes` reads it, boxes in pixels of the upright picture;
- `images.json`: a list of {"id", "file_name", "width", "height"}. Where all the names are
  different numbers, such as 000000000139.jpg, they are the ids; else the pictures are numbered
  from 0;
- `pictures/`: those with boxes; `--nodraw` leaves them out.

A file that can't be read is named, the others go on, and the exit status is 1. With `--threshold=0`
all detections are written that `config.eval.num_select` of the run allows: what the COCO metrics
are computed from.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from dn_detr_jax.commands.command_line import define_step_flag, log_to_terminal, run_main
from dn_detr_jax.errors import DataError
from dn_detr_jax.inference.predictor import Detections, Predictor, load, read_picture
from dn_detr_jax.visualize.visualize import draw_detections, save_jpeg

FLAGS = flags.FLAGS
logger = logging.getLogger("dn_detr_jax.commands.predict")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_pictures(arguments: Sequence[str | os.PathLike]) -> list[Path]:
    """The files that are given, and the pictures in the folders that are, each once.

    Raises:
      DataError: something that is not there, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for argument in map(Path, arguments):
        if argument.is_dir():
            inside = sorted(p for p in argument.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(f"{argument}: a folder without pictures ({', '.join(SUFFIXES)})")
            found |= dict.fromkeys(inside)
        elif argument.exists():
            found[argument] = None
        else:
            raise DataError(f"{argument}: there is no such file or folder")
    return list(found)


def image_ids(paths: Sequence[Path]) -> list[int]:
    """The numbers that the files are named with, if all are and they differ; else 0, 1, ...

    Examples:
      >>> image_ids([Path("000000000139.jpg"), Path("000000000285.jpg")])
      [139, 285]
      >>> image_ids([Path("1.jpg"), Path("01.jpg"), Path("2.jpg")])
      [0, 1, 2]
    """
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdecimal() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(len(paths)))


def coco_results(found: Detections, image_id: int, file_name: str) -> list[dict]:
    """Detections of a picture in COCO's format of results, with the name of its file."""
    corners = found.boxes
    bboxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_id),
            "bbox": [_shortest(value) for value in bbox],
            "score": _shortest(score),
            "file_name": file_name,
        }
        for category_id, bbox, score in zip(found.category_ids, bboxes, found.scores, strict=True)
    ]


def _shortest(value: np.float32) -> float:
    """The number whose text is the shortest that stands for this float32."""
    return float(str(value))


def run(
    predictor: Predictor, paths: Sequence[Path], out: Path, threshold: float, draw: bool = True
) -> list[str]:
    """Predicts, and writes what the module's text says into `out`.

    Returns:
      A message for each file that can't be read.

    Raises:
      OSError: `out` can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    ids = image_ids(paths)
    names = _output_names(paths, ids)
    failures: list[str] = []
    results: dict[int, list[dict]] = {}
    images: dict[int, dict] = {}

    def readable() -> Iterator[tuple[tuple[int, np.ndarray], np.ndarray]]:
        for index, path in enumerate(tqdm(paths, unit="picture", disable=None)):
            try:
                image = read_picture(path)
            except (DataError, OSError) as error:
                failures.append(str(error) if isinstance(error, DataError) else f"{path}: {error}")
                continue
            yield (index, image), image

    for (index, image), found in predictor.stream(readable(), threshold):
        image_id, file_name = ids[index], str(paths[index])
        results[index] = coco_results(found, image_id, file_name)
        height, width = found.size
        images[index] = {
            "id": image_id, "file_name": file_name, "width": width, "height": height
        }  # fmt: skip
        if draw:
            drawn = draw_detections(
                image, found.boxes, found.labels, found.scores, found.class_names
            )
            save_jpeg(drawn, out / "pictures" / names[index])
    in_order = sorted(results)
    _write_json(out / "detections.json", [line for i in in_order for line in results[i]])
    _write_json(out / "images.json", [images[i] for i in in_order])
    return failures


def _output_names(paths: Sequence[Path], ids: Sequence[int]) -> list[str]:
    """A file name for each drawn picture, with its id where names alone are not different."""
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}_{image_id}" for stem, image_id in zip(stems, ids, strict=True)]
    return [f"{stem}.jpg" for stem in stems]


def _write_json(path: Path, lines: list[dict]) -> None:
    """A list with one entry per line, complete or not there at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = ",\n".join(json.dumps(line) for line in lines)
    unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    unfinished.replace(path)


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say."""
    log_to_terminal()
    paths = find_pictures(argv[1:])
    # A batch that is not full takes as long as a full one.
    batch_size = min(FLAGS.batch_size, len(paths))
    predictor = load(FLAGS.workdir, FLAGS.step, batch_size=batch_size)
    failures = run(predictor, paths, Path(FLAGS.out), FLAGS.threshold, FLAGS.draw)
    for failure in failures:
        logger.error("can't be read: %s", failure)
    print(f"Wrote {len(paths) - len(failures)} pictures' detections to {FLAGS.out}")
    if failures:
        raise DataError(f"{len(failures)} of {len(paths)} files can't be read, named above")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Of a training or an import.")
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the results; files of the same names are replaced.",
    )
    flags.DEFINE_float("threshold", 0.5, "Least score.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("batch_size", 8, "Pictures at a time.", lower_bound=1)
    flags.DEFINE_bool("draw", True, "Write pictures with boxes.")
    define_step_flag("best")
    flags.mark_flags_as_required(["workdir", "out"])


if __name__ == "__main__":
    _define_flags()
    run_main(main, arguments=("PICTURES...",))
