"""Pipeline schedules as data: which stage computes what, in which order, and what follows from that.

A schedule is one entry of `SCHEDULES`, whose generator yields the passes of a stage in order. What surrounds them
follows from where the parts of the model are (`harness.spec.placement`): a pass receives what it needs just before it
begins, and its result is on the way as soon as it ends; a hand-over inside a stage is no transfer. The end of the step
(reductions and optimizer) is the same in all. Engines execute these instructions, the simulator times them, and the
tracer's spans have their kinds, so that a simulated and a measured step compare span by span. Who talks to whom, how
many micro-batches are in flight and how large the ideal bubble is, is said nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from harness.errors import ConfigError
from harness.spec.passes import Orders, Pass, PassSeconds, time_passes
from harness.spec.placement import Placement
from harness.spec.schedule_files import passes_of
from harness.spec.zero_bubble import list_schedule, zb_h1_passes

if TYPE_CHECKING:
    from harness.spec.config import Parallel, RunConfig


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


def forward(micro_batch: int, chunk: int = 0) -> Instruction:
    """A forward pass."""
    return Instruction("forward", micro_batch, chunk)


def backward(micro_batch: int, chunk: int = 0) -> Instruction:
    """A whole backward pass."""
    return Instruction("backward", micro_batch, chunk)


def backward_input(micro_batch: int, chunk: int = 0) -> Instruction:
    """The gradient of a chunk's input, which the stage before waits for (arXiv 2401.10241)."""
    return Instruction("backward_input", micro_batch, chunk)


def backward_weight(micro_batch: int, chunk: int = 0) -> Instruction:
    """The gradients of a chunk's weights, which nobody waits for (arXiv 2401.10241)."""
    return Instruction("backward_weight", micro_batch, chunk)


Seconds = tuple[tuple[float, float, float], ...]
"""Of a forward pass and of the halves of a backward pass, for each part of the model, or one for all."""


@dataclass(frozen=True)
class Stage:
    """Where a schedule's generator stands."""

    index: int
    num_stages: int
    num_micro_batches: int
    num_chunks: int = 1
    memory: float | None = None
    """Limit of the activations that a stage holds, in multiples of those of 1F1B's first stage; None: as many as it."""
    seconds: Seconds | None = None
    """None: all passes take equally long."""

    @property
    def num_following(self) -> int:
        """Stages after this one."""
        return self.num_stages - 1 - self.index


Generator = Callable[[Stage], Iterator[Instruction]]


def gpipe(stage: Stage) -> Iterator[Instruction]:
    """All forward passes, then all backward passes (GPipe, arXiv 1811.06965).

    3 stages, 4 micro-batches, a backward twice as long as a forward; a column is a unit of time, a dot is idle:

        stage 0   F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
        stage 1   .  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3 .  .
        stage 2   .  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .  .  .  .
    """
    yield from map(forward, range(stage.num_micro_batches))
    yield from map(backward, range(stage.num_micro_batches))


def one_forward_one_backward(stage: Stage) -> Iterator[Instruction]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): a stage is as many forward passes ahead as stages follow it.

    As idle as GPipe, but stage s keeps the activations of p - s micro-batches at most instead of all m:

        stage 0   F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3
        stage 1   .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3 .  .
        stage 2   .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .  .  .
    """
    ahead = min(stage.num_following, stage.num_micro_batches)
    yield from map(forward, range(ahead))
    for number in range(stage.num_micro_batches):
        if number + ahead < stage.num_micro_batches:
            yield forward(number + ahead)
        yield backward(number)


def interleaved(stage: Stage) -> Iterator[Instruction]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): each stage holds several chunks of the model.

    A chunk takes p micro-batches in a row, then the next chunk takes the same ones. 2 stages of 2 chunks,
    the second in small letters; a column is half as long as one of `gpipe`:

        stage 0   F0 F1 f0 f1 F2 .  b0 b0 F3 b1 b1 f2 B0 B0 f3 B1 B1 .  b2 b2 .  b3 b3 B2 B2 B3 B3
        stage 1   .  F0 F1 f0 b0 b0 f1 b1 b1 F2 B0 B0 F3 B1 B1 f2 b2 b2 f3 b3 b3 B2 B2 B3 B3 .  .

    Raises:
        ValueError: the micro-batches can't be dealt out in groups of p.
    """
    p, m, v = stage.num_stages, stage.num_micro_batches, stage.num_chunks
    if m % p:
        raise ValueError(
            f"interleaved 1F1B runs micro-batches in groups of one per stage, and {m} micro-batches "
            f"are no multiple of {p} stages; use {m + -m % p} micro-batches or another schedule"
        )
    passes = m * v
    ahead = min(2 * stage.num_following + (v - 1) * p, passes)

    def turn(number: int) -> tuple[int, int]:
        """Micro-batch and chunk of a stage's pass `number`."""
        group, rest = divmod(number, p * v)
        chunk, position = divmod(rest, p)
        return group * p + position, chunk

    for number in range(passes + ahead):
        if number < passes:
            yield forward(*turn(number))
        if number >= ahead:
            micro_batch, chunk = turn(number - ahead)
            yield backward(micro_batch, v - 1 - chunk)


