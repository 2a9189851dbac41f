"""The commands: their table, help without JAX, and their one-line errors."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

import dn_detr_jax
from dn_detr_jax.commands import command_line, dispatch
from dn_detr_jax.config import base_config
from dn_detr_jax.data.layout import find_split
from dn_detr_jax.errors import ConfigError
from dn_detr_jax.training.compile_cache import use_compile_cache

_ROOT = Path(__file__).parent.parent

# Runs in a process of its own, so that nothing has imported JAX yet.
_ALL_HELP = """
import sys
from absl import flags
from dn_detr_jax.commands import command_line, dispatch
for name in dispatch.COMMANDS:
    before = set(flags.FLAGS)
    module = dispatch.load(name)
    module.define_flags()
    own = set(flags.FLAGS) - before
    text = command_line.help_text(module, f"dn-detr {name}", own)
    assert text.startswith(f"usage: dn-detr {name} [FLAGS]"), text
    assert all(f"--{flag}" in text or f"--[no]{flag}" in text for flag in own), text
    for flag in own & {"workdir", "out", "annotations", "json"}:
        assert isinstance(flags.FLAGS[flag].parser, command_line._PathParser), (name, flag)
    print(name, ",".join(sorted(own)))
    for flag in own:
        delattr(flags.FLAGS, flag)
print(dispatch.overview("dn-detr"))
heavy = {"jax", "flax", "orbax", "matplotlib", "cv2", "pycocotools"} & set(sys.modules)
assert not heavy, heavy
"""

# Likewise: each command that has --config, with a key that there is not.
_ALL_WRONG_KEYS = """
import sys
from absl import flags
from dn_detr_jax.commands import command_line, dispatch
for name in dispatch.COMMANDS:
    before, module = set(flags.FLAGS), dispatch.load(name)
    module.define_flags()
    own = set(flags.FLAGS) - before
    for flag in own:
        delattr(flags.FLAGS, flag)
    if "config" not in own:
        continue
    sys.argv = [name, "--config=digits", "--config.dn.gruops=3"]
    try:
        command_line.run_command(module, name)
    except SystemExit as end:
        print(name, end)
    for flag in own:
        delattr(flags.FLAGS, flag)
heavy = {"jax", "flax", "orbax", "matplotlib", "cv2", "pycocotools"} & set(sys.modules)
assert not heavy, heavy
"""

# A process that a shell has started in the background ignores SIGINT, and hands that on.
_SLEEPS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from dn_detr_jax.commands.command_line import run_main
def main(argv):
    print("ready", flush=True)
    time.sleep(60)
run_main(main)
"""


