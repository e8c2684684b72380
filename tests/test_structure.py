"""Imports follow one direction between packages and form no cycle; functions and files stay short."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import those with a lower level, and those in `SAME_LEVEL`.
LEVELS = {
    "utils": 0,
    "dataset": 1,
    "model": 1,
    "data": 2,
    "runtime": 2,
    "detector": 3,
    "config": 4,
    "evaluation": 5,
    "training": 6,
    "report": 7,
    "app": 8,
    "export": 8,
    "study": 8,
    "cli": 9,
    "scripts": 10,
}
SAME_LEVEL = {("data", "runtime"), ("app", "export"), ("app", "study")}
MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_FILE_LINES, MAX_ENGINE_ENTRIES = 60, 8, 400, 12
PACKAGES = ("engine", "model", "dataset", "utils")


def python_files(*folders: str) -> list[Path]:
    below = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted([*ROOT.glob("*.py"), *below])


FILES = python_files(*PACKAGES)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def package(module: str) -> str:
    """The package of a module: the second part of its name below `engine`, otherwise the first."""
    first, *rest = module.split(".")
    if first == "engine":
        return rest[0] if rest else "engine"
    return first if first in PACKAGES else "scripts"


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of the project that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            names += (name if name in MODULES else node.module for name in whole)
    return frozenset(names) & MODULES - {module_name(path)}


def test_imports_follow_one_direction() -> None:
    wrong = []
    for path in FILES:
        importer = package(module_name(path))
        for imported in map(package, imports(path)):
            # `engine/__init__.py` is the public interface, which nothing below it imports.
            if importer in ("engine", imported) or (importer, imported) in SAME_LEVEL:
                continue
            if imported == "engine" or LEVELS[importer] <= LEVELS[imported]:
                wrong.append(f"{path.relative_to(ROOT)} ({importer}) imports {imported}")
    assert not wrong


def cycles() -> Iterator[list[str]]:
    edges = {module_name(path): imports(path) for path in FILES}
    finished: set[str] = set()

    def visit(module: str, above: list[str]) -> Iterator[list[str]]:
        if module in above:
            yield [*above[above.index(module) :], module]
        elif module not in finished:
            for imported in sorted(edges[module]):
                yield from visit(imported, [*above, module])
            finished.add(module)

    for module in edges:
        yield from visit(module, [])


def test_no_files_import_each_other() -> None:
    assert list(cycles()) == []


def test_engine_has_few_packages() -> None:
    entries = [path.name for path in (ROOT / "engine").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENGINE_ENTRIES + 1  # and __init__.py


@pytest.mark.parametrize(
    "path", python_files(*PACKAGES, "benchmarks", "examples"), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_functions_and_files_are_short(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
            a = node.args
            names = [
                argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if argument
            ]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MAX_PARAMETERS, f"{node.name} has {count} parameters"