def zb_h1(stage: Stage) -> Iterator[Instruction]:
    """ZB-H1 (arXiv 2401.10241, section 3): 1F1B whose backward passes are split, with as many activations.

    Stage s computes the weight gradients of a micro-batch s micro-batches late, which fills the end of the step:

        stage 0   F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        stage 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        stage 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    passes = zb_h1_passes(stage.index, stage.num_stages, stage.num_micro_batches)
    yield from (Instruction(*step) for step in passes)


def dualpipev(stage: Stage) -> Iterator[Instruction]:
    """DualPipeV in DeepSpeed's order (https://github.com/deepseek-ai/DualPipe), which splits no backward pass.

    Two stages, each with two chunks in a V, the second in small letters:

        stage 0   F0 F1 F2 f0 b0 b0 f1 F3 b1 b1 f2 B0 B0 b2 b2 f3 .  B1 B1 b3 b3 B2 B2 .  .  B3 B3
        stage 1   .  F0 f0 F1 f1 F2 b0 b0 f2 B0 B0 F3 b1 b1 f3 B1 B1 b2 b2 B2 B2 b3 b3 B3 B3

    Raises:
        ValueError: there are fewer micro-batches than parts.
    """
    p, m = stage.num_stages, stage.num_micro_batches
    if m < 2 * p:
        raise ValueError(
            f"DualPipeV needs 2 micro-batches per stage, and {m} are fewer than {2 * p} for {p} stages; "
            f"use {2 * p} micro-batches or more, or another schedule"
        )
    following = stage.num_following
    forwards, backwards = (count(), count()), (count(), count())

    def run(order: str, times: int) -> Iterator[Instruction]:
        """Passes such as `F0 B1`: kind and chunk, with the next micro-batch of each."""
        for _ in range(times):
            for kind, chunk in ((word[0], int(word[1])) for word in order.split()):
                yield forward(next(forwards[chunk]), chunk) if kind == "F" else backward(next(backwards[chunk]), chunk)

    yield from run("F0", 2 * following)
    yield from run("F0 F1", stage.index + 1)
    yield from run("B1 F1", following)
    yield from run("F0 B1 F1 B0", m - 2 * p + stage.index + 1)
    yield from run("B1 F1 B0", following)
    yield from run("B1 B0", stage.index + 1)
    yield from run("B0", following)


def zero_bubble(stage: Stage) -> Iterator[Instruction]:
    """The shortest schedule that a search finds within a limit of memory (`harness.spec.zero_bubble`).

    With one chunk per stage these are ZB-1p and ZB-2p (arXiv 2401.10241, section 3), with two in a V, the second in
    small letters, ZB-V, V-Half and V-Min (arXiv 2405.15362):

        stage 0   F0 F1 F2 f0 i0 w0 f1 i1 w1 F3 I0 W0 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 I3 W3
        stage 1   .  F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 F3 I1 W1 f3 i2 w2 I2 i3 I3 W2 w3 W3

    Raises:
        ValueError: too little memory for any.
    """
    memory = 1.0 if stage.memory is None else stage.memory
    sizes = stage.num_stages, stage.num_micro_batches, stage.num_chunks
    orders = _zero_bubble_orders(*sizes, memory, stage.seconds or ((1.0, 1.0, 1.0),))
    yield from (Instruction(*step) for step in orders[stage.index])


@lru_cache(maxsize=64)
def _zero_bubble_orders(p: int, m: int, v: int, memory: float, seconds: Seconds) -> Orders:
    placement = Placement(p, v, is_v=True)
    of_parts = seconds * placement.num_parts if len(seconds) == 1 else seconds
    forward, input_half, weight_half = (
        [[of_parts[part][kind] for part in placement.parts_of(stage)] for stage in range(p)] for kind in range(3)
    )
    return list_schedule(p, m, v, PassSeconds(forward, input_half, weight_half), memory)


def forward_only(stage: Stage) -> Iterator[Instruction]:
    """What an evaluation does: one chunk after the other."""
    for chunk in range(stage.num_chunks):
        yield from (forward(micro_batch, chunk) for micro_batch in range(stage.num_micro_batches))


def fill_and_drain(p: int, m: int, v: int) -> Fraction:
    """(p-1)/(m v): idle over busy time of p equal stages with free transfers (arXiv 2104.04473, section 2.2)."""
    return Fraction(p - 1, m * v)


@dataclass(frozen=True)
class ScheduleKind:
    """What is to be known of a schedule, whatever its size."""

    generate: Generator
    """Yields the passes of a stage in order."""
    ideal_overhead: Callable[[int, int, int], Fraction] | None = None
    """Idle over busy time of p stages with m micro-batches and v chunks each, where all passes take equally long (a
    whole backward as two) and transfers nothing: (p, m, v) -> it. None: it is found out by executing the passes."""
    num_chunks: int = 1
    """Of a stage, where nothing else is asked for."""
    most_chunks: int | None = 1
    """None: any number from `num_chunks` on."""
    is_v: bool = False
    """How the chunks are placed: in a V, or in a loop."""
    splits: bool = False
    """Whether gradients of inputs and of weights are computed one after the other (arXiv 2401.10241)."""
    limits_memory: bool = False
    """Whether it keeps within `parallel.schedule_memory`."""


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(gpipe, fill_and_drain),
    "1f1b": ScheduleKind(one_forward_one_backward, fill_and_drain),
    "interleaved": ScheduleKind(interleaved, fill_and_drain, num_chunks=2, most_chunks=None),
    "zb_h1": ScheduleKind(zb_h1, splits=True),
    "zb_auto": ScheduleKind(zero_bubble, splits=True, limits_memory=True),
    "zb_v": ScheduleKind(zero_bubble, num_chunks=2, most_chunks=2, is_v=True, splits=True, limits_memory=True),
    "dualpipev": ScheduleKind(dualpipev, num_chunks=2, most_chunks=2, is_v=True),
}
END_OF_STEP = [Instruction(kind) for kind in ("reduce_tied_gradients", "reduce_gradients", "optimizer", "reduce_loss")]


@dataclass(frozen=True)
class Schedule:
    """What a whole pipeline does in one optimizer step, or in one evaluation."""

    name: str
    num_micro_batches: int
    placement: Placement
    stages: list[list[Instruction]]
    """Every stage's instructions in order."""

    @property
    def num_chunks(self) -> int:
        """Of every stage."""
        return self.placement.num_chunks

    @cached_property
    def computes(self) -> frozenset[str]:
        """Kinds of its passes."""
        return frozenset(i.kind for stage in self.stages for i in stage if i.peer < 0 <= i.micro_batch) - {"load"}

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed one after the other (arXiv 2401.10241)."""
        return "backward_weight" in self.computes

    @cached_property
    def most_in_flight(self) -> list[float]:
        """Of every stage: micro-batches whose activations it holds, at most; a pass of one of v chunks is 1/v."""
        weights = [1 / self.num_chunks] * self.num_chunks
        return [most_held(stage, weights) for stage in self.stages]


def most_held(instructions: Iterable[Instruction], of_chunk: Sequence[float], waiting: Sequence[float] = ()) -> float:
    """The most of something that passes hold from forward to the end of backward.

    Args:
        of_chunk: how much a pass holds, by chunk.
        waiting: how much of it between the two halves of a split backward pass; all of it, if not given.
    """
    waiting = waiting or of_chunk
    most = now = 0.0
    for kind, _, chunk, _ in instructions:
        if kind == "forward":
            now += of_chunk[chunk]
        elif kind == "backward_input":
            now += waiting[chunk] - of_chunk[chunk]
        elif kind in ("backward", "backward_weight"):
            now -= waiting[chunk] if kind == "backward_weight" else of_chunk[chunk]
        most = max(most, now)
    return most


def build_schedule(
    name: str,
    num_stages: int,
    num_micro_batches: int,
    num_chunks: int | None = None,
    memory: float | None = None,
    seconds: Seconds | None = None,
    kind: ScheduleKind | None = None,
) -> Schedule:
    """The instructions of all stages.

    Args:
        name: a key of `SCHEDULES`, or what is said of the given kind.
        num_chunks: parts of the model per stage; None: as many as the schedule has where nothing is asked for.
        memory: limit of the activations that a stage holds, in multiples of those of 1F1B's first stage.
        seconds: what a search counts with.

    Raises:
        ValueError: an unknown name, or sizes that the schedule can't run.
    """
    kind = kind or schedule_kind(name)
    placement = build_placement(name, num_stages, num_chunks, kind)
    if num_micro_batches < 1:
        raise ValueError(f"a schedule needs at least 1 micro-batch, not {num_micro_batches}")
    return _build(name, kind, placement, num_micro_batches, memory, seconds)


@lru_cache(maxsize=64)
def _build(
    name: str,
    kind: ScheduleKind,
    placement: Placement,
    num_micro_batches: int,
    memory: float | None,
    seconds: Seconds | None,
) -> Schedule:
    num_stages, num_chunks = placement.num_stages, placement.num_chunks
    stages = [
        list(kind.generate(Stage(index, num_stages, num_micro_batches, num_chunks, memory, seconds)))
        for index in range(num_stages)
    ]
    for index, passes in enumerate(stages):
        check_passes(name, index, passes, num_micro_batches, placement.num_chunks)
    return Schedule(name, num_micro_batches, placement, [
        [*with_transfers(passes, placement, index), *END_OF_STEP] for index, passes in enumerate(stages)
    ])  # fmt: skip


def check_sizes(
    name: str, num_stages: int, num_micro_batches: int, num_chunks: int | None = None, memory: float | None = None
) -> None:
    """Refuse sizes that a schedule of the table can't run.

    Raises:
        ValueError: with what can be run.
    """
    kind, placement = schedule_kind(name), build_placement(name, num_stages, num_chunks)
    if memory is not None and not kind.limits_memory:
        limiting = " or ".join(other for other, known in SCHEDULES.items() if known.limits_memory)
        raise ValueError(f"{name} keeps to no limit of memory, but schedule_memory={memory:g}; use {limiting}")
    stage = Stage(0, num_stages, num_micro_batches, placement.num_chunks, memory)
    next(kind.generate(stage), None)  # generators refuse before their first pass


def check_file(config: RunConfig) -> None:
    """Refuse a schedule from a file that leaves out a pass, deadlocks, or holds more than `schedule_memory` allows.

    Raises:
        ValueError: with what is wrong.
    """
    parallel, rows = config.parallel, config.parallel.schedule_passes or []
    if len(rows) != parallel.pp:
        raise ValueError(f"it has rows for {len(rows)} stages, but parallel.pp={parallel.pp}; make them equal")
    num_micro_batches = 1 + max(number for row in rows for _, number, _ in passes_of(row))
    if num_micro_batches != config.num_micro_batches:
        raise ValueError(
            f"it has passes of {num_micro_batches} micro-batches, but a step has {config.num_micro_batches}; change "
            "train.global_batch_size or train.micro_batch_size"
        )
    schedule = schedule_of(config)
    executed_overhead(schedule)  # refuses stages that wait for each other for ever
    held, limit = max(schedule.most_in_flight), parallel.schedule_memory
    if limit is not None and held > limit * parallel.pp:
        raise ValueError(
            f"it holds the activations of {held:g} micro-batches, but schedule_memory={limit:g} allows "
            f"{limit * parallel.pp:g} on {parallel.pp} stages; raise it or run backward passes earlier"
        )


def kind_of(parallel: Parallel) -> ScheduleKind:
    """What is known of a run's schedule.

    Raises:
        ValueError: passes from a file that no placement has.
    """
    passes = parallel.schedule_passes
    return schedule_kind(parallel.schedule) if passes is None else kind_of_passes(tuple(passes))


@lru_cache(maxsize=64)
def kind_of_passes(rows: tuple[str, ...]) -> ScheduleKind:
    """A schedule whose passes are given.

    Args:
        rows: of every stage, as `harness.spec.schedule_files.read_schedule` has them.

    Raises:
        ValueError: the parts of the stages are in neither a loop nor a V.
    """
    passes = [passes_of(row) for row in rows]
    if not any(passes):
        raise ValueError("it has no pass; give a row of passes per stage, such as 0F0,0B0")
    parts = [sorted({part for _, _, part in row}) for row in passes]
    num_chunks = max(map(len, parts))
    for placement in (Placement(len(rows), num_chunks, is_v) for is_v in (False, True)):
        if parts == [sorted(placement.parts_of(stage)) for stage in range(len(rows))]:
            break
    else:
        loop, v = (_parts_of_stages(Placement(len(rows), num_chunks, is_v)) for is_v in (False, True))
        raise ValueError(
            f"its stages have the parts {', '.join(map(str, parts))}; with {num_chunks} parts each, place them in a "
            f"loop ({loop}) or in a V ({v})"
        )
    orders = [[Instruction(kind, number, placement.place(part)[1]) for kind, number, part in row] for row in passes]
    splits = any(kind == "backward_weight" for row in passes for kind, _, _ in row)
    return ScheduleKind(
        lambda stage: iter(orders[stage.index]),
        num_chunks=num_chunks,
        most_chunks=num_chunks,
        is_v=placement.is_v,
        splits=splits,
        limits_memory=True,
    )


def _parts_of_stages(placement: Placement) -> str:
    return ", ".join(str(placement.parts_of(stage)) for stage in range(placement.num_stages))


def passes_with_parts(schedule: Schedule) -> list[list[tuple[str, int, int]]]:
    """Kind, micro-batch and part of every pass of every stage, as `write_schedule` takes them."""
    return [
        [(i.kind, i.micro_batch, schedule.placement.part(stage, i.chunk)) for i in order if i.kind in schedule.computes]
        for stage, order in enumerate(schedule.stages)
    ]


def build_placement(
    name: str, num_stages: int, num_chunks: int | None = None, kind: ScheduleKind | None = None
) -> Placement:
    """Where a schedule has the parts of a model.

    Raises:
        ValueError: sizes that the schedule can't run.
    """
    kind = kind or schedule_kind(name)
    num_chunks = kind.num_chunks if num_chunks is None else num_chunks
    if num_stages < 1 or num_chunks < 1:
        raise ValueError(f"a schedule needs at least 1 stage and chunk, not {num_stages} and {num_chunks}")
    if num_chunks < kind.num_chunks or num_chunks > (kind.most_chunks or num_chunks):
        several = f"{kind.num_chunks}{' or more' if kind.most_chunks is None else ''} chunks"
        raise ValueError(
            f"{name} has {'1 chunk' if several == '1 chunks' else several} per stage, not {num_chunks}; leave "
            "num_chunks out, or use another schedule"
        )
    if num_stages == 1 < num_chunks:
        raise ValueError(f"{name} needs 2 stages or more, not 1; use 1f1b")
    return Placement(num_stages, num_chunks, kind.is_v)


def evaluation(placement: Placement, num_micro_batches: int) -> Schedule:
    """What a pipeline does to evaluate."""
    stages = [
        Stage(index, placement.num_stages, num_micro_batches, placement.num_chunks)
        for index in range(placement.num_stages)
    ]
    orders = [list(with_transfers(forward_only(stage), placement, stage.index)) for stage in stages]
    return Schedule("evaluation", num_micro_batches, placement, orders)


def with_transfers(passes: Iterable[Instruction], placement: Placement, stage: int) -> Iterator[Instruction]:
    """The passes of a stage with what they receive, load and send."""
    last = placement.num_parts - 1
    for instruction in passes:
        kind, micro_batch, chunk, _ = instruction
        part = placement.part(stage, chunk)
        before = placement.stage_of(part - 1) if part > 0 else stage
        after = placement.stage_of(part + 1) if part < last else stage
        if kind == "forward":
            if before != stage:
                yield Instruction("recv_activation", micro_batch, chunk, before)
            if part in (0, last):
                yield Instruction("load", micro_batch, chunk)
            yield instruction
            if after != stage:
                yield Instruction("send_activation", micro_batch, chunk, after)
        elif kind == "backward_weight":
            yield instruction
        else:
            if after != stage:
                yield Instruction("recv_gradient", micro_batch, chunk, after)
            yield instruction
            if before != stage:
                yield Instruction("send_gradient", micro_batch, chunk, before)


def check_passes(name: str, stage: int, passes: Sequence[Instruction], num_micro_batches: int, num_chunks: int) -> None:
    """Refuse a schedule by which a stage leaves out a pass, does one twice or too early.

    Raises:
        ValueError: it does.
    """
    done: dict[tuple[int, int], list[str]] = {(k, c): [] for k in range(num_micro_batches) for c in range(num_chunks)}
    for kind, micro_batch, chunk, _ in passes:
        if (micro_batch, chunk) not in done:
            raise ValueError(
                f"schedule {name} has {kind} of micro-batch {micro_batch} and chunk {chunk} on stage {stage}, but "
                f"there are {num_micro_batches} micro-batches and {num_chunks} chunks, counted from 0"
            )
        done[micro_batch, chunk].append(kind)
    for (micro_batch, chunk), kinds in done.items():
        if kinds not in WHOLE:
            raise ValueError(
                f"schedule {name} computes {', '.join(kinds) or 'nothing'} of micro-batch {micro_batch} and chunk "
                f"{chunk} on stage {stage}; it must be {' or '.join(map(', '.join, WHOLE))}, each once in this order"
            )


WHOLE = (["forward", "backward"], ["forward", "backward_input", "backward_weight"])
"""What is computed of a micro-batch with a chunk."""


def placement_of(parallel: Parallel) -> Placement:
    """Where a run has the parts of its model."""
    return build_placement(parallel.schedule, parallel.pp, parallel.num_chunks, kind_of(parallel))


def schedule_of(config: RunConfig) -> Schedule:
    """What the ranks of a run execute."""
    return build_schedule(*_sizes(config))


def ideal_bubble_overhead_of(config: RunConfig) -> float:
    """Of a run's schedule: idle over busy time with equal passes and free transfers."""
    return float(_ideal(*_sizes(config)))


