"""Event simulation of a pipeline schedule: the spans that given durations would produce.

A stage works through its instructions one after the other. What it sends leaves when its last computation has ended,
arrives after the transfer time, and costs the sender nothing; the receiver waits at its receive. Links are never
congested.

With forwards of t_F, backwards of t_B + t_W (the gradient leaves after both parts) and the rate
(cost - m (t_F + t_B + t_W)) / cost, where cost is the time from the first forward to the last backward, the simulation
gives the 1F1B bubble rates of arXiv 2401.10241, tables 5 and 9; with the parts one after the other, those of ZB-H1.

Times are whole nanoseconds inside, so equal stages give closed formulas exactly.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.spans.span import COMPUTE_KINDS, KINDS, RECEIVE_OF_SEND, SEND_OF_RECEIVE, Span
from harness.spec.schedules import Instruction, Schedule

Seconds = float | Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
"""One duration for all, one per stage, [stage][micro-batch], or [stage][chunk][micro-batch]."""


def simulate(schedule: Schedule, seconds: Mapping[str, Seconds], *, step: int = 0) -> list[list[Span]]:
    """Spans of every stage, in order of execution, from time 0. A receive's span includes the waiting.

    Args:
        schedule: what to execute.
        seconds: duration of each kind of instruction, 0 where not given; the schedule's computations must
            be given. Those of a stage's forwards and backwards are shared evenly by its chunks, unless they are given
            by chunk. For sends it is the transfer's, in the sender's row; receives have none of their own.
        step: number written into the spans.

    Raises:
        ValueError: durations that are negative, missing, of a wrong shape or of an unknown kind, or stages
            that wait for each other.
    """
    simulation = _Simulation(_nanoseconds(schedule, seconds), step)
    programs = [simulation.run(stage, instructions) for stage, instructions in enumerate(schedule.stages)]
    while simulation.runnable:
        next(programs[simulation.runnable.pop()], None)
    if simulation.waiting:
        stuck = [f"stage {s} at {w.kind} of micro-batch {w.micro_batch}" for s, w in sorted(simulation.waiting.items())]
        raise ValueError(
            f"stages wait for each other for ever: {', '.join(stuck)}; their passes are in an order that can't be, or "
            "a message lacks its other end"
        )
    return simulation.spans


class _Wait(NamedTuple):
    """A stage that has reached a receive before its message was sent."""

    kind: str
    micro_batch: int


class _Simulation:
    """Stages as coroutines: each runs ahead until it must wait for another, which puts it back to `runnable`."""

    def __init__(self, costs: list[dict[str, list[list[int]]]], step: int) -> None:
        self.costs, self.step = costs, step
        self.runnable = list(range(len(costs)))
        self.waiting: dict[int, _Wait] = {}
        self.spans: list[list[Span]] = [[] for _ in costs]
        self._arrivals: dict[tuple[int, int, str, int], deque[int]] = defaultdict(deque)
        """Of messages under way, by receiver, sender, kind of send and micro-batch."""

    def run(self, stage: int, instructions: list[Instruction]) -> Iterator[None]:
        """One stage; what it sends is under way as soon as it is computed."""
        clock = computed = 0
        cost, spans = self.costs[stage], self.spans[stage]
        for kind, micro_batch, chunk, peer in instructions:
            start = clock
            if peer < 0:
                clock += cost[kind][chunk][micro_batch]
                if kind in COMPUTE_KINDS:
                    computed = clock
            elif kind in RECEIVE_OF_SEND:
                arrival = computed + cost[kind][chunk][micro_batch]
                self._arrivals[peer, stage, kind, micro_batch].append(arrival)
                if self.waiting.pop(peer, None):
                    self.runnable.append(peer)
                spans.append(Span(self.step, kind, micro_batch, computed, computed, chunk))
                continue
            else:
                messages = self._arrivals[stage, peer, SEND_OF_RECEIVE[kind], micro_batch]
                while not messages:
                    self.waiting[stage] = _Wait(kind, micro_batch)
                    yield
                clock = max(clock, messages.popleft())
            spans.append(Span(self.step, kind, micro_batch, start, clock, chunk))


def _nanoseconds(schedule: Schedule, seconds: Mapping[str, Seconds]) -> list[dict[str, list[list[int]]]]:
    """Duration of an instruction by [stage][kind][chunk][micro-batch].

    Micro-batch -1, of instructions that belong to none, is the last: the same number unless it is given
    per micro-batch.
    """
    p, v, m = len(schedule.stages), schedule.num_chunks, schedule.num_micro_batches
    for kind in seconds:
        if kind not in KINDS or kind in SEND_OF_RECEIVE:
            raise ValueError(f"{kind!r} has no duration of its own; name computations, sends, load or the end of step")
    if different := schedule.computes ^ (set(seconds) & set(COMPUTE_KINDS)):
        raise ValueError(
            f"durations must be given for exactly what {schedule.name} computes, "
            f"{', '.join(sorted(schedule.computes))}; they differ in {', '.join(sorted(different))}"
        )
    costs: list[dict[str, list[list[int]]]] = [{} for _ in range(p)]
    for kind in KINDS:
        table = np.asarray(seconds.get(kind, 0.0), dtype=float)
        if table.shape not in ((), (p,), (p, m), (p, v, m)):
            raise ValueError(
                f"{kind} has durations of shape {table.shape}; give one number, one per stage ({p}), one per "
                f"stage and micro-batch ({p}, {m}), or one per stage, chunk and micro-batch ({p}, {v}, {m})"
            )
        if not (np.isfinite(table) & (table >= 0)).all():
            raise ValueError(f"{kind} has a duration below 0 or not finite; times must be 0 seconds or more")
        share = v if kind in COMPUTE_KINDS and table.ndim < 3 else 1
        shape = {1: (p, 1, 1), 2: (p, 1, m)}.get(table.ndim, table.shape)
        rows = np.broadcast_to(table.reshape(shape), (p, v, m))
        for stage, row in enumerate(np.rint(rows * 1e9 / share).astype(np.int64).tolist()):
            costs[stage][kind] = row
    return costs
