"""Rank program: the matrix-product rate with products that are simulated.

A file lock stands for the only core of a machine: one rank computes at a time, which makes the truth known. Then the
last rank finds no memory, and then all have little.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist

from harness.run.instruments import gemm

CPU = torch.device("cpu")
draw = torch.randn


def run(argument: dict[str, float], folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    gemm.WINDOW_SECONDS = argument["window_seconds"]
    sizes: list[int] = []
    seconds: list[float] = []
    with (folder / "core").open("a") as core:  # a description of its own for each rank: they exclude each other

        def product(a: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            sizes.append(len(a))
            fcntl.flock(core, fcntl.LOCK_EX)
            began = time.perf_counter()
            time.sleep(argument["seconds"] if len(a) == 256 else argument["long_seconds"])
            if len(a) == 256:
                seconds.append(time.perf_counter() - began)
            fcntl.flock(core, fcntl.LOCK_UN)
            return a

        torch.mm = product
        rates, cores = zip(*everyone(gemm.measure(torch.float32, CPU)), strict=True)

    def no_memory(*shape: int, **options: Any) -> torch.Tensor:
        raise MemoryError("no room for a matrix")

    problem = None
    torch.randn, torch.mm = no_memory if rank == last else draw, lambda a, *_, **__: a
    try:
        gemm.measure(torch.float32, CPU)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = everyone(problem)

    torch.randn, torch.mm, psutil.virtual_memory = draw, lambda a, *_, **__: sizes.append(len(a)), little_memory
    sizes.clear()
    gemm.measure(torch.float32, CPU)
    dist.barrier()
    return {
        "rates": rates,
        "cores": cores[0],
        "product_seconds": median(seconds),
        "problems": problems,
        "sizes": sorted(set(sizes)),
    }


def everyone(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class little_memory:
    available = 2 * 16 * 3 * 512**2 * 4  # room for products of size 512 on two ranks
