"""Links of the documents have targets, and facts that are written twice agree."""

import re
import tomllib
from pathlib import Path

import pytest

import dn_detr_jax

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/data/*/README.md")]


def without_code(text):
    """Returns a document without its code blocks, fenced or indented after an empty line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\n\n( {4}.*\n)+", "\n\n", text)


def anchors(text):
    """Returns the anchors that a forge makes of a document's headings."""
    found = []
    for heading in re.findall(r"^#+ +(.+?)\s*$", without_code(text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeated = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{repeated}" if name in found else name)
    return found


def links(text):
    return re.findall(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)", without_code(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    """Catches files and headings that were moved or renamed, without the network."""
    broken = []
    for link in links(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        found = file.exists() and file.is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


def test_the_check_of_links_sees_them():
    """Catches a check that passes every document."""
    text = (
        "# A `b`: c!\n\n## Two\n## Two\n[x](y.md#z) and ![i](images/i.png)\n\n    [no](no)\n\nend"
    )
    assert anchors(text) == ["a-b-c", "two", "two-1"]
    assert links(text) == ["y.md#z", "images/i.png"]
    assert len(links((ROOT / "README.md").read_text(encoding="utf-8"))) > 5


def test_files_that_documents_name_exist():
    """Paths in backticks, such as `docs/survival.md` or `benchmarks/peer.py`."""
    pattern = r"`((?:dn_detr_jax|docs|tests|benchmarks|configs)/[\w./-]+\.\w+)`"
    missing = {
        (path.name, name)
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"
        for name in re.findall(pattern, path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_versions_agree():
    """Of the package, the citation and the changelog."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == dn_detr_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {dn_detr_jax.__version__} - " in changelog
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["dn_detr_jax"]
    assert (ROOT / "dn_detr_jax" / "py.typed").exists()
