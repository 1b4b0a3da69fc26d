"""How often is each fact said that is to be said once? `python tests/house.py`

Counts places in harness/ by its syntax trees, beside the most there may be; exit status 1 where one is exceeded.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HARNESS = REPOSITORY / "harness"
TABLE_OF_FAMILIES = ("harness/spec/architecture.py", "harness/spec/families/")


@cache
def trees() -> dict[str, ast.Module]:
    """Syntax trees by path from the repository's root."""
    return {f.relative_to(REPOSITORY).as_posix(): ast.parse(f.read_text()) for f in sorted(HARNESS.rglob("*.py"))}


def places(wanted: Callable[[ast.AST], bool], within: str = "harness/", without: tuple[str, ...] = ()) -> list[str]:
    """`file:line` of all nodes that are wanted."""
    return [
        f"{path}:{getattr(node, 'lineno', 0)}"
        for path, tree in trees().items()
        if path.startswith(within) and not path.startswith(without or ("/",))
        for node in ast.walk(tree)
        if wanted(node)
    ]


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


PRIVATE_OF_DEEPSPEED = re.compile(
    r"_INSTRUCTION_MAP|_(train|inference|exec)_schedule|_exec_\w+|_aggregate_total_loss|_hp_\w+|_lazy_init_hp\w+"
)


def rewrites_the_instruction_map(node: ast.AST) -> bool:
    """`... _INSTRUCTION_MAP = ...`, `.update(...)` of it, or by `setattr`."""
    if isinstance(node, ast.Call):
        called = [*_names(node.func)]
        return "_INSTRUCTION_MAP" in called or ("setattr" in called and "_INSTRUCTION_MAP" in _names(node))
    return any("_INSTRUCTION_MAP" in _names(target) for target in _targets(node))


def names_a_private_thing_of_deepspeed(node: ast.AST) -> bool:
    """As an attribute or in quotes."""
    name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
    return isinstance(name, str) and PRIVATE_OF_DEEPSPEED.fullmatch(name) is not None


def counts_micro_batches(node: ast.AST) -> bool:
    """A number of a micro-batch that is counted instead of read from an instruction: `micro_batch = seen[kind]`."""
    targets = [node.target] if isinstance(node, ast.For) else _targets(node)
    if not any("micro_batch" in name and "micro_batches" not in name for t in targets for name in _names(t)):
        return False
    if isinstance(node, ast.AugAssign):
        return not isinstance(node.target, ast.Subscript)  # which adds to what belongs to one
    value = node.iter if isinstance(node, ast.For) else getattr(node, "value", None)
    if value is None:
        return False
    counted = {"next", "count", "seen", "enumerate", "len"} & set(_names(value))
    return bool(counted) or any(isinstance(part, ast.Mod | ast.FloorDiv) for part in ast.walk(value))


def compares_families(node: ast.AST) -> bool:
    """`model.family == ...`, `in`, `match` and `{...}[model.family]`."""
    sides: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Match):
        sides = [node.subject]
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
        sides = [node.slice]
    return any("family" in _names(side) for side in sides)


def imports_deepspeed(node: ast.AST) -> bool:
    """Whatever of it."""
    if isinstance(node, ast.Call) and "import_module" in _names(node.func):
        return any(name.partition(".")[0] == "deepspeed" for name in _names(node))
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(module.partition(".")[0] == "deepspeed" for module in modules)


def defines(name: str) -> Callable[[ast.AST], bool]:
    """A function, method or name at the top of a module."""

    def wanted(node: ast.AST) -> bool:
        if isinstance(node, ast.FunctionDef):
            return node.name == name
        return any(isinstance(target, ast.Name) and target.id == name for target in _targets(node))

    return wanted


def calls(name: str) -> Callable[[ast.AST], bool]:
    """`name(...)` or `....name(...)`."""

    def wanted(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        function = node.func
        return name == (function.id if isinstance(function, ast.Name) else getattr(function, "attr", None))

    return wanted


def table_by_precision(node: ast.AST) -> bool:
    """A dictionary with a key "fp32" that says what a precision is, not how closely it computes."""
    keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
    numbers = [value for value in node.values if isinstance(value, ast.Constant)] if isinstance(node, ast.Dict) else []
    return "fp32" in keys and not all(isinstance(number.value, float) for number in numbers or [ast.Constant(None)])


def modules_that_end_a_run() -> list[str]:
    """Those that start the children which draw its pictures and write its mirror."""
    names = ("start_pictures", "start_mirror", "_start_mirrors", "Finishing")
    return sorted({place.rpartition(":")[0] for name in names for place in places(calls(name))})


def folders_that_import_deepspeed() -> list[str]:
    """Of all its imports, by name in `import_module` too."""
    return sorted({place.rpartition("/")[0] for place in places(imports_deepspeed)})


def folders_that_name_private_things_of_deepspeed() -> list[str]:
    """Attributes and texts."""
    return sorted({place.rpartition("/")[0] for place in places(names_a_private_thing_of_deepspeed)})


def circles() -> list[str]:
    """Modules that import each other, however far around; also where only types are imported."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in trees()}
    graph = {module: set(_imports(trees()[path])) & set(modules) - {module} for module, path in modules.items()}

    def reached(start: str) -> set[str]:
        found, waiting = set[str](), [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    return [module for module in modules if module in reached(module)]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@dataclass(frozen=True)
class Count:
    """A fact, where it is said, and in how many places it may be."""

    what: str
    places: list[str]
    most: int


def counts() -> list[Count]:
    """All of them."""
    return [
        Count("rewrites of the engine's instruction map", places(rewrites_the_instruction_map), 0),
        Count("micro-batches counted again", places(counts_micro_batches), 0),
        Count("comparisons of families", places(compares_families, without=TABLE_OF_FAMILIES), 5),
        Count("folders that import deepspeed", folders_that_import_deepspeed(), 1),
        Count("folders that name private things of it", folders_that_name_private_things_of_deepspeed(), 1),
        Count("modules in circles", circles(), 0),
        Count("modules that orchestrate the end of a run", modules_that_end_a_run(), 1),
        Count("places that arrange ranks as pipelines", places(defines("pipelines")), 1),
        Count("tables of precisions", places(table_by_precision), 1),
        Count("readers of torch's peak of memory", places(calls("max_memory_allocated")), 1),
        Count("targets that are ignored", places(defines("IGNORE_INDEX")), 1),
        Count("definitions of a layout's columns", places(defines("layout_columns")), 1),
        Count("definitions of the measured bubble of a step", places(defines("bubble_of_step")), 1),
        Count("definitions of the measured bubble of a run", places(defines("median_bubble")), 1),
    ]


def main() -> int:
    """Print the counts; the exit status."""
    found = counts()
    for count in found:
        print(f"{len(count.places):3} of at most {count.most}  {count.what}: {', '.join(count.places) or '-'}")
    return int(any(len(count.places) > count.most for count in found))


if __name__ == "__main__":
    sys.exit(main())
