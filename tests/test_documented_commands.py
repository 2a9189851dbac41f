"""Every command in the documents parses: programs, flags, config keys and values, files.

Commands are taken from code blocks and from inline code. Here nothing is computed or downloaded:
`test_run_documents` runs those of code blocks.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from dn_detr_jax.config import find_config, validate
from dn_detr_jax.config.experiments import experiment_names
from dn_detr_jax.errors import Error

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("tests/data/**/README.md"))
SHELL = ("", "sh", "bash", "shell", "console")
PROGRAM = re.compile(r"(?:^|(?<=\s)|(?<=[\"'(;&]))(python |python3 |dn-detr |make |pip )")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
      place: document and line.
      words: as a shell splits them.
      partial: in running text or with "...": required flags and arguments may be left out.
      needs: what this machine may lack, of the comment "# needs ..." above it in its block.
    """

    place: str
    words: tuple[str, ...]
    partial: bool = False
    needs: str = ""


def blocks(text):
    """Yields the first line number and the text of each code block of a shell."""
    pattern = r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n(?:\n(?= {4}))?)+)"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        if match[3] or match[1] in SHELL:
            group = 3 if match[3] else 2
            yield text.count("\n", 0, match.start(group)) + 1, match[group]


def without_blocks(text):
    """Returns a text whose code blocks are empty lines, so that line numbers stay."""
    text = re.sub(
        r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", lambda m: "\n" * m[0].count("\n"), text)


def split(line):
    """Splits a command line from the program on; returns None if there is none.

    Optional parts in brackets are taken; what a shell does with the output is left out.
    """
    match = PROGRAM.search(line)
    if match is None:
        return None
    line = line[match.start(1) :]
    if line.count('"') % 2:  # the command of another program, in its quotes
        line = line.rpartition('"')[0]
    line = re.sub(r"(?<=\s)\[(.*?)\]", r"\1", line)
    words = shlex.split(line, comments=True)
    for end, word in enumerate(words):
        if word in ("|", ">", "&&", "&", "||"):
            words = words[:end]
            break
    return words


def command(place, words, partial=False, needs=""):
    """Makes a command without "..."."""
    left = tuple(word for word in words if word != "...")
    return Command(place, left, partial or len(left) < len(words), needs)


def commands_of(text, name):
    """Returns the commands of a document."""
    found = []
    for first, block in blocks(text):
        joined = re.sub(r"\\\n", lambda _: " \r", block)  # \r keeps the line numbers
        # A command in the quotes of another program may have several lines.
        joined = re.sub(r'="\n', '="\r', joined)
        line, needs = first, ""
        for text_line in joined.split("\n"):
            if match := re.fullmatch(r" *# needs (.*)", text_line):
                needs = match[1]
            for part in text_line.replace("\r", " ").split(" && "):
                words = split(part.strip())
                if words:
                    found.append(command(f"{name}:{line}", words, needs=needs))
            line += 1 + text_line.count("\r")
    prose = without_blocks(text)
    for match in re.finditer(r"`([^`]+)`", prose):
        words = split(match[1].replace("\n", " "))
        if words:
            line = prose.count("\n", 0, match.start()) + 1
            found.append(command(f"{name}:{line}", words, partial=True))
    return found


def overrides_of(text):
    """Returns the overrides of config keys without a program: lists that belong together."""
    found = []
    for _, block in blocks(text):
        for line in block.replace("\\\n", " ").split("\n"):
            if re.match(r'\s*"?--config\.', line):
                found.append(shlex.split(line))
    for match in re.finditer(r"`([^`]*--config\.[^`]*)`", without_blocks(text)):
        if not PROGRAM.search(match[1]):
            words = shlex.split(match[1].replace("\n", " "))
            found.append([word for word in words if word.startswith("--config.")])
    return [words for words in found if not any("section.key" in word for word in words)]


TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in DOCUMENTS
    if path.name != "CHANGELOG.md"
}
COMMANDS = [found for name, text in TEXTS.items() for found in commands_of(text, name)]


def with_program(*programs):
    return [found for found in COMMANDS if found.words[0] in programs]


