"""Rank program under the stand-in for CUDA: tasks of the worker, one after the other in one process group.

Answers with the result of each, and with what the devices were asked for on every rank.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from cuda_standin.standin import DEVICES
from helpers import make_config

from harness.machine import detect_machine
from harness.record.store import Attempt, read_jsonl
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.instruments import gemm
from harness.run.tasks.comm_bench import comm_bench
from harness.run.tasks.forward import forward
from harness.run.tasks.generate import generate
from harness.run.tasks.train import train
from harness.run.tasks.verify import verify

TASKS = {"train": train, "generate": generate, "forward": forward, "verify": verify, "comm_bench": comm_bench}


def run(argument: list[tuple[str, list[str]]], folder: Path) -> dict[str, Any]:
    gemm.WINDOW_SECONDS = 0.01  # the rate of a stand-in means nothing
    initialize_distributed()
    rank, results = int(os.environ["RANK"]), []
    host = dist.new_group(backend="gloo")
    for number, (task, overrides) in enumerate(argument):
        attempt = Attempt(folder / f"attempt-{number + 1}")
        attempt.path.mkdir(exist_ok=True)
        TASKS[task](attempt, make_config(*overrides, machine=detect_machine()), rank)
        dist.barrier(host)
        results.append((attempt.result() or {}) | {"metrics": read_jsonl(attempt.metrics_file)})
    own = {"current": DEVICES.current, "peak": DEVICES.peak, "calls": DEVICES.calls}
    devices: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(own, devices, dst=0, group=host)
    return {"results": results, "devices": devices}
