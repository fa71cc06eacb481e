"""The order of the modules and the house numbers, read from the source: nothing is imported."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recon"

# From bottom to top; a module imports only what stands before it, or its own package.
ORDER = (
    "errors", "files", "store", "space", "schedules", "philox", "draws", "comm", "operators", "likelihoods", "priors",
    "posterior", "order", "ensemble", "samplers", "selftest", "twin", "checks", "baselines", "diagnostics", "runs", "plot",
    "report", "datasets", "workflows", "cli", "__main__",
)  # fmt: skip

LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 7
# Thin wrappers: line and legend properties of matplotlib, conditions of a prior by name.
KWARGS_ALLOWED = frozenset({"curve", "legend", "given"})

FILES = sorted(path for path in PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every module of recon that the code imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "recon")
        elif isinstance(node, ast.ImportFrom) and node.module == "recon":
            yield from ((node.lineno, f"recon.{a.name}") for a in node.names if not a.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recon."):
            yield node.lineno, str(node.module)


def upward(module: str, text: str) -> list[str]:
    """Imports of ``text``, the source of ``module``, that point upwards."""
    own = ORDER.index(layer(module))
    wrong = []
    for line, other in imported(ast.parse(text)):
        there = layer(other)
        if there not in ORDER:
            wrong.append(f"{module}:{line} imports {other}, which has no place in the order")
        elif ORDER.index(there) > own:
            wrong.append(f"{module}:{line} imports {other}, which stands above it")
    return wrong


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def too_large(text: str) -> list[str]:
    """House numbers that the source ``text`` breaks."""
    tree, lines = ast.parse(text), len(text.splitlines())
    wrong = [f"{lines} lines, more than {LONGEST_FILE}"] if lines > LONGEST_FILE else []
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
        if length > LONGEST_FUNCTION:
            wrong.append(f"{function.name} has {length} lines, more than {LONGEST_FUNCTION}")
        if len(names) > MOST_PARAMETERS:
            wrong.append(f"{function.name} has {len(names)} parameters, more than {MOST_PARAMETERS}: make a dataclass")
        if given.kwarg is not None and function.name not in KWARGS_ALLOWED:
            wrong.append(f"{function.name} takes **{given.kwarg.arg}: name the arguments")
    return wrong


def undocumented(text: str) -> list[str]:
    """Public objects of ``text`` without a docstring; a method of a class with bases may fill in a documented contract."""
    tree = ast.parse(text)
    wrong = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            wrong.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = [m for m in node.body if isinstance(m, Function) and not m.name.startswith("_")]
            wrong += [f"{node.name}.{m.name}" for m in methods if not ast.get_docstring(m)]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_modules_import_only_what_stands_below_them(path: Path) -> None:
    module = module_name(path)
    if module == "recon":
        assert not list(imported(ast.parse(path.read_text()))), "import recon must import nothing of recon"
        return
    assert layer(module) in ORDER, f"{module} has no place in ORDER"
    wrong = upward(module, path.read_text())
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_house_numbers(path: Path) -> None:
    wrong = too_large(path.read_text())
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_objects_have_docstrings(path: Path) -> None:
    wrong = undocumented(path.read_text())
    assert wrong == []


def test_no_module_is_a_cellar() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_extras_named_in_code_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {
        (module_name(path), node.args[1].value)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need"
        if len(node.args) == 2 and isinstance(node.args[1], ast.Constant)
    }
    assert asked, "no call of recon.errors.need was found"
    assert not {(module, extra) for module, extra in asked if extra not in extras}


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("recon.space", "from recon.samplers import MMPS", "above"),
        ("recon.space", "def f():\n    import recon.cli", "above"),
        ("recon.files", "from recon import workflows", "above"),
        ("recon.cli", "from recon.cellar import x", "no place"),
    ],
)
def test_the_order_can_be_broken(module: str, text: str, found: str) -> None:
    assert [line for line in upward(module, text) if found in line]


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * 401,
        "def f():\n" + "    x = 1\n" * 60,
        "def f(self, a, b, c, d, e, f, g, *, h): ...",
        "def f(**options): ...",
    ],
)
def test_the_house_numbers_can_be_broken(text: str) -> None:
    assert len(too_large(text)) == 1


def test_a_missing_docstring_is_found() -> None:
    text = '"""Module."""\nclass A:\n    """A."""\n    def f(self): ...\ndef _g(): ...\ndef h(): ...'
    assert undocumented(text) == ["A.f", "h"]
