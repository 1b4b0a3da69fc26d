"""Rank program: communication benchmarks of several layouts; answers with the result of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from helpers import make_config

from harness.record.store import Attempt
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.tasks.comm_bench import comm_bench


def run(argument: list[list[str]], folder: Path) -> list[Any]:
    initialize_distributed()
    rank = int(os.environ["RANK"])
    results = []
    for overrides in argument:
        attempt = Attempt(folder / f"attempt-{len(results) + 1}")
        attempt.path.mkdir(exist_ok=True)
        comm_bench(attempt, make_config(*overrides), rank)
        results.append(attempt.result())
    return results