def test_commands_are_found():
    """Catches an extraction that finds nothing, or loses the ends of commands."""
    text = (
        "Run `python -m dn_detr_jax check DIR` or `make test`:\n\n"
        "    pip install x && python train.py --config a \\\n"
        '        "--config.b=(1, 2)"  # why\n'
        "    # needs a GPU\n"
        "    dn-detr check d [--decode] ... | head\n\nas said\n\n"
        '```\ngcloud ssh --command="\n  cd x && python train.py \\\n    --workdir=y"\n```\n\n'
        "```python\npython = 3\n```\nIn `--config.dn.groups=0` and `makes`\n"
    )
    assert commands_of(text, "a.md") == [
        Command("a.md:3", ("pip", "install", "x")),
        Command("a.md:3", ("python", "train.py", "--config", "a", "--config.b=(1, 2)")),
        Command("a.md:6", ("dn-detr", "check", "d", "--decode"), partial=True, needs="a GPU"),
        Command("a.md:11", ("python", "train.py", "--workdir=y")),
        Command("a.md:1", ("python", "-m", "dn_detr_jax", "check", "DIR"), partial=True),
        Command("a.md:1", ("make", "test"), partial=True),
    ]
    assert overrides_of(text) == [["--config.dn.groups=0"]]
    assert len(with_program("python")) > 60 and len(with_program("make")) > 10
    documents = {found.place.partition(":")[0] for found in with_program("python")}
    assert {"README.md", "docs/own_data.md", "docs/weights.md", "docs/clusters.md"} <= documents


# Parses commands, a JSON list of words each, without running them: each in a process of its own
# that shares the imports. Prints the error of each, empty for none.
DRIVER = """
import json, os, runpy, sys
import jax, flax, cv2, scipy.optimize, ml_collections, absl.app
import dn_detr_jax.training.loop, dn_detr_jax.evaluation.evaluator, benchmarks.common
from absl import flags
from dn_detr_jax.commands import command_line
from dn_detr_jax.config import validate
from dn_detr_jax.errors import Error

def parse(main, arguments=()):
    command_line._parse_flags(sys.argv, arguments)
    try:
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            validate(flags.FLAGS.config)
    except Error as error:
        sys.exit(str(error))
    sys.exit(0)

# Of programs without flags, which run at once, and those of docs/, only the file is looked for.
PLAIN = {"dn_detr_jax.config.reference"}

command_line.run_main = parse
for line in sys.stdin:
    words = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            if PLAIN & set(words) or words[0].startswith("docs/"):
                name = words[words[0] == "-m"]
                path = name if name.endswith(".py") else name.replace(".", "/") + ".py"
                sys.exit("" if os.path.isfile(path) else f"there is no {path}")
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
            text = "parsed nothing"
        except SystemExit as end:
            text = end.code if isinstance(end.code, str) else ""
        except BaseException as error:
            text = repr(error)
        os.write(writer, json.dumps(text).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        print(pipe.read() or json.dumps("ended"), flush=True)
    os.waitpid(child, 0)
"""
MISSING = re.compile(
    r" is missing; see --help$|must have a value other than None|of which --config"
)
WRONG = {
    Command("", ("python", "train.py", "--config", "digits", "--wordkir=a")): "'wordkir'",
    Command("", ("python", "-m", "dn_detr_jax", "chekc", "a")): "did you mean check",
    Command("", ("dn-detr", "check", "a", "--config.dn.gruops=1")): "no such key",
    Command("", ("dn-detr", "check", "a", "--config.dn.groups=-1")): "dn.groups",
    Command("", ("dn-detr", "predict", "a", "--out=b")): MISSING.pattern,
    Command("", ("python", "-m", "benchmarks.padding", "--config", "no.py")): "no.py",
    Command("", ("python", "-m", "benchmarks.none")): "none",
    Command("", ("python", "docs/none.py")): "none",
}
# Targets that start train.py: the config and the work directory that they name, and what they add.
TRAINED_BY_MAKE = {
    "train": ("configs/digits_quick.py", "runs/digits", ()),
    "eval": ("configs/digits_quick.py", "runs/digits", ("--eval_only",)),
    "trees": ("configs/trees.py", "runs/trees", ()),
}


def python_words(found):
    """Returns what a command gives to Python; None if it starts no program of this project."""
    program, *words = found.words
    if program == "make":
        values = dict(word.split("=", 1) for word in words if "=" in word)
        for target in set(words) & set(TRAINED_BY_MAKE):
            config, workdir, added = TRAINED_BY_MAKE[target]
            given = ["--config", values.get("CONFIG", config)]
            given += ["--workdir", values.get("WORKDIR", workdir)]
            return ["train.py", *given, *added, *shlex.split(values.get("ARGS", ""))]
        return None
    if program == "dn-detr":
        return ["-m", "dn_detr_jax", *words]
    return words if program.startswith("python") else None


