"""What communication costs: the bandwidths of nccl-tests, and latency and bandwidth fitted to measured times.

Sizes and bandwidths follow https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md. The size is that of
the whole buffer: of an all-gather what every rank ends with, of a reduce-scatter what every rank begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from harness.machine import Machine, cache_file
from harness.spec.config import RunConfig
from harness.spec.topology import Axis

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "point_to_point"]

COLLECTIVES: tuple[Operation, ...] = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
OPERATIONS: dict[Axis, tuple[Operation, ...]] = {"tp": COLLECTIVES, "pp": ("point_to_point",), "dp": COLLECTIVES}
"""What is measured along each axis: pipeline stages talk to their neighbours only."""


def bus_factor(operation: Operation, num_ranks: int) -> float:
    """Bus over algorithm bandwidth in a group of `num_ranks`: what a link carries, whatever the size of the group."""
    others = (num_ranks - 1) / num_ranks
    return {"all_reduce": 2 * others, "all_gather": others, "reduce_scatter": others}.get(operation, 1.0)


@dataclass(frozen=True)
class AlphaBeta:
    """The time of an operation on a number of bytes: alpha + bytes / beta (Hockney 1994)."""

    alpha_seconds: float
    beta_bytes_per_second: float | None
    """None: the times do not grow with the size."""
    fit_error: float
    """Root mean square of the relative errors."""

    def seconds(self, num_bytes: float) -> float:
        """Modelled seconds."""
        return self.alpha_seconds + (num_bytes / self.beta_bytes_per_second if self.beta_bytes_per_second else 0.0)


def fit_alpha_beta(num_bytes: Sequence[int], seconds: Sequence[float]) -> AlphaBeta:
    """Least squares on the relative error, so that small messages count as much as large ones; nothing negative.

    Args:
        num_bytes: two sizes or more.
        seconds: measured times, above 0.
    """
    sizes, times = np.array(num_bytes, dtype=float), np.array(seconds)
    constant, linear = 1 / times, sizes / times  # model / time, which should be 1
    alpha, slope = np.linalg.lstsq(np.column_stack([constant, linear]), np.ones_like(times))[0]
    if alpha < 0:
        alpha, slope = 0.0, linear.sum() / (linear @ linear)
    elif slope < 0:
        alpha, slope = constant.sum() / (constant @ constant), 0.0
    error = np.sqrt(np.mean((alpha * constant + slope * linear - 1) ** 2))
    return AlphaBeta(float(alpha), float(1 / slope) if slope else None, float(error))


@dataclass(frozen=True)
class Measurement:
    """An operation, done by all groups of an axis at once as in training."""

    axis: Axis
    num_ranks: int
    """Of one group."""
    operation: Operation
    num_bytes: list[int]
    seconds: list[float]
    """Per size, of the slowest rank."""

    @property
    def algorithm_bytes_per_second(self) -> list[float]:
        """Size over time."""
        return [size / seconds for size, seconds in zip(self.num_bytes, self.seconds, strict=True)]

    @property
    def bus_bytes_per_second(self) -> list[float]:
        """Algorithm bandwidth times `bus_factor` of the group's own size."""
        return [bus_factor(self.operation, self.num_ranks) * rate for rate in self.algorithm_bytes_per_second]

    @property
    def model(self) -> AlphaBeta:
        """Fitted to all sizes."""
        return fit_alpha_beta(self.num_bytes, self.seconds)


def measured_sizes(min_bytes: int, max_bytes: int) -> list[int]:
    """`min_bytes` and its multiples by powers of 4, and `max_bytes`."""
    sizes = [min_bytes]
    while sizes[-1] * 4 < max_bytes:
        sizes.append(sizes[-1] * 4)
    return [*sizes, max_bytes]


def communication_file(config: RunConfig, machine: Machine, transport: str) -> Path:
    """Where the newest measurement of a layout on this kind of machine is kept, for predictions.

    Args:
        transport: what carried the messages, as rows say it; reasons don't count.
    """
    parallel = config.parallel
    layout = f"tp{parallel.tp}_pp{parallel.pp}_dp{parallel.dp}"
    carrier = "".join(c if c.isalnum() else "-" for c in transport.partition(":")[0])
    threads = f"{config.launch.threads_per_rank}threads"
    return cache_file("comm", machine, config.train.precision, threads, layout, carrier)