def ideal_bubble_fraction_of(config: RunConfig) -> float:
    """Of a run's schedule: idle share of the pipeline's time with equal passes and free transfers."""
    overhead = _ideal(*_sizes(config))
    return float(overhead / (1 + overhead))


def _sizes(config: RunConfig) -> tuple[str, int, int, int, float | None, Seconds | None, ScheduleKind]:
    parallel, given = config.parallel, config.parallel.schedule_seconds
    sizes = parallel.pp, config.num_micro_batches, parallel.num_chunks, parallel.schedule_memory
    seconds = None if given is None else tuple((row[0], row[1], row[2]) for row in given)
    return parallel.schedule, *sizes, seconds, kind_of(parallel)


def schedule_kind(name: str) -> ScheduleKind:
    """What is known of a schedule.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def ideal_bubble_overhead(
    name: str, num_stages: int, num_micro_batches: int, num_chunks: int | None = None, memory: float | None = None
) -> float:
    """Idle over busy time with equal passes and free transfers; arguments as in `build_schedule`."""
    return float(_ideal(name, num_stages, num_micro_batches, num_chunks, memory))


def ideal_bubble_fraction(
    name: str, num_stages: int, num_micro_batches: int, num_chunks: int | None = None, memory: float | None = None
) -> float:
    """Idle share of the pipeline's time with equal passes and free transfers; arguments as in `build_schedule`."""
    overhead = _ideal(name, num_stages, num_micro_batches, num_chunks, memory)
    return float(overhead / (1 + overhead))


def _ideal(
    name: str,
    num_stages: int,
    num_micro_batches: int,
    num_chunks: int | None,
    memory: float | None,
    seconds: Seconds | None = None,
    kind: ScheduleKind | None = None,
) -> Fraction:
    kind = kind or schedule_kind(name)
    if kind.ideal_overhead is not None:
        return kind.ideal_overhead(num_stages, num_micro_batches, num_chunks or kind.num_chunks)
    return executed_overhead(build_schedule(name, num_stages, num_micro_batches, num_chunks, memory, seconds, kind))


def executed_overhead(schedule: Schedule) -> Fraction:
    """Idle over busy time where forwards and halves of backwards all take as long, and transfers nothing.

    Raises:
        ValueError: stages wait for each other for ever.
    """
    orders = [[Pass(*i[:3]) for i in stage if i.kind in schedule.computes] for stage in schedule.stages]
    equal = [[1] * schedule.num_chunks] * len(orders)
    timing = time_passes(orders, PassSeconds(equal, equal, equal), schedule.placement.part)
    return Fraction(int(timing.makespan), 3 * schedule.num_micro_batches * schedule.num_chunks) - 1
