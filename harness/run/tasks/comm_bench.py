"""How fast the groups of a layout communicate, as one rank measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import P2POp, ProcessGroup

from harness.machine import detect_machine
from harness.model.groups import create_groups
from harness.model.precision import dtype_of
from harness.plan.communication import OPERATIONS, Measurement, Operation, communication_file, measured_sizes
from harness.record.columns import number
from harness.record.heartbeat import Heart, Phase
from harness.record.store import Attempt, write_json
from harness.run.instruments.gemm import synchronize
from harness.run.shared_memory import describe_transports, share_memory
from harness.run.tasks.train import set_up_device
from harness.spec.config import RunConfig

ITERATIONS = 4
"""Operations of one sample; roots and directions change, so that none can begin before the last has ended."""

FIRST_SAMPLES = 5
"""Not measured: with the first size connections are made, and cores wake up."""

Operate = Callable[[int], Any]
"""Does the n-th operation of a sample."""


def comm_bench(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Measure every axis of the layout, and write the figures to result.json and where predictions look for them."""
    machine = detect_machine()
    device = set_up_device(config, machine)
    parallel = config.parallel
    share_memory(parallel.shared_memory)
    topology = parallel.topology
    phase = Heart(attempt.path, rank).phase
    measurements, transports = [], dict[str, ProcessGroup | None]()
    for axis, operations in OPERATIONS.items():
        members = topology.groups(axis)
        if len(members[0]) > 1:
            group = transports[axis] = create_groups(members, rank)
            for operation in operations:
                sizes, seconds = _measure(axis, operation, group, config, device, phase)
                measurements.append(Measurement(axis, group.size(), operation, sizes, seconds))
    phase("writing the result")
    if rank != 0:
        return
    transport = describe_transports(transports)
    result = {
        "layout": {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp},
        "precision": config.train.precision,
        "transport": transport,
        "hardware": machine.describe(),
        "measurements": [_described(measurement) for measurement in measurements],
    }
    _print(config, measurements, transport)
    file = communication_file(config, machine, transport)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        print(f"For predictions: {file}", flush=True)
    except OSError as error:
        print(f"Not kept for predictions: {error}", flush=True)
    write_json(attempt.result_file, result)


def _described(measurement: Measurement) -> dict[str, Any]:
    rates = {key: getattr(measurement, key) for key in ("algorithm_bytes_per_second", "bus_bytes_per_second")}
    return {**asdict(measurement), **rates, **asdict(measurement.model)}


def _measure(
    axis: str, operation: Operation, group: ProcessGroup, config: RunConfig, device: torch.device, phase: Phase
) -> tuple[list[int], list[float]]:
    """Sizes in bytes and seconds of an operation in this rank's group, while the other groups do the same."""
    dtype, bench = dtype_of(config.train.precision), config.comm_bench
    unit = dtype.itemsize * group.size()  # every rank's part has the same number of elements
    sizes = [-(-size // unit) * unit for size in measured_sizes(bench.min_bytes, bench.max_bytes)]
    seconds: list[float] = []
    for size in sizes:
        whole, part = (
            torch.empty(size // ranks // dtype.itemsize, dtype=dtype, device=device).zero_()  # touches the memory
            for ranks in (1, group.size())
        )
        operate = _build_operation(operation, group, whole, part)
        own, unmeasured = [], 1 if seconds else FIRST_SAMPLES
        for _ in range(unmeasured + bench.repeats):
            phase(f"{operation} of {size} bytes along {axis}")
            own.append(_sample(operate, device))
        samples = torch.tensor(own[unmeasured:], device=device)
        dist.all_reduce(samples, op=dist.ReduceOp.MAX)  # in training the slowest group holds up all
        seconds.append(median(samples.tolist()))
    return sizes, seconds


def _build_operation(operation: Operation, group: ProcessGroup, whole: torch.Tensor, part: torch.Tensor) -> Operate:
    """One operation of all ranks of `group`.

    Args:
        whole: [n], n divisible by the ranks of the group.
        part: [n / ranks].
    """
    ranks, own = dist.get_process_group_ranks(group), group.rank()
    if operation == "all_reduce":
        return lambda _: dist.all_reduce(whole, group=group)
    if operation == "all_gather":
        return lambda _: dist.all_gather_single(whole, part, group=group)
    if operation == "reduce_scatter":
        return lambda _: dist.reduce_scatter_single(part, whole, group=group)
    if operation == "broadcast":
        return lambda turn: dist.broadcast(whole, src=ranks[turn % len(ranks)], group=group)
    received = torch.empty_like(whole)

    def shift(turn: int) -> None:
        """Activations to the next stage, then gradients to the one before."""
        step = 1 if turn % 2 == 0 else -1
        transfers = [(dist.isend, whole, own + step), (dist.irecv, received, own - step)]
        wanted = [
            P2POp(function, tensor, ranks[peer], group)
            for function, tensor, peer in transfers
            if 0 <= peer < len(ranks)
        ]
        for request in dist.batch_isend_irecv(wanted):
            request.wait()

    return shift


def _sample(operate: Operate, device: torch.device) -> float:
    """Seconds of an operation, the mean of a few in a row that all ranks begin together."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    for turn in range(ITERATIONS):
        operate(turn)
    synchronize(device)
    return (time.perf_counter() - start) / ITERATIONS


def _print(config: RunConfig, measurements: list[Measurement], transport: str) -> None:
    """A line per size, and the fit of each operation."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.slug} {config.train.precision} over {transport}")
    for heading in ("group", "operation", "KiB", "us", "algorithm GB/s", "bus GB/s"):
        table.add_column(heading, justify="left" if heading in ("group", "operation") else "right")
    for found in measurements:
        name = f"{found.axis} of {found.num_ranks}"
        rates = zip(found.algorithm_bytes_per_second, found.bus_bytes_per_second, strict=True)
        for size, seconds, (algorithm, bus) in zip(found.num_bytes, found.seconds, rates, strict=True):
            figures = (size / 1024, seconds * 1e6, algorithm / 1e9, bus / 1e9)
            table.add_row(name, found.operation, *(number(figure) for figure in figures))
            name = ""
        table.add_section()
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    fits = Table(title="seconds = alpha + bytes / beta")
    for heading in ("group", "operation", "alpha us", "beta GB/s", "fit error %"):
        fits.add_column(heading, justify="left" if heading in ("group", "operation") else "right")
    for found in measurements:
        model = found.model
        beta = number(model.beta_bytes_per_second / 1e9) if model.beta_bytes_per_second else "-"
        name, alpha = f"{found.axis} of {found.num_ranks}", number(model.alpha_seconds * 1e6)
        fits.add_row(name, found.operation, alpha, beta, f"{100 * model.fit_error:.0f}")
    console.print(fits)
    for axis in OPERATIONS:
        if getattr(config.parallel, axis) == 1:
            console.print(f"parallel.{axis}=1: nothing to measure along this axis.", highlight=False)
