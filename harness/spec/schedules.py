"""Pipeline schedules as data: which stage does what, in which order, and what follows from that.

A schedule is one entry of `SCHEDULES`, whose generator gets a `Stage` and yields that stage's instructions; the end
of the step (reductions and optimizer) is the same in all and added here. Engines execute these instructions, the
simulator times them, and the tracer's spans have their kinds, so that a simulated and a measured step compare span by
span. Who talks to whom, how many micro-batches are in flight and how large the ideal bubble is, is said nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.spec.config import RunConfig


class Instruction(NamedTuple):
    """One thing a stage does."""

    kind: str
    """A kind of `harness.spans.span.KINDS`."""
    micro_batch: int = -1
    """-1 where an instruction belongs to no micro-batch."""
    chunk: int = 0
    """Which of the stage's model chunks computes."""
    peer: int = -1
    """The stage at the other end of a transfer; -1 for all other instructions."""


@dataclass(frozen=True)
class Stage:
    """Where a schedule's generator stands, and the pieces it puts in order.

    Chunk c of stage s is the model's part number c p + s: with several chunks the layers run through all
    stages several times (arXiv 2104.04473, section 2.2).
    """

    index: int
    num_stages: int
    num_micro_batches: int
    num_chunks: int = 1

    def receive_activation(self, micro_batch: int, chunk: int = 0) -> list[Instruction]:
        """The input of a forward pass; nothing where the model begins."""
        previous = (self.index - 1) % self.num_stages
        return [] if self._begins(chunk) else [Instruction("recv_activation", micro_batch, chunk, previous)]

    def send_activation(self, micro_batch: int, chunk: int = 0) -> list[Instruction]:
        """The output of a forward pass; nothing where the model ends."""
        following = (self.index + 1) % self.num_stages
        return [] if self._ends(chunk) else [Instruction("send_activation", micro_batch, chunk, following)]

    def receive_gradient(self, micro_batch: int, chunk: int = 0) -> list[Instruction]:
        """The input of a backward pass; nothing where the model ends."""
        following = (self.index + 1) % self.num_stages
        return [] if self._ends(chunk) else [Instruction("recv_gradient", micro_batch, chunk, following)]

    def send_gradient(self, micro_batch: int, chunk: int = 0) -> list[Instruction]:
        """The output of a backward pass; nothing where the model begins."""
        previous = (self.index - 1) % self.num_stages
        return [] if self._begins(chunk) else [Instruction("send_gradient", micro_batch, chunk, previous)]

    def load(self, micro_batch: int, chunk: int = 0) -> list[Instruction]:
        """Samples where the model begins, their labels where it ends."""
        needed = self._begins(chunk) or self._ends(chunk)
        return [Instruction("load", micro_batch, chunk)] if needed else []

    def forward(self, micro_batch: int, chunk: int = 0) -> Iterator[Instruction]:
        """A forward pass: receive, compute, send."""
        yield from self.receive_activation(micro_batch, chunk)
        yield from self.load(micro_batch, chunk)
        yield Instruction("forward", micro_batch, chunk)
        yield from self.send_activation(micro_batch, chunk)

    def backward(self, micro_batch: int, chunk: int = 0) -> Iterator[Instruction]:
        """A backward pass: receive, compute, send."""
        yield from self.receive_gradient(micro_batch, chunk)
        yield Instruction("backward", micro_batch, chunk)
        yield from self.send_gradient(micro_batch, chunk)

    def _begins(self, chunk: int) -> bool:
        return self.index == 0 and chunk == 0

    def _ends(self, chunk: int) -> bool:
        return self.index == self.num_stages - 1 and chunk == self.num_chunks - 1


Generator = Callable[[Stage], Iterator[Instruction]]


def gpipe(stage: Stage) -> Iterator[Instruction]:
    """All forward passes, then all backward passes (GPipe, arXiv 1811.06965).

    3 stages, 4 micro-batches, a backward twice as long as a forward; a column is a unit of time, a dot is idle:

        stage 0   F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
        stage 1   .  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3 .  .
        stage 2   .  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .  .  .  .
    """
    for micro_batch in range(stage.num_micro_batches):
        yield from stage.forward(micro_batch)
    for micro_batch in range(stage.num_micro_batches):
        yield from stage.backward(micro_batch)


