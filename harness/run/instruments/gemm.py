"""The matrix-product rate of this machine, the denominator of `gemm_utilization`.

By the library that computed the products of rank 0's layers (`harness.model.products.library`). Measured once per
device, library, precision, threads, number of processes, cores and points at once, with as many processes at once as a
run has ranks (they share cores, memory bandwidth and clock), and kept in the user's cache folder. One that was measured
while other processes took the cores counts for its own run alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeVar

import psutil
import torch
import torch.distributed as dist

from harness.machine import Machine, cache_file
from harness.model.precision import dtype_of
from harness.model.products import library, product_by_onednn
from harness.record.store import write_json
from harness.spec.config import RunConfig

SIZES = tuple(2**power for power in range(8, 15))
WINDOWS = 2
"""Per size; the better one counts."""
WINDOW_SECONDS = 0.1
"""In which all ranks compute: many time slices, and a whole period of a container's processor quota."""
SHARE_OF_FREE_MEMORY = 1 / 16
"""What the matrices of all ranks may take at most: a model lives beside them."""

T = TypeVar("T")


def gemm_flops_per_second(
    config: RunConfig, machine: Machine, device: torch.device, achieved: float, group: dist.ProcessGroup | None = None
) -> float:
    """FLOP/s of one rank in square matrix products of the best size while all ranks do the same.

    A collective over all ranks: rank 0 knows whether the cache has it.

    Args:
        achieved: what the model itself reached per rank, on rank 0; a cached rate below it is measured again.
        group: all ranks, with a backend for tensors in host memory; None is the default group.

    Raises:
        RuntimeError: one rank can't; raised on all.
    """
    known: list[float | None] = [None]
    used = [library()]
    file: Path | None = None
    if dist.get_rank() == 0:
        with contextlib.suppress(Exception):  # no home, no file, a damaged one: it is measured
            processes = [f"{config.launch.threads_per_rank}threads", f"{config.parallel.world_size}ranks"]
            shared = [f"{machine.num_cores}cores", f"{config.launch.slots}slots"]
            by = [] if used == ["torch"] else used
            file = cache_file("gemm", machine, config.train.precision, *processes, *shared, *by)
            cached = json.loads(file.read_text())
            rate, cores = float(cached["flops_per_second"]), float(cached["cores"])
            if rate >= achieved and (device.type == "cuda" or is_undisturbed(cores, config, machine)):
                known = [rate]
    dist.broadcast_object_list(known, src=0, group=group)
    if known[0] is not None:
        return known[0]
    dist.broadcast_object_list(used, src=0, group=group)
    rate, cores = measure(dtype_of(config.train.precision), device, group, used[0])
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"flops_per_second": rate, "cores": cores})
        except OSError as error:
            logging.getLogger(__name__).warning("the matrix-product rate is not kept for other runs: %s", error)
    return rate


def is_undisturbed(cores: float, config: RunConfig, machine: Machine) -> bool:
    """Whether the ranks had all the cores they can use.

    A program beside them takes at least half a core from one thread; else 1 or 2 % are lost at most.

    Args:
        cores: that all ranks had together.
        machine: as the ranks see it: of several points at once, each has cores of its own.
    """
    fair = min(config.launch.threads_per_rank * config.parallel.world_size, machine.num_cores)
    return cores >= fair - max(0.1, 0.025 * fair)


def measure(
    dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None, by: str = "torch"
) -> tuple[float, float]:
    """Best FLOP/s over growing square products, the mean over ranks that all compute at the same time.

    Args:
        by: the library, as `harness.model.products.library` names it.

    Returns:
        It, and the fewest cores that all ranks had together (CPU seconds per second) at the best size and beyond.

    Raises:
        RuntimeError: one rank can't; raised on all.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what training held for its activations is free now
    found: list[tuple[float, float]] = []
    memory = min(agreed(lambda: free_bytes(device), group)) * SHARE_OF_FREE_MEMORY
    for size in SIZES:
        if 3 * size**2 * dtype.itemsize > memory:
            break
        products_per_second, cores = _products_per_second(size, dtype, device, group, by)
        found.append((2 * size**3 * products_per_second, cores))
        if products_per_second * WINDOW_SECONDS < 1:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not found:
        raise RuntimeError(f"the {memory / 2**10:,.0f} KiB it may take hold no matrices")
    best = found.index(max(found))
    return found[best][0], min(cores for _, cores in found[best:])


def free_bytes(device: torch.device) -> float:
    """Free memory for this rank's matrices: of its device, or its part of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available / dist.get_world_size())


def agreed(act: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `act` returned on each rank, by rank; a collective call, after which all ranks go on together.

    Raises:
        RuntimeError: it failed on a rank; raised on all, so that none waits for one that has given up.
    """
    try:
        mine, problem = [act()], None
    except Exception as error:
        mine, problem = [], f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    everyone: list[tuple[list[T], str | None]] = [(mine, problem)] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, problem), group=group)
    for _, problem in everyone:
        if problem is not None:
            raise RuntimeError(problem)
    return [result for results, _ in everyone for result in results]


class Window(NamedTuple):
    """What one rank did in a window of time."""

    products: int
    seconds: float
    cpu_seconds: float
    """Of all its threads."""


def _products_per_second(
    size: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None, by: str
) -> tuple[float, float]:
    """Products of one rank per second in the best window, and the cores that all had then."""
    products: list[Callable[[], None]] = []
    agreed(lambda: products.append(build_product(size, dtype, device, by)), group)
    best = 0.0, 0.0
    for _ in range(WINDOWS):
        windows = agreed(lambda: repeat(products[0]), group)
        rate = fmean(window.products for window in windows) / max(window.seconds for window in windows)
        best = max(best, (rate, sum(window.cpu_seconds / window.seconds for window in windows)))
    return best


def build_product(size: int, dtype: torch.dtype, device: torch.device, by: str = "torch") -> Callable[[], None]:
    """Something that multiplies two random matrices [size, size] and waits until that is done; it has done so once."""
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))

    def multiply() -> None:
        product_by_onednn(a, b) if by == "onednn" else torch.mm(a, b, out=out)
        synchronize(device)

    multiply()
    return multiply


def repeat(product: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> Window:
    """Make a product again and again in a window of time, whose seconds go to the end of the last one.

    All ranks end by time and not by number, so that they compute beside each other to the end.
    """
    start, cpu_start, count = clock(), time.process_time(), 0
    while True:
        product()
        count += 1
        if (elapsed := clock() - start) >= WINDOW_SECONDS:
            return Window(count, elapsed, time.process_time() - cpu_start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
