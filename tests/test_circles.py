"""No two modules of the harness need each other: imports inside functions and for type checkers count too."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from harness.spec.config import REPOSITORY


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_by(file: Path) -> set[str]:
    """Whatever the file imports, as modules or names of them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_modules_make_no_circle() -> None:
    files = {module_name(file): file for file in (REPOSITORY / "harness").rglob("*.py")}
    graph = {
        module: {name for name in imported_by(file) if name in files and name != module}
        for module, file in files.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(files)  # CycleError names the modules of a circle
    assert "harness.launch.points" in graph["harness.launch.sweep"]
