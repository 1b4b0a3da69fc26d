"""Engines that take steps in turn, in the same processes: what differs between them is not the hour.

On shared hardware, runs compared with runs differ by more than what is measured here; so compared are the steps of one
round, as the median of their ratios.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

FIRST_ROUNDS = 3
"""Not counted: buffers and the shape handshake."""


class Setting(NamedTuple):
    """What the engines of a rank have in common."""

    rank: int
    machine: Any
    config: Any
    device: Any
    samples: Any


def join(overrides: Sequence[str]) -> Setting:
    """Become a rank of the launch, with threads, device and data as `launchers/train.py` sets them up."""
    from helpers import make_config

    from harness.machine import detect_machine
    from harness.run.data import CorpusSamples
    from harness.run.engines.deepspeed.join import initialize_distributed
    from harness.run.tasks.train import set_up_device, share_corpus

    initialize_distributed()
    rank, machine = int(os.environ["RANK"]), detect_machine()
    config = make_config(*overrides, machine=machine)
    device = set_up_device(config, machine)
    return Setting(rank, machine, config, device, CorpusSamples(config, share_corpus(config, rank)))


def take_turns(steps: dict[str, Callable[[int], Any]], rounds: int, device: Any) -> Iterator[tuple[str, float]]:
    """A step of each engine, round after round, in `rotations` of them.

    Args:
        steps: run step n of an engine.

    Yields:
        The name of an engine after its step, and the seconds of the slowest rank.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    for number, names in enumerate(rotations(list(steps), FIRST_ROUNDS + rounds), start=1):
        for name in names:
            dist.barrier()
            start = time.perf_counter()
            steps[name](number)
            get_accelerator().synchronize()
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number > FIRST_ROUNDS:
                yield name, float(slowest)


def rotations(names: Sequence[str], rounds: int) -> Iterator[Sequence[str]]:
    """Orders of the rounds, each begun with the next name.

    Of more than two none stands twice in a row: an engine would find the caches as it left them.
    """
    for number in range(rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median: order statistics n/2 -+ 0.98 sqrt(n)."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - half))
    high = min(len(values) - 1, int(len(values) / 2 + half))
    return ordered[low], ordered[high]
