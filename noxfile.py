"""The tests on every installed Python, with the oldest and the newest versions of the packages.

    make test-all
    make test-all ARGS="-m smoke"

A session runs to its end whatever came of the others, and the last one prints a table of them all;
the command fails if one of them did. Pythons of pyenv are found too, active or not.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nox

PYTHONS = "3.11", "3.12", "3.13", "3.14"
REPORTS = Path("build/test-all")

# What each choice of versions adds to the installation of requirements.txt.
VERSIONS = {
    "oldest": ("--resolution=lowest-direct",),  # the lower bound of every package
    "jax-0.11": ("jax==0.11.*",),
    "newest": ("--upgrade",),
}
_SHOW_VERSIONS = """
import json, platform
from importlib.metadata import version
names = "jax", "flax", "numpy"
print(json.dumps({"Python": platform.python_version()} | {n: version(n) for n in names}))
"""

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "table"]


def activate_pyenv() -> None:
    """Lets `python3.12` and the like be the newest of pyenv's, unless PYENV_VERSION chooses."""
    if not shutil.which("pyenv") or "PYENV_VERSION" in os.environ:
        return
    listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    installed = [name for name in listed.stdout.split() if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    installed.sort(key=lambda name: [int(number) for number in name.split(".")], reverse=True)
    if installed:
        os.environ["PYENV_VERSION"] = ":".join([*installed, "system"])


def runs(python: str) -> bool:
    """Whether that version is there; pyenv has a command for versions that are not active too."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        done = subprocess.run([f"python{python}", "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return done.stdout.strip() == python


activate_pyenv()
FOUND = [python for python in PYTHONS if runs(python)]
MATRIX = [
    (python, versions)
    for python in FOUND
    for versions in VERSIONS
    # The oldest versions are for the oldest Python; 3.12 is the oldest that jax 0.11 takes.
    if versions == "newest" or (python, versions) in ((FOUND[0], "oldest"), ("3.12", "jax-0.11"))
]


def run_pytest(session: nox.Session, versions: str, *arguments: str) -> None:
    """Installs, tests, and leaves a report of both for the table."""
    report = REPORTS / f"{session.python}-{versions}"
    for suffix in ("json", "xml"):
        Path(f"{report}.{suffix}").unlink(missing_ok=True)
    session.install("-r", "requirements.txt", *VERSIONS[versions])
    session.install("-r", "requirements-dev.txt")
    shown = session.run("python", "-c", _SHOW_VERSIONS, silent=True)
    found = json.loads(shown.strip().splitlines()[-1])
    session.log(", ".join(f"{name} {version}" for name, version in found.items()))
    REPORTS.mkdir(parents=True, exist_ok=True)
    Path(f"{report}.json").write_text(json.dumps(found))
    parallel = "--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"
    session.run("python", "-m", "pytest", *parallel, f"--junitxml={report}.xml", *arguments)


@nox.session
@nox.parametrize("python,versions", MATRIX, ids=["-".join(pair) for pair in MATRIX])
def tests(session: nox.Session, versions: str) -> None:
    """All tests."""
    run_pytest(session, versions, *session.posargs)


@nox.session(python=FOUND[-1] if FOUND else None)
def smoke(session: nox.Session) -> None:
    """A few minutes' choice of the tests, on the newest Python with the newest packages."""
    ours = "{}.{}".format(*sys.version_info)
    if not FOUND or PYTHONS.index(FOUND[-1]) <= PYTHONS.index(ours):
        session.log(f"no Python newer than {ours}, that of `make test`, was found")
        return
    run_pytest(session, "newest", "-m", "smoke", *session.posargs)


def row(python: str, versions: str) -> list[str]:
    """A line of the table, from the reports of a session."""
    report = REPORTS / f"{python}-{versions}"
    try:
        found = json.loads(Path(f"{report}.json").read_text())
    except OSError:
        return [python, *["-"] * 3, versions, "not installed", *["-"] * 3]
    cells = [*found.values(), versions]
    try:
        suite = ET.parse(f"{report}.xml").getroot().find("testsuite")
    except (OSError, ET.ParseError):
        return [*cells, "no report", *["-"] * 3]
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    return [*cells, str(passed), str(bad), str(count["skipped"]), f"{float(suite.get('time')):.0f}"]


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """What came of the sessions of `tests`, in Markdown."""
    header = "Python", "jax", "flax", "numpy", "versions", "passed", "failed", "skipped", "seconds"
    lines = [header, ["---"] * len(header), *(row(*pair) for pair in MATRIX)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    missing = [python for python in PYTHONS if python not in FOUND]
    if missing:
        print(f"not found: Python {', '.join(missing)}")