def one_forward_one_backward(stage: Stage) -> Iterator[Instruction]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503) in exactly the order of DeepSpeed's `TrainSchedule`.

    A stage is as many forward passes ahead as stages follow it. Its sends block, so an activation leaves
    only after the gradient from the same neighbour has come: neither waits for the other for ever.

    As idle as GPipe, but stage s keeps the activations of p - s micro-batches at most instead of all m:

        stage 0   F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3
        stage 1   .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3 .  .
        stage 2   .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .  .  .
    """
    ahead = stage.num_stages - 1 - stage.index
    for forward in range(stage.num_micro_batches + ahead):
        backward = forward - ahead
        goes_forward, goes_backward = forward < stage.num_micro_batches, backward >= 0
        if goes_forward:
            yield from stage.receive_activation(forward)
            yield from stage.load(forward)
            yield Instruction("forward", forward)
        if goes_backward:
            yield from stage.receive_gradient(backward)
        if goes_forward:
            yield from stage.send_activation(forward)
        if goes_backward:
            yield Instruction("backward", backward)
            yield from stage.send_gradient(backward)


def interleaved(stage: Stage) -> Iterator[Instruction]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): each stage holds several chunks of the model.

    A chunk takes p micro-batches in a row, then the next chunk takes the same ones. 2 stages of 2 chunks,
    the second in small letters; a column is half as long as one of `gpipe`:

        stage 0   F0 F1 f0 f1 F2 .  b0 b0 F3 b1 b1 f2 B0 B0 f3 B1 B1 .  b2 b2 .  b3 b3 B2 B2 B3 B3
        stage 1   .  F0 F1 f0 b0 b0 f1 b1 b1 F2 B0 B0 F3 B1 B1 f2 b2 b2 f3 b3 b3 B2 B2 B3 B3 .  .

    Raises:
        ValueError: the micro-batches can't be dealt out in groups of p, or there is only one chunk.
    """
    p, m, v = stage.num_stages, stage.num_micro_batches, stage.num_chunks
    if v < 2 or p < 2:
        raise ValueError(f"interleaved 1F1B needs 2 stages and 2 chunks or more, not {p} and {v}; use 1f1b")
    if m % p:
        raise ValueError(
            f"interleaved 1F1B runs micro-batches in groups of one per stage, and {m} micro-batches "
            f"are no multiple of {p} stages; use {m + -m % p} micro-batches or another schedule"
        )
    passes = m * v
    ahead = min(2 * (p - 1 - stage.index) + (v - 1) * p, passes)

    def turn(number: int) -> tuple[int, int]:
        """Micro-batch and chunk of a stage's pass `number`."""
        group, rest = divmod(number, p * v)
        chunk, position = divmod(rest, p)
        return group * p + position, chunk

    for number in range(passes + ahead):
        if number < passes:
            yield from stage.forward(*turn(number))
        if number >= ahead:
            micro_batch, chunk = turn(number - ahead)
            yield from stage.backward(micro_batch, v - 1 - chunk)


def forward_only(stage: Stage) -> Iterator[Instruction]:
    """What an evaluation does."""
    for micro_batch in range(stage.num_micro_batches):
        yield from stage.forward(micro_batch)


def fill_and_drain(p: int, m: int, v: int) -> Fraction:
    """(p-1)/(m v): idle over busy time of p equal stages with free transfers (arXiv 2104.04473, section 2.2)."""
    return Fraction(p - 1, m * v)


@dataclass(frozen=True)
class ScheduleKind:
    """What is to be known of a schedule, whatever its size."""

    generate: Generator
    """Yields what a stage does up to the last backward pass."""
    ideal_overhead: Callable[[int, int, int], Fraction]
    """Idle over busy time of p equal stages with m micro-batches, v chunks each and free transfers: (p, m, v) -> it."""
    runs: bool = True
    """Whether it is offered: parity has shown that it trains as one rank does. Else it is for simulations."""


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(gpipe, fill_and_drain, runs=False),
    "1f1b": ScheduleKind(one_forward_one_backward, fill_and_drain),
    "interleaved": ScheduleKind(interleaved, fill_and_drain, runs=False),
}
END_OF_STEP = [Instruction(kind) for kind in ("reduce_tied_gradients", "reduce_gradients", "optimizer", "reduce_loss")]


