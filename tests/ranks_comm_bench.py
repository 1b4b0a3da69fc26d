"""Rank program: communication benchmarks of several layouts; answers with the result of each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distributed import read_argument, write_answer
from helpers import make_config

from harness.record.store import Attempt
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.tasks.comm_bench import comm_bench


def main() -> None:
    initialize_distributed()
    rank = int(os.environ["RANK"])
    results = []
    for overrides in read_argument():
        attempt = Attempt(Path(sys.argv[1]) / f"attempt-{len(results) + 1}")
        attempt.path.mkdir(exist_ok=True)
        comm_bench(attempt, make_config(*overrides), rank)
        results.append(attempt.result())
    if rank == 0:
        write_answer(results)
    os._exit(0)


if __name__ == "__main__":
    main()
