"""The imports of the package have no cycle, at module level, in functions and for types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import toolkit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(toolkit.__file__).parent


def modules() -> dict[str, str]:
    """{dotted name: source text} of the modules of the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        *folders, name = (ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)
        dotted = ".".join(folders if name == "__init__" else (*folders, name))
        found[dotted] = path.read_text(encoding="utf-8")
    return found


def imports(text: str) -> Iterator[tuple[str, str]]:
    """(``module.name``, ``module``) for each imported name, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports must be absolute"
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def find_cycle(sources: dict[str, str]) -> list[str]:
    """The modules of one cycle; empty if there is no cycle."""
    edges = {}
    for name, text in sources.items():
        found = {full if full in sources else module for full, module in imports(text)}
        edges[name] = found & (sources.keys() - {name})
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert find_cycle(modules()) == []


def test_a_cycle_is_found_in_functions_and_in_types() -> None:
    lazy = {"p.a": "def f():\n    from p.b import x", "p.b": "from p import c", "p.c": "import p.a"}
    assert set(find_cycle(lazy)) == {"p.a", "p.b", "p.c"}
    typed = {"p.a": "from p.b import x", "p.b": "if TYPE_CHECKING:\n    from p.a import y"}
    assert set(find_cycle(typed)) == {"p.a", "p.b"}
    assert find_cycle(typed | {"p.b": ""}) == []
