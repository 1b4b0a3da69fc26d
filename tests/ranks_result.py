"""Rank program: trainings under difficulties, one after the other; answers with result.json and metrics.jsonl of each.

`broken`: whatever a result has besides the measurement fails. `slow`: rank 0 takes long to write down each step, and
the peak memory that the system reports falls from step to step, of rank 0 by 100 bytes and of the last by 200.
`drifting`: the last rank's clock is ahead by seconds and runs too fast.
"""

from __future__ import annotations

import json
import os
import time
from itertools import count
from pathlib import Path
from typing import Any

RANK, LAST = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
true_clock, drift = time.monotonic_ns, 0.0


def wrong_clock(origin_ns: int = true_clock()) -> int:
    now = true_clock()
    return now + (7_000_000_000 + round((now - origin_ns) * drift) if drift and RANK == LAST else 0)


time.monotonic_ns = wrong_clock  # before anybody takes hold of it

import torch  # noqa: E402
from helpers import make_config  # noqa: E402

import harness.run.tasks.train  # noqa: E402
from harness.record.store import Attempt  # noqa: E402
from harness.run.engines.deepspeed.join import initialize_distributed  # noqa: E402

PARTS = "breakdown describe_stages flops_beside_peers memory_beside_measured peak_flops_per_second print_summary"


def run(argument: dict[str, Any], folder: Path) -> dict[str, Any]:
    global drift
    answer = {}
    os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
    len(b"-" * 2**30)  # as building a model may take, before it trains
    initialize_distributed()
    loop = harness.run.loop.Loop
    originals = loop._record, loop.close
    read_peak = harness.run.loop.peak_memory_bytes
    for name, overrides in argument["runs"].items():
        loop._record, loop.close = originals
        harness.run.loop.peak_memory_bytes = read_peak
        if name == "slow":
            falling = count(2**30, -100 if RANK == 0 else -200)
            harness.run.loop.peak_memory_bytes = lambda *_, falling=falling: next(falling)
            loop._record = after(loop._record, lambda: time.sleep(argument["slow_seconds"]))
        if name == "drifting":
            drift = argument["drift"]
        mended = break_all() if name == "broken" else {}
        attempt = Attempt(folder / name)
        attempt.path.mkdir(exist_ok=True)
        harness.run.tasks.train.train(attempt, make_config(*overrides), RANK)
        for part, original in mended.items():
            setattr(home_of(part), part, original)
        if RANK == 0:
            lines = attempt.metrics_file.read_text().splitlines()
            answer[name] = {
                "result": json.loads(attempt.result_file.read_text()),
                "lines": list(map(json.loads, lines)),
            }
            answer[name]["files"] = sorted(path.name for path in attempt.path.iterdir())
    torch.distributed.barrier()
    return answer


def after(act: Any, then: Any) -> Any:
    def both(*arguments: Any) -> None:
        act(*arguments)
        then()

    return both


def home_of(part: str) -> Any:
    """The module that calls it."""
    import harness.analyse.result
    import harness.run.result

    return harness.run.result if part == "print_summary" else harness.analyse.result


def break_all() -> dict[str, Any]:
    """Let everything fail that comes after the measurement; what to restore."""
    import harness.run.instruments.gemm

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("nothing left")

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    broken = {part: getattr(home_of(part), part) for part in PARTS.split()}
    for part in broken:
        setattr(home_of(part), part, no_memory)
    loop = harness.run.loop.Loop
    loop.close = after(loop.close, disk_full)
    free_bytes = harness.run.instruments.gemm.free_bytes

    def only_once(device: Any) -> Any:  # on one rank alone
        harness.run.instruments.gemm.free_bytes = free_bytes
        return no_memory() if RANK == LAST else free_bytes(device)

    harness.run.instruments.gemm.free_bytes = only_once
    return broken
