"""Every configuration key is read by somebody, or says that it is for predictions of layouts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from harness.spec import help
from harness.spec.config import REPOSITORY, RunConfig

HARNESS = REPOSITORY / "harness"
FOR_PREDICTIONS = {
    "cluster.name",
    "cluster.num_nodes",
    "cluster.devices_per_node",
    "cluster.memory_bytes",
    "cluster.intra_node_bytes_per_second",
    "cluster.inter_node_bytes_per_second",
}
"""Datasheet values that people may give and script against, and that no run needs."""


def last_name(node: ast.AST | None) -> str:
    """`train` of `config.train` and of `train`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def reads(file: Path, sections: dict[str, str]) -> set[tuple[str, str]]:
    """(section, key) of what a file reads as attributes of a section, also under another name: `limits = c.launch`.

    Args:
        sections: class -> section.
    """
    tree = ast.parse(file.read_text())
    names = {section: section for section in sections.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                names |= {last_name(t): last_name(v) for t, v in pairs if last_name(v) in sections.values()}
        elif isinstance(node, ast.arg | ast.AnnAssign) and (kind := last_name(node.annotation)) in sections:
            names[node.arg if isinstance(node, ast.arg) else last_name(node.target)] = sections[kind]
    return {
        (names[owner], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (owner := last_name(node.value)) in names
    }


def unread() -> set[str]:
    """Keys of sections that no module reads but the schema's own."""
    sections: dict[str, str] = {}
    for key in help.all_keys():
        *path, _ = key.name.split(".")
        kind: Any = RunConfig
        for name in path:
            kind = kind.model_fields[name].annotation
            for special in [kind, *kind.__subclasses__()]:
                sections[special.__name__] = name
    files = [file for file in HARNESS.rglob("*.py") if file.relative_to(HARNESS).as_posix() != "spec/config.py"]
    found = set().union(*(reads(file, sections) for file in files))
    return {key.name for key in help.all_keys() if "." in key.name and tuple(key.name.split(".")[-2:]) not in found}


def test_every_key_is_read_or_says_that_it_is_for_predictions() -> None:
    assert unread() == FOR_PREDICTIONS
    said = {key.name for key in help.all_keys() if "for predictions, no run reads it" in key.meaning}
    assert said == FOR_PREDICTIONS


def test_the_keys_of_a_cluster_that_runs_read_are_read_where_peaks_come_from() -> None:
    read = {key for section, key in reads(HARNESS / "plan" / "hardware.py", {"Cluster": "cluster"})}
    ours = {key.name.removeprefix("cluster.") for key in help.all_keys() if key.name.startswith("cluster.")}
    assert read & ours == {"device_name", "peak_flops"}
    assert {f"cluster.{key}" for key in ours - read} == FOR_PREDICTIONS