@dataclass(frozen=True)
class Schedule:
    """One optimizer step of a whole pipeline."""

    name: str
    num_micro_batches: int
    num_chunks: int
    stages: list[list[Instruction]]
    """Every stage's instructions in order."""

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of activations and of weights are computed one after the other (arXiv 2401.10241)."""
        return _splits(self.stages[0])

    @cached_property
    def micro_batches_in_flight(self) -> list[int]:
        """Of every stage: forward passes done whose backward pass is not, at most, over all its chunks."""
        return [_most_in_flight(instructions) for instructions in self.stages]


def build_schedule(name: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """The instructions of all stages.

    Args:
        name: a key of `SCHEDULES`.
        num_chunks: parts of the model per stage (interleaved only).

    Raises:
        ValueError: an unknown name, or sizes that the schedule can't run.
    """
    kind = schedule_kind(name)
    if min(num_stages, num_micro_batches, num_chunks) < 1:
        raise ValueError(
            f"a schedule needs at least 1 stage, micro-batch and chunk, not {num_stages}, {num_micro_batches} "
            f"and {num_chunks}"
        )
    sizes = (num_stages, num_micro_batches, num_chunks)
    stages = [[*kind.generate(Stage(index, *sizes)), *END_OF_STEP] for index in range(num_stages)]
    used = 1 + max(instruction.chunk for instruction in stages[0])
    if used != num_chunks:
        raise ValueError(f"schedule {name} runs {used} chunk per stage, not {num_chunks}; use interleaved")
    for index, instructions in enumerate(stages):
        _check_passes(name, index, instructions, num_micro_batches * num_chunks)
    return Schedule(name, num_micro_batches, num_chunks, stages)


def _check_passes(name: str, stage: int, instructions: list[Instruction], passes: int) -> None:
    """Refuse a schedule by which a stage leaves out a pass or does one twice.

    Raises:
        ValueError: it does.
    """
    kinds = ("forward", "backward_input", "backward_weight") if _splits(instructions) else ("forward", "backward")
    for kind in kinds:
        done = [instruction for instruction in instructions if instruction.kind == kind]
        if len(done) != passes or len(set(done)) != passes:
            raise ValueError(
                f"schedule {name} has {len(done)} {kind} passes on stage {stage}, {len(set(done))} of them different, "
                f"instead of {passes}: each micro-batch and chunk once"
            )


def _splits(instructions: list[Instruction]) -> bool:
    return any(instruction.kind == "backward_weight" for instruction in instructions)


def schedule_of(config: RunConfig) -> Schedule:
    """What the ranks of a run execute."""
    return build_schedule(*_sizes(config))


def ideal_bubble_overhead_of(config: RunConfig) -> float:
    """Of a run's schedule: idle over busy time with equal stages and free transfers."""
    return ideal_bubble_overhead(*_sizes(config))


def ideal_bubble_fraction_of(config: RunConfig) -> float:
    """Of a run's schedule: idle share of the pipeline's time with equal stages and free transfers."""
    return ideal_bubble_fraction(*_sizes(config))


def _sizes(config: RunConfig) -> tuple[str, int, int]:
    return config.parallel.schedule, config.parallel.pp, config.num_micro_batches


def schedule_kind(name: str) -> ScheduleKind:
    """What is known of a schedule.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def ideal_bubble_overhead(name: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> float:
    """Idle over busy time with equal stages and free transfers."""
    return float(schedule_kind(name).ideal_overhead(num_stages, num_micro_batches, num_chunks))


def ideal_bubble_fraction(name: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> float:
    """Idle share of the pipeline's time with equal stages and free transfers."""
    overhead = schedule_kind(name).ideal_overhead(num_stages, num_micro_batches, num_chunks)
    return float(overhead / (1 + overhead))


def _most_in_flight(instructions: list[Instruction]) -> int:
    """A micro-batch's activations are held from its forward to its last backward pass."""
    last = "backward_weight" if _splits(instructions) else "backward"
    most = now = 0
    for instruction in instructions:
        now += (instruction.kind == "forward") - (instruction.kind == last)
        most = max(most, now)
    return most