def driven(driver, commands, folder):
    """Runs a driver on the words of commands, in one process, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", driver],
        input="".join(f"{json.dumps(words)}\n" for words in commands),
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def errors():
    """The error of each command that starts Python, empty for none."""
    lines = {found: python_words(found) for found in (*COMMANDS, *WRONG)}
    lines = {found: words for found, words in lines.items() if words}
    output = driven(DRIVER, lines.values(), ROOT)
    return dict(zip(lines, map(json.loads, output.splitlines()), strict=True))


def test_commands_of_python_parse(errors):
    """Catches commands, flags, config keys, values and config files that do not exist."""
    wrong = [
        f"{found.place}: {shlex.join(found.words)}: {error}"
        for found, error in errors.items()
        if error and found not in WRONG and not (found.partial and MISSING.search(error))
    ]
    assert not wrong, "\n".join(wrong)


def test_wrong_commands_are_seen(errors):
    """Catches a check that passes every command."""
    for found, error in WRONG.items():
        assert re.search(error, errors[found]), (found, errors[found])


def test_commands_of_make_have_targets(errors):
    """Catches targets and variables that the Makefile does not have, and tests that were moved."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = {*re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE), "PYTHON"}
    assert {"train", "test"} <= targets and {"ARGS", "VENV"} <= variables
    for found in with_program("make"):
        given = dict(word.split("=", 1) for word in found.words[1:] if "=" in word)
        named = [word for word in found.words[1:] if "=" not in word]
        assert set(named) <= targets and set(given) <= variables, found
        if named == ["test"]:
            files = [word for word in shlex.split(given.get("ARGS", "")) if word[0] != "-"]
            assert all((ROOT / file.partition("::")[0]).exists() for file in files), found
        assert not set(named) & set(TRAINED_BY_MAKE) or errors[found] == "", errors[found]


@pytest.mark.parametrize("target", TRAINED_BY_MAKE)
def test_make_starts_what_is_tested(target):
    """Catches a target whose command is another than the one that the tests of documents run."""
    words = ["make", target, "ARGS=--config.seed=2"]
    given = "--dry-run", "--assume-old=.venv/.installed", "--assume-old=data/trees/tiles"
    # Without what the make that runs the tests says to others.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        [*words, *given], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    _, *started = shlex.split(done.stdout.splitlines()[-1])
    assert started == python_words(Command("", tuple(words)))


def test_installed_files_and_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for found in with_program("pip"):
        for word in found.words:
            if word.endswith(".txt"):
                assert (ROOT / word).is_file(), found
            if match := re.fullmatch(r"dn_detr_jax\[(.*)\]", word):
                assert set(match[1].split(",")) <= set(project["optional-dependencies"]), found


def test_stored_data_of_commands_exists():
    """Catches reference cases that were renamed."""
    used = {word for found in COMMANDS for word in found.words if word.startswith("tests/")}
    assert "tests/data/reference/components.npz" in used
    assert all((ROOT / word).exists() for word in used), used


def fits(override_words, config):
    """Whether a config takes the overrides, and is valid with them; keys without a value exist."""
    values = flags.FlagValues()
    try:
        arguments = [word if "=" in word else f"{word}=" for word in override_words]
        config_flags.DEFINE_config_file(
            "config", str(find_config(config)), flag_values=values, sys_argv=["", *arguments]
        )
        values(["", *arguments])
        validate(values.config)
    except (flags.Error, Error, AttributeError, ValueError):
        return False
    return True


def test_overrides_fit_a_config():
    """Catches config keys that do not exist, and values that no config takes."""
    lists = {tuple(words): name for name, text in TEXTS.items() for words in overrides_of(text)}
    assert len(lists) > 15
    order = ("finetune", "digits", *experiment_names())
    others = ((), ("--config.model.dtype=bfloat16",))  # which the text around them says
    wrong = [
        f"{name}: {shlex.join(words)}"
        for words, name in lists.items()
        if not any(fits((*words, *more), config) for more in others for config in order)
    ]
    assert not wrong, "\n".join(wrong)
