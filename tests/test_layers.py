"""Imports within the package go down only, and files and functions stay short."""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT / "dn_detr_jax"

# From bottom to top, by the longest prefix of a module's name below the package. A module imports
# modules of lower layers and, without circles, those of its own.
LAYERS = (
    ("errors", "files", "arrays"),
    ("boxes",),
    ("losses", "matching", "noise", "denoising"),
    ("criterion",),
    ("config",),
    ("sharding",),
    ("models",),
    ("distributed",),
    ("data",),
    ("checkpoints",),
    ("visualize",),
    ("evaluation",),
    ("interop",),
    ("training",),
    ("inference",),
    ("parity", "preflight", "serving", "inspection"),
    ("commands",),
    ("__main__",),
)
# Imports inside functions, (importing module, imported module); every other one is an error.
LAZY = {
    ("distributed.launch", "distributed.consistency"),  # wrong flags are reported without jax
    ("data.datasets", "data.digit_scenes"),  # imports TFDS, which other data does without
}
# The public API, and the commands: help and wrong flags need no jax.
LAZY_FOLDERS = ("", "commands")

LONG_FILES: set[str] = set()  # over 500 lines
LONG_FUNCTIONS: set[str] = set()  # over 80 lines


def _name(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(_PACKAGE.rglob("*.py"))}


def _imports(name):
    """Yields (imported module, is inside a function) for the imports from this package."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = {
        id(node)
        for condition in ast.walk(tree)
        if isinstance(condition, ast.If) and ast.unparse(condition.test) == "TYPE_CHECKING"
        for node in ast.walk(condition)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in found:
            if full.split(".")[0] == "dn_detr_jax":
                below = full.partition(".")[2]
                while below not in MODULES:  # a name in a module
                    below = below.rpartition(".")[0]
                yield below, id(node) not in top


EDGES = [(name, *found) for name in MODULES for found in _imports(name)]


def _layer(name):
    """Returns the number of a module's layer."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, layer in enumerate(LAYERS):
            if prefix in layer:
                return number
    raise AssertionError(f"{name}: LAYERS has no such module")


def test_imports_go_down():
    """Catches a lower part that needs a higher one, inside functions too."""
    upward = [
        f"{name} imports {imported}"
        for name, imported, _ in EDGES
        if name and imported and _layer(name) < _layer(imported)
    ]
    assert not upward


def test_no_module_imports_itself_through_others():
    """Catches circles within a layer, which depend on the order of the imports."""
    below = {name: set() for name in MODULES}
    for name, imported, _ in EDGES:
        if (name, imported) not in LAZY and name != imported:
            below[name].add(imported)
    finished: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for imported in sorted(below[name]):
                visit(imported, [*path, name])
            finished.add(name)

    for name in MODULES:
        visit(name, [])


def test_lazy_imports_are_declared():
    """Catches an import inside a function that hides a circle, and an outdated declaration."""
    lazy = {
        (name, imported)
        for name, imported, inside in EDGES
        if inside and name.split(".")[0] not in LAZY_FOLDERS
    }
    assert lazy == LAZY


@pytest.mark.parametrize("name", ["config", "errors", "files", "commands.dispatch"])
def test_what_answers_at_once_needs_no_jax(name):
    """Catches seconds of start-up before a wrong flag is reported."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        text = ast.parse(MODULES[module].read_text())
        for node in text.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("jax", "flax", "optax") for n in names), module
        waiting += [imported for n, imported, inside in EDGES if n == module and not inside]


def test_what_a_start_does_not_need_is_imported_later():
    """Catches a second of start-up for figures and a matching that no detection needs."""
    found = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for n in names if n.split(".")[0] in ("matplotlib", "scipy")]
    assert not found


def test_no_file_is_long():
    """Catches long files and outdated exemptions."""
    lengths = {
        str(path.relative_to(_PACKAGE)): len(path.read_text().splitlines())
        for path in MODULES.values()
    }
    assert {name for name, length in lengths.items() if length > 500} == LONG_FILES


def test_no_function_is_long():
    """Catches long functions and outdated exemptions."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if node.end_lineno - start + 1 > 80:
                    found.add(f"{path.relative_to(_PACKAGE)}: {node.name}")
    assert found == LONG_FUNCTIONS
