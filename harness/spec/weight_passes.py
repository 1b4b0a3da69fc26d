"""Weight passes, put between urgent ones where they delay nothing that matters or where memory must be freed."""

from __future__ import annotations

from collections import deque

from harness.spec.list_scheduling import FORWARD, INPUT, WEIGHT, WHOLE, Orders, Pipe
from harness.spec.passes import Pass, PassSeconds, time_passes


def place_weights(
    pipe: Pipe, urgent: UrgentPasses, limit: int, allowed: float | None, shortest: float
) -> Orders | None:
    """The urgent passes in their order, and weight passes in the gaps.

    A weight pass is put where it delays nothing and where a forward pass needs memory. It is also put in a gap too
    short for it if its stage would otherwise be idle for more than `allowed` in all (arXiv 2401.10241, section 3.1);
    if `allowed` is None, if the urgent pass may start that late.

    Returns:
        None if the limit doesn't let this order run, or if it takes longer than `shortest`.
    """
    placing = _Placing(pipe, urgent, limit, allowed, shortest)
    while placing.runnable:
        if not placing.advance(placing.runnable.pop()):
            return None
    return placing.finish()


class UrgentPasses:
    """Forward and input passes in order, and how late each may start in a schedule as short as can be.

    Backwards in time a pipeline is a pipeline, whose forward passes are the input passes of this one.
    """

    def __init__(self, pipe: Pipe, orders: Orders) -> None:
        self.orders = orders
        ticks = pipe.ticks
        mirrored = [[Pass(_MIRRORED[kind], *which) for kind, *which in reversed(order)] for order in orders]
        swapped = PassSeconds(ticks.backward_input, ticks.forward, ticks.backward_weight, ticks.transfer)
        spare = [max(pipe.least_makespan - start - pipe.least_longest_stage, 0) for start in pipe.starts]
        free = [spare[s] + min(pipe.cost[s, WEIGHT, c] for c in range(pipe.v)) for s in range(pipe.p)]
        ends = time_passes(mirrored, swapped, pipe.part_of, free).ends
        horizon = max(pipe.least_makespan, ends[0][-1])
        self.latest = [[horizon - end for end in reversed(stage)] for stage in ends]


_MIRRORED = {FORWARD: INPUT, INPUT: FORWARD}


class _Placing:
    """Stages that each run ahead until they must wait for another, which puts them back to `runnable`."""

    def __init__(self, pipe: Pipe, urgent: UrgentPasses, limit: int, allowed: float | None, shortest: float) -> None:
        self.pipe, self.urgent, self.limit, self.allowed, self.shortest = pipe, urgent, limit * WHOLE, allowed, shortest
        self.runnable = list(range(pipe.p))
        self._orders: Orders = [[] for _ in urgent.orders]
        self._next = [0] * pipe.p
        self._clock = [0] * pipe.p
        self._idle = [0] * pipe.p
        self._held = [0] * pipe.p
        self._left = list(pipe.work)
        self._weights: list[deque[Pass]] = [deque() for _ in urgent.orders]
        self._done: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._waiting: dict[tuple[str, int, int], int] = {}

    def advance(self, stage: int) -> bool:
        """Run a stage's passes until one's input isn't computed yet; whether a schedule can still come of it."""
        urgent = self.urgent.orders[stage]
        while self._next[stage] < len(urgent):
            step = kind, micro_batch, chunk = urgent[self._next[stage]]
            part = self.pipe.part_of(stage, chunk)
            needed = self.pipe.needed(kind, micro_batch, part)
            arrival = 0
            if needed is not None:
                if needed not in self._done:
                    self._waiting[needed] = stage
                    return True
                arrival, sender = self._done[needed]
                arrival += 0 if sender == stage else self.pipe.transfer
            while self._weights[stage] and self._fits(stage, kind, arrival):
                self._run(stage, self._weights[stage].popleft())
                self._held[stage] -= self.pipe.kept
            wait = max(arrival - self._clock[stage], 0)
            self._idle[stage] += wait if self._orders[stage] else 0
            self._clock[stage] += wait
            if self._full(stage, kind) or self._clock[stage] + self._left[stage] > self.shortest:
                return False
            self._run(stage, step)
            self._next[stage] += 1
            if kind == FORWARD:
                self._held[stage] += WHOLE
            else:
                self._held[stage] -= WHOLE - self.pipe.kept
                self._weights[stage].append(Pass(WEIGHT, micro_batch, chunk))
            self._done[kind, micro_batch, part] = (self._clock[stage], stage)
            if (kind, micro_batch, part) in self._waiting:
                self.runnable.append(self._waiting.pop((kind, micro_batch, part)))
        return True

    def _fits(self, stage: int, kind: str, arrival: int) -> bool:
        """Whether the next weight pass comes before the next urgent one, whose input arrives then."""
        clock = self._clock[stage]
        end = clock + self.pipe.cost[stage, WEIGHT, self._weights[stage][0].chunk]
        if end <= arrival or self._full(stage, kind):
            return True
        if clock >= arrival:
            return False
        if self.allowed is None:
            return end <= self.urgent.latest[stage][self._next[stage]]
        return self._idle[stage] + arrival - clock > self.allowed

    def _full(self, stage: int, kind: str) -> bool:
        return kind == FORWARD and self._held[stage] + WHOLE > self.limit

    def _run(self, stage: int, step: Pass) -> None:
        cost = self.pipe.cost[stage, step.kind, step.chunk]
        self._orders[stage].append(step)
        self._clock[stage] += cost
        self._left[stage] -= cost

    def finish(self) -> Orders | None:
        """All orders with the weight passes that are left at their ends; None if stages wait for each other."""
        if self._waiting:
            return None
        return [[*order, *weights] for order, weights in zip(self._orders, self._weights, strict=True)]
