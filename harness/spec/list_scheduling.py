"""List scheduling of a pipeline's split backward passes: what is scheduled, and which urgent pass comes next.

Forward passes and the half of a backward pass that computes the input's gradient are urgent, because other stages
wait for them; weight passes fill the time in which a stage would be idle (arXiv 2401.10241, section 3.1).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from harness.spec.passes import Pass, PassSeconds

FORWARD, INPUT, WEIGHT = "forward", "backward_input", "backward_weight"
KINDS = (FORWARD, INPUT, WEIGHT)
Orders = list[list[Pass]]
"""Every stage's passes in order."""
WHOLE = 10**9
"""What a pass holds from its forward to its input pass."""


@dataclass(frozen=True)
class Pipe:
    """What is to be scheduled: p stages, m micro-batches, v chunks per stage (1, or 2 in a V), times in whole ticks."""

    p: int
    m: int
    v: int
    ticks: PassSeconds
    kept: int = WHOLE
    """What a pass holds from its input to its weight pass."""

    def part_of(self, stage: int, chunk: int) -> int:
        """The model's part: with two chunks it goes down the stages and up again."""
        return 2 * self.p - 1 - stage if chunk else stage

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Stage and chunk of every part."""
        down = [(stage, 0) for stage in range(self.p)]
        return down if self.v == 1 else down + [(stage, 1) for stage in reversed(range(self.p))]

    @cached_property
    def cost(self) -> dict[tuple[int, str, int], int]:
        """Duration of a pass by stage, kind and chunk."""
        return {(s, kind, c): int(self.ticks.of(s, kind, c)) for s, c in self.places for kind in KINDS}

    @cached_property
    def transfer(self) -> int:
        """Between different stages."""
        return int(self.ticks.transfer)

    @cached_property
    def work(self) -> list[int]:
        """Of every stage: the duration of all its passes."""
        return [self.m * sum(cost for (s, _, _), cost in self.cost.items() if s == stage) for stage in range(self.p)]

    @cached_property
    def starts(self) -> list[int]:
        """When the first forward pass can reach every stage."""
        starts = [0]
        for stage in range(self.p - 1):
            starts.append(starts[-1] + self.cost[stage, FORWARD, 0] + self.transfer)
        return starts

    @cached_property
    def least_makespan(self) -> int:
        """No schedule is shorter: a stage can't begin earlier, and must do its work."""
        return max(start + work for start, work in zip(self.starts, self.work, strict=True))

    @cached_property
    def least_longest_stage(self) -> int:
        """No schedule's longest stage is shorter.

        With one chunk the first stage waits for the last one's forward and input passes and for the way there and back.
        """
        if self.v == 2:
            return max(self.work)
        inputs = [self.cost[stage, INPUT, 0] for stage in range(self.p)]
        busy = self.m * (self.cost[self.p - 1, FORWARD, 0] + inputs[-1])
        back = sum(inputs[:-1]) + (self.p - 1) * self.transfer
        return max(*self.work, self.starts[-1] + busy + back + self.cost[0, WEIGHT, 0])

    @cached_property
    def _held_for(self) -> list[int]:
        """Of every stage: what a micro-batch's passes hold at least, each times how long, in WHOLE ticks."""
        held = [0] * self.p
        round_trip = 0
        following = self.p
        for part in reversed(range(len(self.places))):
            stage, chunk = self.places[part]
            round_trip += self.cost[stage, FORWARD, chunk] + self.cost[stage, INPUT, chunk]
            round_trip += 2 * self.transfer if following not in (self.p, stage) else 0
            held[stage] += WHOLE * round_trip + self.kept * self.cost[stage, WEIGHT, chunk]
            following = stage
        return held

    def least_makespan_within(self, limit: int) -> int:
        """No schedule that holds so many passes is shorter: all micro-batches are held for as long as they must be."""
        held = (self.m * held // (limit * WHOLE) for held in self._held_for)
        return max(self.least_makespan, *(start + time for start, time in zip(self.starts, held, strict=True)))

    def needed(self, kind: str, micro_batch: int, part: int) -> tuple[str, int, int] | None:
        """What a forward or input pass waits for: kind, micro-batch and part."""
        if kind == FORWARD:
            return (FORWARD, micro_batch, part - 1) if part else None
        return (INPUT, micro_batch, part + 1) if part < len(self.places) - 1 else (FORWARD, micro_batch, part)


def greedy_order(pipe: Pipe, limit: int) -> Orders:
    """What a simulation does in which a free stage starts whatever has arrived; without its weight passes.

    A stage prefers an input pass, then the later chunk's forward pass, and fills in a weight pass if that ends before
    the next known arrival or frees the memory that a forward pass waits for.
    """
    greedy = _Greedy(pipe, limit)
    while greedy.events:
        now, stage = heapq.heappop(greedy.events)
        if greedy.free[stage] <= now and (step := greedy.choose(stage, now)):
            greedy.start(stage, now, step)
    return greedy.orders


class _Greedy:
    """The state of a greedy simulation, whose events are the times at which a stage may have something to start."""

    def __init__(self, pipe: Pipe, limit: int) -> None:
        self.pipe, self.limit = pipe, limit
        self.events = [(0, stage) for stage in range(pipe.p)]
        self.orders: Orders = [[] for _ in range(pipe.p)]
        self.free = [0] * pipe.p
        self._held = [[0] * pipe.v for _ in range(pipe.p)]
        self._weights: list[deque[Pass]] = [deque() for _ in range(pipe.p)]
        first = [deque((0, micro_batch) for micro_batch in range(pipe.m))]
        parts = len(pipe.places)
        self._arrived: dict[tuple[str, int], deque[tuple[int, int]]] = {
            (kind, part): deque() for kind in (FORWARD, INPUT) for part in range(parts)
        } | {(FORWARD, 0): first[0]}
        self._choices = [(INPUT, c) for c in range(pipe.v)] + [(FORWARD, c) for c in reversed(range(pipe.v))]

    def choose(self, stage: int, now: int) -> Pass | None:
        """What the stage starts now, if anything."""
        soonest: float = math.inf
        full = False
        for kind, chunk in self._choices:
            arrived = self._arrived[kind, self.pipe.part_of(stage, chunk)]
            if not arrived:
                continue
            time, micro_batch = arrived[0]
            if kind == FORWARD and not self._has_room(stage, chunk):
                full = full or time <= now
            elif time <= now:
                return Pass(kind, micro_batch, chunk)
            else:
                soonest = min(soonest, time)
        if self._weights[stage]:
            weight = self._weights[stage][0]
            if full or now + self.pipe.cost[stage, WEIGHT, weight.chunk] <= soonest:
                return weight
        return None

    def _has_room(self, stage: int, chunk: int) -> bool:
        """Whether a forward pass may be held without stages waiting for each other for ever.

        A last chunk's pass can always go on to its weight pass, so either one is held or there is room for one: the
        oldest micro-batch finds room at every stage.
        """
        held, last = self._held[stage], self.pipe.v - 1
        reserved = max(WHOLE - held[last], 0) if chunk < last else 0
        return sum(held) + reserved + WHOLE <= self.limit * WHOLE

    def start(self, stage: int, now: int, step: Pass) -> None:
        """Run a pass and hand on what it computes."""
        kind, micro_batch, chunk = step
        end = self.free[stage] = now + self.pipe.cost[stage, kind, chunk]
        heapq.heappush(self.events, (end, stage))
        if kind == WEIGHT:
            self._weights[stage].popleft()
            self._held[stage][chunk] -= self.pipe.kept
            return
        self.orders[stage].append(step)
        part = self.pipe.part_of(stage, chunk)
        self._arrived[kind, part].popleft()
        if kind == INPUT:
            self._weights[stage].append(Pass(WEIGHT, micro_batch, chunk))
            self._held[stage][chunk] -= WHOLE - self.pipe.kept
            following = part - 1
        else:
            self._held[stage][chunk] += WHOLE
            following = part + 1
            if following == len(self.pipe.places):
                kind, following = INPUT, part
        if following >= 0:
            receiver = self.pipe.places[following][0]
            arrival = end if receiver == stage else end + self.pipe.transfer
            self._arrived[kind, following].append((arrival, micro_batch))
            heapq.heappush(self.events, (arrival, receiver))
