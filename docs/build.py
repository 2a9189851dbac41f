"""Builds the documentation as static pages: all documents, and the API reference from docstrings.

    python docs/build.py build/docs

The README becomes `index.html`, `docs/NAME.md` becomes `NAME.html`, and `pdoc` writes the package's
modules below `api/`. Links between documents are followed to the pages, links to source files are
left as text. The pages need no server and no network.
"""

import argparse
import re
import shutil
import warnings
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dn_detr_jax"
DOCUMENTS = (Path("README.md"), Path("CONTRIBUTING.md"), Path("CHANGELOG.md"))

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 52rem; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif;
  color: #1b1f24; background: #fff; }}
nav {{ border-bottom: 1px solid #d0d7de; padding-bottom: .5rem; }}
nav a {{ margin-right: .8rem; }}
pre {{ background: #f6f8fa; padding: .8rem; overflow-x: auto; }}
code {{ font-size: .9em; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border: 1px solid #d0d7de; padding: .3rem .6rem; text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<nav>{navigation}</nav>
{body}
</body>
</html>
"""


def documents() -> dict[Path, str]:
    """The documents, relative to the repository, and the names of their pages."""
    paths = [*DOCUMENTS, *sorted(p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md"))]
    return {path: "index" if path.name == "README.md" else path.stem.lower() for path in paths}


def build(out: Path) -> None:
    """Writes all pages into a folder, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pages = documents()
    links = {page: path.stem.replace("_", " ") for path, page in pages.items()}
    links["api/" + PACKAGE] = "API"
    navigation = "".join(f'<a href="{page}.html">{name}</a>' for page, name in links.items())
    for path, page in pages.items():
        body = str(to_html((ROOT / path).read_text(encoding="utf-8")))
        title = re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        text = _PAGE.format(
            title=title[1] if title else PACKAGE,
            navigation=navigation,
            body=_with_links_to_pages(body, path, pages),
        )
        (out / f"{page}.html").write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", out / "images")
    # Names that TFDS imports for type checkers alone; its own members are not documented.
    warnings.filterwarnings("ignore", "Error parsing type annotation .*(utils|Version)")
    pdoc.render.configure(docformat="google", footer_text=PACKAGE)
    pdoc.pdoc(PACKAGE, output_directory=out / "api")


def _with_links_to_pages(body: str, source: Path, pages: dict[Path, str]) -> str:
    """A page's HTML whose links to documents and figures lead to the built files.

    Links to other files of the repository, which are not built, become plain text.
    """

    def replace(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        path = Path("/", source.parent, target).resolve().relative_to("/")
        if not target or "://" in target:
            return match[0]
        if path in pages:
            href = pages[path] + ".html" + (f"#{anchor}" if anchor else "")
            return f'<a href="{href}"{match["rest"]}>{match["text"]}</a>'
        return match["text"]

    body = re.sub(
        r'<a href="(?P<target>[^"]*)"(?P<rest>[^>]*)>(?P<text>.*?)</a>', replace, body, flags=re.S
    )
    return re.sub(r'src="(?:docs/)?images/', 'src="images/', body)


def main() -> None:
    """Builds into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the pages; it is made anew")
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
