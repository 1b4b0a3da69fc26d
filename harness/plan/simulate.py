"""Event simulation of a pipeline schedule: the spans that given durations would produce.

A stage works through its instructions one after the other. Two ways of moving data between stages:

- blocking (DeepSpeed's sends): a transfer begins when both stages have reached it and occupies both until
  it ends. The order of the instructions matters, and a wrong one makes stages wait for each other for ever.
- overlapping: data leave when the sender's last computation has ended, arrive after the transfer time, and
  cost the sender nothing; the receiver waits at its receive. Links are never congested.

With overlapping transfers, forwards of t_F, backwards of t_B + t_W (the gradient leaves after both parts) and
the rate (cost - m (t_F + t_B + t_W)) / cost, where cost is the time from the first forward to the last
backward, the simulation gives the 1F1B bubble rates of arXiv 2401.10241, tables 5 and 9.

Times are whole nanoseconds inside, so equal stages give closed formulas exactly.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.spans.span import COMPUTE_KINDS, KINDS, RECEIVE_OF_SEND, Span
from harness.spec.schedules import Instruction, Schedule

OTHER_END = RECEIVE_OF_SEND | {receive: send for send, receive in RECEIVE_OF_SEND.items()}
Seconds = float | Sequence[float] | Sequence[Sequence[float]]
"""One duration for all, one per stage, or [stage][micro-batch]."""


def simulate(
    schedule: Schedule, seconds: Mapping[str, Seconds], *, blocking: bool = True, step: int = 0
) -> list[list[Span]]:
    """Spans of every stage, in order of execution, from time 0.

    A receive's span includes the waiting, and so does that of a blocking send; an overlapping send takes no
    time. Chunks of a stage share its forward and backward time evenly.

    Args:
        schedule: what to execute.
        seconds: duration of each kind of instruction, 0 where not given; the schedule's computations must
            be given. For sends it is the transfer's, in the sender's row; receives have none of their own.
        blocking: whether a transfer occupies its sender, as DeepSpeed's do.
        step: number written into the spans.

    Raises:
        ValueError: durations that are negative, missing, of a wrong shape or of an unknown kind, or stages
            that wait for each other.
    """
    simulation = _Simulation(schedule, _nanoseconds(schedule, seconds), step)
    run = simulation.run_blocking if blocking else simulation.run_overlapping
    programs = [run(stage, instructions) for stage, instructions in enumerate(schedule.stages)]
    while simulation.runnable:
        next(programs[simulation.runnable.pop()], None)
    if simulation.waiting:
        stuck = [f"stage {s} at {w.kind} of micro-batch {w.micro_batch}" for s, w in sorted(simulation.waiting.items())]
        raise ValueError(
            f"stages wait for each other for ever: {', '.join(stuck)}; this order of instructions "
            "needs overlapping transfers, or a message lacks its other end"
        )
    return simulation.spans


class _Wait(NamedTuple):
    """A stage that has reached a transfer before the other end."""

    kind: str
    micro_batch: int
    peer: int
    since_ns: int


class _Simulation:
    """Stages as coroutines: each runs ahead until it must wait for another, which puts it back to `runnable`."""

    def __init__(self, schedule: Schedule, costs: list[dict[str, list[int]]], step: int) -> None:
        self.costs, self.step = costs, step
        self.runnable = list(range(len(schedule.stages)))
        self.waiting: dict[int, _Wait] = {}
        self.spans: list[list[Span]] = [[] for _ in schedule.stages]
        self._ends_ns: dict[int, int] = {}
        self._arrivals: dict[tuple[int, int, str], deque[tuple[int, int]]] = defaultdict(deque)

    def run_blocking(self, stage: int, instructions: list[Instruction]) -> Iterator[None]:
        """One stage; whoever comes to a transfer second says when it ends."""
        clock, cost, spans = 0, self.costs[stage], self.spans[stage]
        for kind, micro_batch, chunk, peer in instructions:
            start = clock
            if peer < 0:
                clock += cost[kind][micro_batch]
            else:
                other = self.waiting.get(peer)
                if other is not None and other[:3] == (OTHER_END[kind], micro_batch, stage):
                    duration = cost[kind] if kind in RECEIVE_OF_SEND else self.costs[peer][other.kind]
                    clock = self._ends_ns[peer] = max(clock, other.since_ns) + duration[micro_batch]
                    del self.waiting[peer]
                    self.runnable.append(peer)
                else:
                    self.waiting[stage] = _Wait(kind, micro_batch, peer, clock)
                    yield
                    clock = self._ends_ns[stage]
            spans.append(Span(self.step, kind, micro_batch, start, clock, chunk))

    def run_overlapping(self, stage: int, instructions: list[Instruction]) -> Iterator[None]:
        """One stage; what it sends is under way as soon as it is computed."""
        clock = computed = 0
        cost, spans = self.costs[stage], self.spans[stage]
        for kind, micro_batch, chunk, peer in instructions:
            start = clock
            if peer < 0:
                clock += cost[kind][micro_batch]
                if kind in COMPUTE_KINDS:
                    computed = clock
            elif kind in RECEIVE_OF_SEND:
                self._arrivals[stage, peer, kind].append((micro_batch, computed + cost[kind][micro_batch]))
                if self.waiting.pop(peer, None):
                    self.runnable.append(peer)
                spans.append(Span(self.step, kind, micro_batch, computed, computed, chunk))
                continue
            else:
                messages = self._arrivals[peer, stage, OTHER_END[kind]]
                while not messages or messages[0][0] != micro_batch:
                    self.waiting[stage] = _Wait(kind, micro_batch, peer, clock)
                    yield
                clock = max(clock, messages.popleft()[1])
            spans.append(Span(self.step, kind, micro_batch, start, clock, chunk))


def _nanoseconds(schedule: Schedule, seconds: Mapping[str, Seconds]) -> list[dict[str, list[int]]]:
    """Duration of an instruction by [stage][kind][micro-batch].

    Micro-batch -1, of instructions that belong to none, is the last: the same number unless it is given
    per micro-batch.
    """
    p, m = len(schedule.stages), schedule.num_micro_batches
    computed = {i.kind for stage in schedule.stages for i in stage if i.kind in COMPUTE_KINDS}
    for kind in seconds:
        if kind not in KINDS or kind in RECEIVE_OF_SEND.values():
            raise ValueError(f"{kind!r} has no duration of its own; name computations, sends, load or the end of step")
    if different := computed ^ (set(seconds) & set(COMPUTE_KINDS)):
        raise ValueError(
            f"durations must be given for exactly what {schedule.name} computes, {', '.join(sorted(computed))}; "
            f"they differ in {', '.join(sorted(different))}"
        )
    costs: list[dict[str, list[int]]] = [{} for _ in range(p)]
    for kind in KINDS:
        table = np.asarray(seconds.get(kind, 0.0), dtype=float)
        if table.shape not in ((), (p,), (p, m)):
            raise ValueError(
                f"{kind} has durations of shape {table.shape}; give one number, one per stage ({p}), or one per "
                f"stage and micro-batch ({p}, {m})"
            )
        if not (np.isfinite(table) & (table >= 0)).all():
            raise ValueError(f"{kind} has a duration below 0 or not finite; times must be 0 seconds or more")
        share = schedule.num_chunks if kind in COMPUTE_KINDS else 1
        rows = np.broadcast_to(table[:, None] if table.ndim == 1 else table, (p, m))
        for stage, row in enumerate(np.rint(rows * 1e9 / share).astype(np.int64).tolist()):
            costs[stage][kind] = row
    return costs
