"""Passes of a pipeline: what a stage computes, and when it ends if every stage runs its passes one after the other.

Part k of the model takes a forward pass's input from part k - 1 and a backward pass's from part k + 1; a weight pass
needs its own stage's backward pass. A pass starts when its stage is free and its input has arrived: data leave when
they are computed, take the transfer time to another stage and none inside a stage, and cost neither stage anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One computation of a stage."""

    kind: str
    """"forward", and "backward" or its halves "backward_input" and "backward_weight" (arXiv 2401.10241, section 1)."""
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class PassSeconds:
    """How long the passes of one micro-batch take, [stage][chunk], in any one unit."""

    forward: Sequence[Sequence[float]]
    backward_input: Sequence[Sequence[float]]
    backward_weight: Sequence[Sequence[float]]
    transfer: float = 0.0
    """From the end of a pass to its data's arrival at another stage."""

    def of(self, stage: int, kind: str, chunk: int) -> float:
        """Duration of a pass; an unsplit backward takes as long as its halves."""
        if kind == "backward":
            return self.backward_input[stage][chunk] + self.backward_weight[stage][chunk]
        tables = {
            "forward": self.forward,
            "backward_input": self.backward_input,
            "backward_weight": self.backward_weight,
        }
        return tables[kind][stage][chunk]


PartOf = Callable[[int, int], int]
"""(stage, chunk) -> the model's part, from 0."""
Orders = Sequence[Sequence[Pass]]
"""Every stage's passes in order."""
_Datum = tuple[str, int, int]
"""Activation or gradient, micro-batch, and the part that computes it."""


class Timing(NamedTuple):
    """When passes end, where the first forward pass starts at 0."""

    ends: list[list[float]]
    """[stage][position in its order]."""
    makespan: float
    """From the first pass's start to the last one's end, over all stages."""
    longest_stage: float
    """The same of the stage where it is longest: what arXiv 2401.10241, section 4.1, calls cost."""


def time_passes(orders: Orders, seconds: PassSeconds, part_of: PartOf, free: Sequence[float] | None = None) -> Timing:
    """When every pass ends, with stages that are `free` from the start or from then.

    Raises:
        ValueError: stages wait for each other for ever, or for a pass that no stage has.
    """
    run = _Run(orders, seconds, part_of, free or [0] * len(orders))
    while run.runnable:
        run.advance(run.runnable.pop())
    run.check_end()
    busy = [stage for stage in range(len(orders)) if run.ends[stage]]
    return Timing(
        run.ends,
        max((run.clocks[s] for s in busy), default=0) - min((run.starts[s] for s in busy), default=0),
        max((run.clocks[s] - run.starts[s] for s in busy), default=0),
    )


def most_passes_held(order: Sequence[Pass], kept: float = 1.0) -> float:
    """The most that a stage holds at once, in passes: each from its forward to its backward pass.

    Of a split backward pass the input half leaves `kept` of it, for the weight half (arXiv 2401.10241, section 2.2).
    """
    most: float = 0
    whole = share = 0
    for kind, _, _ in order:
        whole += (kind == "forward") - (kind in ("backward", "backward_input"))
        share += (kind == "backward_input") - (kind == "backward_weight")
        most = max(most, whole + kept * share)
    return round(most, 9)


class _Run:
    """Stages that each run ahead until they must wait for another, which puts them back to `runnable`."""

    def __init__(self, orders: Orders, seconds: PassSeconds, part_of: PartOf, free: Sequence[float]) -> None:
        self.orders, self.seconds = orders, seconds
        self.runnable = list(range(len(orders)))
        self.ends: list[list[float]] = [[] for _ in orders]
        self.starts: list[float] = [0] * len(orders)
        self.clocks = list(free)
        used = sorted({(stage, chunk) for stage, order in enumerate(orders) for _, _, chunk in order})
        self._parts = {place: part_of(*place) for place in used}
        self._durations = {
            (stage, kind, chunk): seconds.of(stage, kind, chunk)
            for stage, order in enumerate(orders)
            for kind, _, chunk in order
        }
        self._stage_of = {part: stage for (stage, _), part in self._parts.items()}
        self._last = max(self._parts.values(), default=0)
        self._done: dict[_Datum, tuple[float, int]] = {}
        self._waiting: dict[_Datum, int] = {}

    def advance(self, stage: int) -> None:
        """Run a stage's passes until one's input isn't computed yet."""
        ends, clock = self.ends[stage], self.clocks[stage]
        rest = self.orders[stage][len(ends) :]
        for kind, micro_batch, chunk in rest:
            part = self._parts[stage, chunk]
            needed = self._needed(kind, micro_batch, part)
            if needed is not None:
                if needed not in self._done:
                    self._waiting[needed] = stage
                    break
                end, sender = self._done[needed]
                clock = max(clock, end if sender == stage else end + self.seconds.transfer)
            if not ends:
                self.starts[stage] = clock
            clock += self._durations[stage, kind, chunk]
            ends.append(clock)
            if kind != "backward_weight":
                computed = ("activation" if kind == "forward" else "gradient", micro_batch, part)
                self._done[computed] = (clock, stage)
                if computed in self._waiting:
                    self.runnable.append(self._waiting.pop(computed))
        self.clocks[stage] = clock

    def _needed(self, kind: str, micro_batch: int, part: int) -> _Datum | None:
        if kind == "forward":
            return ("activation", micro_batch, part - 1) if part else None
        if kind == "backward_weight":
            return ("gradient", micro_batch, part)
        return ("gradient", micro_batch, part + 1) if part < self._last else ("activation", micro_batch, part)

    def check_end(self) -> None:
        """Say who waits for whom.

        Raises:
            ValueError: a stage has passes left.
        """
        stuck = []
        for (what, micro_batch, part), stage in sorted(self._waiting.items(), key=lambda item: item[1]):
            waits = self.orders[stage][len(self.ends[stage])]
            on = f"on stage {self._stage_of[part]}" if part in self._stage_of else "which no stage has"
            stuck.append(
                f"stage {stage} at {waits.kind} of micro-batch {waits.micro_batch}, chunk {waits.chunk}, waits for the "
                f"{what} of micro-batch {micro_batch} from part {part} {on}"
            )
        if stuck:
            raise ValueError(
                f"stages wait for each other for ever: {'; '.join(stuck)}; put what is waited for earlier in its order"
            )
