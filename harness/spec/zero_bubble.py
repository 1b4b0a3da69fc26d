"""Zero-bubble pipeline schedules for given durations and memory (arXiv 2401.10241 and 2405.15362).

The backward pass is split: the half that computes the input's gradient is urgent, because other stages wait for it;
the half that computes the weights' gradients fills the time in which a stage would be idle. A schedule is made in two
steps: an order of the urgent passes, from a small family of patterns and a greedy simulation, and then the weight
passes, put where that order leaves gaps, where an urgent pass may wait or where memory must be freed. The shortest
one wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from harness.spec.list_scheduling import FORWARD, INPUT, KINDS, WEIGHT, WHOLE, Orders, Pipe, greedy_order
from harness.spec.passes import Pass, PassSeconds, most_passes_held, time_passes
from harness.spec.weight_passes import UrgentPasses, place_weights

TICKS = 10**9
"""In the power of ten that the longest duration has: sums of whole numbers don't depend on their order, so every rank
finds the same schedule."""


def list_schedule(
    num_stages: int,
    num_micro_batches: int,
    num_chunks: int,
    seconds: PassSeconds,
    memory: float,
    kept: float = 1.0,
) -> Orders:
    """Every stage's passes in an order that takes as little time as this search finds.

    With one chunk, stage s holds the model's part s. With two, the placement is a V: chunk 0 of stage s is part s,
    chunk 1 is part 2p - 1 - s. Among equally short schedules, one whose longest stage is shortest (see `Timing`).

    Args:
        num_stages: p.
        num_micro_batches: m.
        num_chunks: parts of the model per stage, 1 or 2.
        seconds: durations, the same for all micro-batches.
        memory: limit of what a stage holds, as a multiple of 1F1B's first stage: memory p micro-batches with one
            chunk, 2 memory p passes with two. It is rounded down to whole passes, in large pipelines to one of
            `memory_levels`; more memory never makes the schedule longer.
        kept: the share that a pass holds between its input and its weight pass, of what it holds before; M_W / M_B in
            arXiv 2401.10241, section 2.2.

    Raises:
        ValueError: sizes, durations or a share that can't be, or memory for less than one micro-batch.
    """
    if not 0 <= kept <= 1:
        raise ValueError(
            f"kept is {kept:g}; it is the share of its activations that a pass still holds after its input pass, so "
            "give 0 to 1"
        )
    ticks = _ticks(num_stages, num_micro_batches, num_chunks, seconds)
    pipe = Pipe(num_stages, num_micro_batches, num_chunks, ticks, round(kept * WHOLE))
    held = memory * num_stages * num_chunks + 1e-9
    if not held >= num_chunks:
        raise ValueError(
            f"memory of {memory:g} times 1F1B's lets none of {num_stages} stages hold a micro-batch's {num_chunks} "
            f"passes; give at least {1 / num_stages:.4g}"
        )
    levels = [level for level in memory_levels(num_stages, num_micro_batches, num_chunks) if level <= held]
    search = _Search(pipe)
    for level in reversed(levels):
        if search.shortest <= pipe.least_makespan_within(level):
            break
        search.try_level(level)
    return search.orders


def memory_levels(num_stages: int, num_micro_batches: int, num_chunks: int) -> list[int]:
    """The limits that are tried, in passes per stage, from one micro-batch to all.

    Every number up to twice 1F1B's, or every eighth of 1F1B's where that is more than 24 passes, and with two chunks
    what V-Min and V-Half hold: about a third of p micro-batches and a half (arXiv 2405.15362, table 1).
    """
    most = num_micro_batches * num_chunks
    of_1f1b = num_chunks * num_stages
    parts = of_1f1b if of_1f1b <= 24 else 8
    levels = {num_chunks, most} | {math.ceil(of_1f1b * part / parts) for part in range(1, 2 * parts + 1)}
    if num_chunks == 2:
        levels |= {2 * ((num_stages + 4) // 3), 2 * ((num_stages + 2) // 2)}
    return sorted(level for level in levels if num_chunks <= level <= most)


def zb_h1_passes(stage: int, num_stages: int, num_micro_batches: int) -> Iterator[Pass]:
    """ZB-H1 (arXiv 2401.10241, section 2.1): 1F1B, and stage s runs a weight pass s micro-batches later.

    With this every stage holds p micro-batches, as the first stage of 1F1B does.
    """
    ahead = num_stages - 1 - stage
    for number in range(num_micro_batches + ahead + stage):
        for kind, micro_batch in ((FORWARD, number), (INPUT, number - ahead), (WEIGHT, number - ahead - stage)):
            if 0 <= micro_batch < num_micro_batches:
                yield Pass(kind, micro_batch, 0)


def zb_v_passes(stage: int, num_stages: int, num_micro_batches: int) -> Iterator[Pass]:
    """ZB-V (arXiv 2401.10241, section 6): two chunks in a V, no bubble with equal times and m >= 2p - 1."""
    after = num_stages - stage
    steady = max(num_micro_batches - 2 * num_stages + 1, 0) + stage
    pattern = ["F0"] * (2 * after - 1) + ["F1", "F0"] * stage + ["F1", "B1", "W1"] * after
    pattern += ["F0", "B0", "W0", "F1", "B1", "W1"] * steady + ["B0", "W0", "F1", "B1", "W1"] * (after - 1)
    pattern += ["B0", "B1"] * stage + ["B0", "W0"] * after + ["W1"] * stage + ["W0"] * stage
    done = dict.fromkeys(pattern, 0)
    for step in pattern:
        if done[step] < num_micro_batches:
            yield Pass(dict(zip("FBW", KINDS, strict=True))[step[0]], done[step], int(step[1]))
        done[step] += 1


class _Search:
    """The best so far: the shortest, then with the shortest longest stage, the fewest passes held, the first."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.orders: Orders = []
        self._score: tuple[float, ...] = (math.inf,)
        typical = sum(pipe.cost[stage, FORWARD, chunk] for stage, chunk in pipe.places) // len(pipe.places)
        self._allowances = (0, typical, 3 * typical, math.inf, None)
        fixed = zb_h1_passes if pipe.v == 1 else zb_v_passes
        self._fixed = [list(fixed(stage, pipe.p, pipe.m)) for stage in range(pipe.p)]
        self._patterns = [UrgentPasses(pipe, orders) for orders in _v_patterns(pipe)] if pipe.v == 2 else []

    @property
    def shortest(self) -> float:
        """Makespan in ticks."""
        return self._score[0]

    def try_level(self, level: int) -> None:
        """All candidates with at most so many passes held."""
        if self._most_held(self._fixed) <= level:
            self._take(self._fixed)
        made = (UrgentPasses(self.pipe, orders) for orders in self._made_for(level))
        for urgent in [*self._patterns, *made]:
            for allowed in self._allowances:
                placed = place_weights(self.pipe, urgent, level, allowed, self.shortest)
                if placed:
                    self._take(placed)

    def _made_for(self, level: int) -> Iterator[Orders]:
        """Orders of forward and input passes that depend on the memory."""
        pipe = self.pipe
        if pipe.v == 1:
            for ahead in (2, 3, 4):
                yield _one_by_one(pipe, [min(1 + ahead * (pipe.p - 1 - s) // 2, level) for s in range(pipe.p)])
            yield _one_by_one(pipe, _warm_up(pipe, level))
        else:
            ones = [[1, 1]] * pipe.p
            yield greedy_order(replace(pipe, ticks=PassSeconds(ones, ones, ones)), level)
        yield greedy_order(pipe, level)

    def _take(self, orders: Orders) -> None:
        timing = time_passes(orders, self.pipe.ticks, self.pipe.part_of)
        score = (timing.makespan, timing.longest_stage, self._most_held(orders))
        if score < self._score:
            self.orders, self._score = orders, score

    def _most_held(self, orders: Orders) -> float:
        return max(most_passes_held(order, self.pipe.kept / WHOLE) for order in orders)


def _v_patterns(pipe: Pipe) -> list[Orders]:
    """Orders of forward and input passes in ZB-V, V-Half and V-Min (arXiv 2405.15362, section 3)."""
    p = pipe.p
    half, third = 3 * (p % 2 == 0), 2 * (p % 3 == 0)
    return [
        [[step for step in zb_v_passes(stage, p, pipe.m) if step.kind != WEIGHT] for stage in range(p)],
        _repeat(pipe, lambda s: (2 * s, 3 * p - s - 2, 3 * p + half + 2 * s - 1, 6 * p + half - s - 2)),
        _repeat(pipe, lambda s: (s, 2 * p - s - 1, 2 * p + third + s, 4 * p + third - s - 1)),
    ]


def _one_by_one(pipe: Pipe, ahead: list[int]) -> Orders:
    """Some forward passes, then an input pass and a forward pass in turn."""
    orders: Orders = []
    for count in ahead:
        orders.append([Pass(FORWARD, micro_batch, 0) for micro_batch in range(min(count, pipe.m))])
        for micro_batch in range(pipe.m):
            orders[-1].append(Pass(INPUT, micro_batch, 0))
            if micro_batch + count < pipe.m:
                orders[-1].append(Pass(FORWARD, micro_batch + count, 0))
    return orders


def _warm_up(pipe: Pipe, limit: int) -> list[int]:
    """Forward passes that a stage finishes before the first gradient arrives (arXiv 2401.10241, section 3.1)."""
    last = pipe.p - 1
    counts = [1] * pipe.p
    end = pipe.starts[last] + pipe.cost[last, FORWARD, 0] + pipe.cost[last, INPUT, 0]
    for stage in reversed(range(last)):
        forward = max(pipe.cost[stage, FORWARD, 0], 1)
        fits = (end + pipe.transfer - pipe.starts[stage]) // forward
        counts[stage] = min(max(fits, counts[stage + 1] + 1), limit)
        end = max(end + pipe.transfer, pipe.starts[stage] + counts[stage] * forward) + pipe.cost[stage, INPUT, 0]
    return counts


def _repeat(pipe: Pipe, offsets: Callable[[int], tuple[int, int, int, int]]) -> Orders:
    """A stage's two forward and two input passes at their offsets, every 6 slots (arXiv 2405.15362, section 3)."""
    block = ((FORWARD, 0), (FORWARD, 1), (INPUT, 1), (INPUT, 0))
    orders: Orders = []
    for stage in range(pipe.p):
        slots = [
            (offset + 6 * i, i, *step)
            for offset, step in zip(offsets(stage), block, strict=True)
            for i in range(pipe.m)
        ]
        orders.append([Pass(kind, micro_batch, chunk) for _, micro_batch, kind, chunk in sorted(slots)])
    return orders


def _ticks(num_stages: int, num_micro_batches: int, num_chunks: int, seconds: PassSeconds) -> PassSeconds:
    """Durations as whole numbers.

    Raises:
        ValueError: sizes or durations that can't be.
    """
    if num_chunks not in (1, 2) or min(num_stages, num_micro_batches) < 1:
        raise ValueError(
            f"a zero-bubble schedule needs at least 1 stage and micro-batch, and 1 or 2 chunks, not {num_stages}, "
            f"{num_micro_batches} and {num_chunks}"
        )
    unit = _unit(seconds)
    tables: list[list[list[int]]] = []
    for kind, table in zip(KINDS, (seconds.forward, seconds.backward_input, seconds.backward_weight), strict=True):
        if len(table) != num_stages or any(len(row) != num_chunks for row in table):
            raise ValueError(
                f"{kind} has durations for {[len(row) for row in table]} chunks of {len(table)} stages; give one row "
                f"per stage ({num_stages}) with one number per chunk ({num_chunks})"
            )
        tables.append([[round(duration / unit * TICKS) for duration in row] for row in table])
    forward, backward_input, backward_weight = tables
    return PassSeconds(forward, backward_input, backward_weight, round(seconds.transfer / unit * TICKS))


def _unit(seconds: PassSeconds) -> float:
    """The power of ten of the longest duration.

    Raises:
        ValueError: durations that can't be.
    """
    longest = 0.0
    for kind, table in zip(KINDS, (seconds.forward, seconds.backward_input, seconds.backward_weight), strict=True):
        for duration in (duration for row in table for duration in row):
            if not (math.isfinite(duration) and duration >= 0):
                raise ValueError(f"{kind} has the duration {duration}; times must be finite and 0 or more")
            longest = max(longest, duration)
    if not (math.isfinite(seconds.transfer) and seconds.transfer >= 0):
        raise ValueError(f"transfer has the duration {seconds.transfer}; times must be finite and 0 or more")
    if longest == 0:
        raise ValueError("all passes have the duration 0; give at least one of them more")
    return float(10.0 ** math.floor(math.log10(longest)))
