"""Runs small inputs made from public bug reports, and compares the outcomes with the right ones.

    python -m benchmarks.public_cases --cases ../shared/cases
    python -m benchmarks.public_cases --cases ../shared/cases --only ctrl_c --only tilde

Each folder of `--cases` with a `run.sh` is a case. `run.sh` finds the checkout in REPO and an
interpreter in PYTHON, and works on a temporary copy of its data. `EXPECTED` has the text that it
must print or must not print and its exit status, taken from the reports and not from this program's
output. The command prints a line for each case; its exit status is 1 if a case fails or is missing
from `EXPECTED`.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import common
from dn_detr_jax.commands.command_line import run_main
from dn_detr_jax.errors import DataError

FLAGS = flags.FLAGS
_TRAINABLE = r"This can be trained on\."
_AP = r"AP +@\[ IoU=0\.50:0\.95 .*= 0\.283"


@dataclasses.dataclass(frozen=True)
class Expected:
    """The right outcome of a case.

    Attributes:
      printed: patterns that the output must contain, stdout and stderr together.
      absent: patterns that it must not contain, besides a traceback.
      status: exit status; None: any.
      equal: a pattern of two groups, which must be equal.
      script: commands that replace those of `run.sh`, if it names a module that has moved or
        uses an option that this `tail` does not take.
    """

    printed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    status: int | None = 0
    equal: str = ""
    script: str = ""


EXPECTED = {
    "all_objects_crowd": Expected(("crowd",), (_TRAINABLE,), None),
    "bom": Expected((r"\b0 errors",), status=0),
    "bucket_as_workdir": Expected((r"^error: .*\bmount",), ("compiled",), 1),
    "ctrl_c": Expected((r"saved step \d+; the same command continues",)),
    "cvat_default_layout": Expected(("instances_default.json",), status=1),
    "empty_bbox": Expected((r"bbox.*\[\]",), (_TRAINABLE,), 1),
    "eval_only_beside_a_training": Expected(
        equal=r"logged: (\d+), in metrics\.jsonl: (\d+)", status=0
    ),
    "eval_only_other_class_ids": Expected((_AP,)),
    "eval_only_without_training_data": Expected((_AP, r"no figures of denoising")),
    "exif_180_annotated_as_shown": Expected((r"orientation",), status=None),
    "huge_picture": Expected((), ("damaged",), None),
    "image_listed_twice": Expected((r"warning: image that is listed more than once",), status=None),
    "latin1_terminal": Expected((r"\\[xuU]|errors",), status=None),
    "macos_screenshot_names": Expected((r"\b0 errors",)),
    "more_objects_than_queries": Expected((r"model\.num_queries",)),
    "no_home_directory": Expected(),
    "normalised_boxes": Expected((r"pixel|share",), (_TRAINABLE,), None),
    "picture_replaced_after_packing": Expected((r"AP +@\[", r"\b0 errors")),
    "pictures_of_12_bits": Expected(
        (r"largest value: (1[0-9]{2}|2[0-9]{2})\b",),
        script='py -c "import sys; from dn_detr_jax.inference.predictor import read_image as r; '
        "print('largest value:', r(sys.argv[1]).max())\" $D/val/n_gray12bit_in16.tif",
    ),
    "predict_folder_suffixes": Expected((r"^7$",)),
    "predict_ids_of_annotation_file": Expected(
        (r"AP 0\.2826 AP50 0\.6018",),
        script="predict $D/val --out $T/o --threshold 0 --nodraw "
        "--annotations $D/annotations/instances_val.json && "
        "py $L/coco_ap.py $D/annotations/instances_val.json $T/o/detections.json",
    ),
    "split_in_name": Expected((r"data\.train\.images|names",), (_TRAINABLE,), 1),
    "string_boxes": Expected((r"bbox|box",), (_TRAINABLE,), 1),
    "suffix_case": Expected((r"\.jpg",), (_TRAINABLE,), 1),
    "tilde": Expected((_AP, r"/home/found$"), status=0),
    "two_processes_one_workdir": Expected(
        (r"in use by process \d+ on ", r"checkpoint .*checkpoints/\d+"),
        script="for n in 1 2; do $PYTHON $L/launch.py $T/log$n $T/pid$n train.py "
        "--config $L/one.py --config.data.dir=$D --workdir $T/w --config.train.batch_size=2 "
        '--config.train.duration="600 steps" --config.train.checkpoint_every="100 steps" '
        '--config.train.eval_every="600 steps" & sleep 3; done; wait; '
        "for n in 1 2; do tail -n 4 $T/log$n; done",
    ),
    "weights_of_torch_compile": Expected((), ("the source is no DN-DAB-DETR",), None),
    "windows_backslash": Expected((r"backslash",), (_TRAINABLE,), 1),
    "xyxy_boxes": Expected((r"corners",), (_TRAINABLE,), None),
}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("cases", None, "The folder with a folder for each case.", required=True)
    flags.DEFINE_multi_string("only", [], "Names of cases to run; all by default.")
    flags.DEFINE_integer("timeout", 1200, "Seconds for a case.", lower_bound=1)
    flags.DEFINE_bool("verbose", False, "Show the output of the cases that fail.")


def failures(output: str, status: int, expected: Expected) -> list[str]:
    """Returns descriptions of what is wrong with an outcome.

    Examples:
      >>> failures("AP = 0.1", 0, Expected(printed=("0.283",)))
      ["'0.283' is not printed"]
      >>> failures("logged: 3, kept: 4", 1, Expected(equal=r"logged: (.*), kept: (.*)"))
      ['exit status 1, expected 0', '3 and 4 differ']
    """
    found = []
    if expected.status is not None and status != expected.status:
        found.append(f"exit status {status}, expected {expected.status}")
    for pattern in expected.printed:
        if not re.search(pattern, output, re.MULTILINE):
            found.append(f"{pattern!r} is not printed")
    for pattern in (*expected.absent, r"^Traceback"):
        if re.search(pattern, output, re.MULTILINE):
            found.append(f"{pattern!r} is printed")
    if expected.equal:
        match = re.search(expected.equal, output, re.MULTILINE)
        if match is None:
            found.append(f"{expected.equal!r} is not printed")
        elif match[1] != match[2]:
            found.append(f"{match[1]} and {match[2]} differ")
    return found


def run_case(folder: Path, expected: Expected) -> tuple[str, int]:
    """Runs a case; returns its output and its exit status."""
    environment = os.environ | {
        "REPO": str(common.ROOT),
        "PYTHON": sys.executable,
        "_POSIX2_VERSION": "199209",  # `tail -2` of several files
    }
    environment.pop("PYTHONPATH", None)
    script = folder / "run.sh"
    if expected.script:
        script.write_text(f'. "$(dirname "$0")/../_lib/env.sh"; {expected.script}\n')
    done = subprocess.run(
        ["bash", str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=FLAGS.timeout,
        check=False,
        start_new_session=True,
    )
    return done.stdout.decode("utf-8", "replace"), done.returncode


def copy_cases(source: Path, target: Path) -> None:
    """Copies the cases, so that scripts can be replaced; adds the module that `one.py` imports."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    library = target / "_lib"
    if (library / "tiny.py").exists() and not (library / "tiny_.py").exists():
        shutil.copy(library / "tiny.py", library / "tiny_.py")


