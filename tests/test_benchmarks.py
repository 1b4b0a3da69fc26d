"""Benchmarks that are no tests still run, in their smallest form: the two that build most by themselves."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest
from benchmarks.turns import rotations

from harness.machine import detect_machine
from harness.record.store import environment
from harness.spec.config import REPOSITORY


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_are_fair(count: int) -> None:
    """All stand in all places equally often, and of more than two none follows itself."""
    names = [str(number) for number in range(count)]
    rounds = list(rotations(names, 3 * count))
    assert all(Counter(place) == dict.fromkeys(names, 3) for place in zip(*rounds, strict=True))
    assert all(sorted(order) == names for order in rounds)
    assert count < 3 or all(one != other for one, other in pairwise(chain(*rounds)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "arguments", "says"),
    [
        ("overhead", "--pairs 1", ["parallel.pp=1 ", "parallel.pp=2 "]),
        ("point_cost", "--points 2", ["until the next point begins", "the sweep's own cost of a point"]),
    ],
)
def test_a_benchmark_runs(benchmark: str, arguments: str, says: list[str], tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "tests" / "benchmarks" / f"{benchmark}.py", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"code {environment(detect_machine())['code']}" in done.stdout.splitlines()[0]
    assert [text for text in says if text not in done.stdout] == []