def _lines_printed_by(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_command_has_help_without_jax():
    """Catches a heavy import at the top of a command, which delays every usage error."""
    lines = _lines_printed_by(_ALL_HELP)
    table = dict(line.split(" ", 1) for line in lines[: len(dispatch.COMMANDS)])
    assert set(table) == set(dispatch.COMMANDS)
    assert {"config", "workdir", "step", "eval_only"} <= set(table["train"].split(","))
    assert {"workdir", "out", "annotations", "threshold"} <= set(table["predict"].split(","))
    for name in dispatch.COMMANDS:
        (shown,) = (line for line in lines if line.startswith(f"  {name} "))
        assert 20 < len(shown) < 90 and shown.endswith(".")


def test_every_command_names_a_wrong_key_without_jax():
    """Catches seconds of imports before the answer to a slip of the pen."""
    lines = _lines_printed_by(_ALL_WRONG_KEYS)
    assert {"train", "eval", "check", "canvases", "preview", "preflight"} <= {
        line.split()[0] for line in lines
    }
    for line in lines:
        assert "--config.dn.gruops: there is no such key; did you mean dn.groups?" in line


def test_a_closed_pipe_is_not_an_error():
    """Catches an error for a closed pipe, as of `dn-detr --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dn_detr_jax", "--help"],
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_installed_package_has_the_same_command():
    scripts = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"dn-detr": "dn_detr_jax.commands.dispatch:main"}
    assert callable(dispatch.main)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predct"], "error: 'predct' is not a command; did you mean predict?\n"),
        (["xyz"], "error: 'xyz' is not a command; commands: train, eval, "),
        (["predict", "--workdr=x"], "error: Unknown command line flag 'workdr'"),
        (["train", "--config=no_such"], "error: --config=no_such: there is no such file"),
        (["train", "--config=finetune:x"], "error: config.data.augment = 'x': one of the presets"),
        (["train", "--config=finetune:x", "--config.seed=1"], "error: config.data.augment = 'x': "),
        (["eval", "--config=digits", "--config.dn.group=1"], "did you mean dn.groups?"),
        (
            ["train", "--config=digits", "--workdir=gs://bucket/run"],
            "error: flag --workdir=gs://bucket/run: expected a local path; mount a bucket first",
        ),
        (["export-torch", "s3://bucket/run", "--out=x.pth"], "error: s3://bucket/run: expected a"),
        (["visualize", "a.png", "runs/x"], "error: runs/x: expected NAME=WORKDIR"),
        (
            ["visualize-noise", "noise", "--config=digits", "--config.dn.groups=0"],
            "error: config.dn.groups = 0: at least 1: there is no noise to draw",
        ),
    ],
)
def test_a_wrong_command_is_one_line(arguments, expected, monkeypatch, capsys):
    """Runs in this process; absl's flags are global, and each command has its own."""
    monkeypatch.setattr(sys, "argv", ["dn-detr", *arguments])
    before = set(flags.FLAGS)
    try:
        with pytest.raises(SystemExit) as ended:
            dispatch.main()
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    message = f"{ended.value.code}\n"
    assert expected in message and message.count("\n") == 1
    assert capsys.readouterr().out == ""


def test_the_config_reference_is_printed(monkeypatch, capsys):
    argv = ["x", "--config=digits", "--config.dn.groups=7", "--help_config"]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as ended:
        command_line._parse_flags(argv, ())
    assert ended.value.code == 0
    assert "dn.groups = 7  (default" in capsys.readouterr().out


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    """Catches a folder named `~`: bash leaves the tilde in --workdir=~/run to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    values = flags.FlagValues()
    flags.DEFINE(command_line._PathParser(), "workdir", None, "", flag_values=values)
    values(["program", "--workdir=~/run"])
    assert values.workdir == str(tmp_path / "run")
    assert command_line.local_path("~/a.jpg") == tmp_path / "a.jpg"
    (tmp_path / "val").mkdir()
    (tmp_path / "val.json").touch()
    split = ConfigDict({"annotations": "~/val.json", "images": "~/val"})
    found = find_split(Path("/data"), "validation", split)
    assert (found.annotations, found.images) == (tmp_path / "val.json", tmp_path / "val")


def test_a_latin_1_terminal_gets_escapes():
    """Catches a UnicodeEncodeError in the middle of a report, or of an error."""
    main = "print('\u732b \xe9'); raise OSError('\u732b')"
    imports = "from dn_detr_jax.commands.command_line import run_main"
    program = f"{imports}\ndef main(argv): {main}\nrun_main(main)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(_ROOT), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"\\u732b \xe9\n"
    assert (done.returncode, done.stderr) == (1, b"error: \\u732b\n")


def test_ctrl_c_ends_a_command_with_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPS],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.split()) == (130, ["interrupted"])


def test_without_a_home_directory_programs_are_not_kept(monkeypatch, caplog):
    """Catches a prediction that ends because ~/.cache can't be found."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        use_compile_cache("~/.cache/dn_detr_jax")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert re.search("programs are not kept: .*home directory", caplog.text)


def test_train_and_evaluate_are_public_and_check_the_work_directory():
    """Without importing what they compute with: wrong arguments are found first."""
    for function in (dn_detr_jax.train, dn_detr_jax.evaluate):
        with pytest.raises(ConfigError, match=r"^--workdir = 'gs://b/run': expected a local path"):
            function(base_config(), "gs://b/run")
    assert {"train", "evaluate", "load", "Predictor", "Detections"} <= set(dir(dn_detr_jax))