def main(argv: Sequence[str]) -> None:
    """Runs the cases, and exits with 1 if one fails."""
    del argv
    cases = sorted(path.parent.name for path in Path(FLAGS.cases).glob("*/run.sh"))
    unknown = sorted(set(FLAGS.only) - set(cases))
    if unknown or not cases:
        raise DataError(f"--cases={FLAGS.cases}: there is no case {', '.join(unknown)}".rstrip())
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        copied = Path(name) / "cases"
        copy_cases(Path(FLAGS.cases), copied)
        for case in FLAGS.only or cases:
            start = time.monotonic()
            expected = EXPECTED.get(case)
            if expected is None:
                wrong, output = ["the right outcome is not known here"], ""
            else:
                try:
                    output, status = run_case(copied / case, expected)
                    wrong = failures(output, status, expected)
                except subprocess.TimeoutExpired:
                    wrong, output = [f"not done after {FLAGS.timeout} seconds"], ""
            failed += bool(wrong)
            verdict = f"FAILS: {'; '.join(wrong)}" if wrong else "passes"
            print(f"{case:<34} {time.monotonic() - start:6.1f} s  {verdict}", flush=True)
            if wrong and FLAGS.verbose:
                print(output, flush=True)
    print(f"{failed} of {len(FLAGS.only or cases)} cases fail")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    define_flags()
    run_main(main)
