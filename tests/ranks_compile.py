"""Rank program: `ranks_parity` of blocks that are compiled, and whether any step made the compiler work again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import ranks_parity
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

import harness.run.parity as parity
from harness.run.compilation import gather_compilation
from harness.run.engines.engine import Engine, build_engine


def run(argument: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Of each row: comparisons, what its row would say, graphs that rank 0 compiled before and during the steps.

    Args:
        argument: rows, each with its overrides, and ranks `without_compiler`.
    """
    graphs: list[int] = []
    outcomes: list[str | None] = []

    def build(*arguments: Any) -> Engine:
        before = counters["stats"]["unique_graphs"]
        engine = build_engine(*arguments)
        compiled = gather_compilation(engine.compilation, None)
        outcomes.append(compiled and compiled.outcome)
        graphs[:] = counters["stats"]["unique_graphs"] - before, counters["stats"]["unique_graphs"]
        return engine

    parity.build_engine = build
    answers = []
    for row in argument:
        is_without = int(os.environ["RANK"]) in row.get("without_compiler", [])
        rows = {"rows": [["model.compile=true", *row["overrides"]]], "variant": "AdamW"}
        with no_compiler(folder) if is_without else contextlib.nullcontext():
            (comparisons,) = ranks_parity.run(rows, folder)
        in_steps = counters["stats"]["unique_graphs"] - graphs[1]
        passed = all(comparison["passed"] for comparison in comparisons)
        answers.append({"passed": passed, "outcome": outcomes[-1], "graphs": graphs[0], "in_steps": in_steps})
    return answers


def no_compiler(folder: Path) -> contextlib.AbstractContextManager[None]:
    """As on a machine without, on which nothing was compiled before."""
    changes = {"cpp.cxx": (None, str(folder / "no-compiler")), "force_disable_caches": True}
    patched: contextlib.AbstractContextManager[None] = inductor.patch(changes)
    return patched
