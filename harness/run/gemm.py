"""The matrix-product rate of this machine, the denominator of `gemm_utilization`.

Measured once per device, precision, threads and number of processes, with as many processes at once as a
run has ranks (they share memory bandwidth and clock), and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from harness.config import RunConfig
from harness.machine import Machine, cache_file
from harness.record.store import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPEATS = 3
LONG_ENOUGH_SECONDS = 0.1
LARGEST_SIZE = 16384


def gemm_flops_per_second(config: RunConfig, machine: Machine, device: torch.device, achieved: float) -> float:
    """FLOP/s of one rank in its best square matrix product while all ranks do the same.

    A collective over all ranks: rank 0 knows whether the cache has it.

    Args:
        achieved: what the model itself reached per rank, on rank 0; a cached rate below it was measured on
            a busy machine and is measured again.
    """
    threads, ranks = config.launch.threads_per_rank, config.parallel.world_size
    file = cache_file("gemm", machine, config.train.precision, f"{threads}threads", f"{ranks}ranks")
    cached = _read(file) if dist.get_rank() == 0 else None
    known = [cached if cached is not None and cached >= achieved else None]
    dist.broadcast_object_list(known, src=0)
    if known[0] is not None:
        return known[0]
    rate = measure(DTYPES[config.train.precision], device)
    rates: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(rates, rate)
    mean = sum(rates) / len(rates)
    if dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"flops_per_second": mean})
    return mean


def _read(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["flops_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(dtype: torch.dtype, device: torch.device) -> float:
    """Best FLOP/s over growing square products, every rank in step with the others."""
    best, size = 0.0, 256
    while size <= LARGEST_SIZE:
        seconds = torch.tensor(_fastest_product(size, dtype, device), dtype=torch.float64, device=device)
        best = max(best, 2 * size**3 / float(seconds))
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # ranks go on together, or stop together
        if float(seconds) > LONG_ENOUGH_SECONDS:
            break
        size *= 2
    return best


def _fastest_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the fastest of a few products of two random matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    fastest = float("inf")
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
