"""Every rank's clock compared with rank 0's, by messages between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from harness.spans.clock import ClockOffset, RoundTrip, offset_of

ROUND_TRIPS = 20


def measure_clock_offset(group: dist.ProcessGroup | None, clock: Callable[[], int] = time.monotonic_ns) -> ClockOffset:
    """How far rank 0's clock is ahead of this rank's; a collective call of all ranks, one after the other.

    Args:
        group: all ranks, with a backend for tensors in host memory; None is the default group.
        clock: this rank's, in nanoseconds.
    """
    rank, moment = dist.get_rank(), torch.zeros(1, dtype=torch.int64)
    offset = ClockOffset(clock(), 0, 0)
    for other in range(1, dist.get_world_size()):
        if rank == other:
            offset = offset_of([_ask(moment, group, clock) for _ in range(ROUND_TRIPS)])
        elif rank == 0:
            for _ in range(ROUND_TRIPS):
                dist.recv(moment, other, group=group)
                moment[0] = clock()
                dist.send(moment, other, group=group)
    return offset


def _ask(moment: torch.Tensor, group: dist.ProcessGroup | None, clock: Callable[[], int]) -> RoundTrip:
    sent = clock()
    dist.send(moment, 0, group=group)
    dist.recv(moment, 0, group=group)
    received = clock()
    return RoundTrip(sent, int(moment), received)
