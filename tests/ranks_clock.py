"""Rank program: the last rank's clock is wrong, is compared with rank 0's twice, and is put right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.run.instruments.clock import measure_clock_offset
from harness.spans.clock import to_reference


def run(argument: dict[str, Any], folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    origin = time.monotonic_ns()

    def wrong(now_ns: int) -> int:
        return now_ns + argument["offset_ns"] + round((now_ns - origin) * argument["drift"])

    clock = (lambda: wrong(time.monotonic_ns())) if rank == last else time.monotonic_ns
    start = measure_clock_offset(None, clock)
    moments = [time.monotonic_ns()]
    for _ in range(2):
        time.sleep(0.5)
        moments.append(time.monotonic_ns())
    end = measure_clock_offset(None, clock)
    answer = None
    if rank == last:
        right = to_reference(start, end)
        answer = {
            "errors_ns": [right(wrong(moment)) - moment for moment in moments],
            "uncertainty_ns": max(start.uncertainty_ns, end.uncertainty_ns),
            "drift": -(end.offset_ns - start.offset_ns) / (end.at_ns - start.at_ns),
        }
    offsets, answers = [None] * (last + 1), [None] * (last + 1)
    dist.all_gather_object(offsets, end.offset_ns)
    dist.all_gather_object(answers, answer)
    return {**answers[last], "other_offset_ns": offsets[1]}  # type: ignore[dict-item]
