"""Why a measured step has the bubble it has: ideal, simulated and measured beside each other, and the causes.

Each cause is the difference between two simulations of the same schedule, from what the schedule dictates to
what was measured:

    ideal      equal passes (the mean forward and backward of all), free transfers: fill and drain
    imbalance  + the mean forward and backward of each chunk of each stage
    transfer   + every link's mean transfer time
    load       + what micro-batches have more or less to do than others: each of them lengthens its forwards, and its
               backwards, by one factor on all stages and chunks, the mean of duration / mean of that chunk's
    jitter     + the durations of the single passes and transfers
    host       the measured step: what no simulation holds, loading data and gaps between instructions

A cause can be negative: variation of durations sometimes helps. Together they are the measured bubble. Of p stages with
v chunks, a pass that is slow by itself moves its micro-batch's factor by 1 / (p v) of that: with few stages and many
slow passes, jitter shows as load, too. Where all micro-batches have the same to do, there is no load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.plan.simulate import simulate
from harness.spans.span import RECEIVE_OF_SEND, Bubble, Span, activity, measured_bubble, transfers
from harness.spec.schedules import Schedule

Table = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class BubbleExplanation:
    """The bubble of one pipeline in one step."""

    ideal: Bubble
    """Of equal stages and free transfers."""
    simulated: Bubble
    """Of the measured mean durations of stages and transfers."""
    measured: Bubble
    causes_seconds: dict[str, float]
    """From ideal to host: mean idle seconds of a stage; the sum is the measured bubble."""
    total_seconds: float
    """T: from the first forward's start to the last backward's end, or forward's where there is none."""

    @property
    def causes_percent(self) -> dict[str, float]:
        """Share of T; the sum is 100 times the measured bubble fraction."""
        return {cause: 100 * seconds / self.total_seconds for cause, seconds in self.causes_seconds.items()}


def explain(stages: Sequence[Sequence[Span]], schedule: Schedule, has_load: bool = True) -> BubbleExplanation:
    """Explain the bubble of one pipeline in one step.

    Args:
        stages: the spans of one rank per stage, on one clock.
        schedule: what these ranks executed.
        has_load: whether micro-batches have more or less to do than others; else how they differ is jitter.

    Raises:
        ValueError: computations of the schedule have no span.
    """
    single = durations(stages, schedule)
    there = _passes(schedule)
    equal = {kind: _mean(single[kind], there[kind], (0, 1, 2)) for kind in there}
    of_chunks = {kind: _mean(single[kind], there[kind], (2,)) for kind in there}
    loaded = {kind: of_chunks[kind] * _loads(single[kind], there[kind]) for kind in there}
    links = {kind: table.mean(axis=2, keepdims=True) for kind, table in single.items() if kind not in there}

    def bubble_of(seconds: Mapping[str, Table]) -> Bubble:
        shape = next(iter(there.values())).shape
        whole = {kind: np.broadcast_to(table, shape).tolist() for kind, table in seconds.items()}
        return _bubble(simulate(schedule, whole), schedule)

    bubbles = {
        "ideal": bubble_of(equal),
        "imbalance": bubble_of(of_chunks),
        "transfer": bubble_of(of_chunks | links),
        **({"load": bubble_of(loaded | links)} if has_load else {}),
        "jitter": bubble_of(single),
        "host": _bubble(stages, schedule),
    }
    before = [0.0, *(bubble.seconds for bubble in bubbles.values())]
    causes = {cause: bubble.seconds - less for (cause, bubble), less in zip(bubbles.items(), before, strict=False)}
    total = bubbles["host"].seconds + sum(single[kind].sum() for kind in there) / len(stages)
    return BubbleExplanation(bubbles["ideal"], bubbles["transfer"], bubbles["host"], causes, float(total))


def durations(stages: Sequence[Sequence[Span]], schedule: Schedule) -> dict[str, Table]:
    """Measured seconds as `simulate` takes them: [stage, chunk, micro-batch] by kind.

    Computations with what is nested in them. How long a transfer took is known where its receiver was there first; for
    the others, which happened while the receiver computed, the mean of those that their sender's chunk sent stands, or
    else that of all of their kind; 0 where nobody waited for one.

    Raises:
        ValueError: computations of the schedule have no span.
    """
    shape = (len(schedule.stages), schedule.num_chunks, schedule.num_micro_batches)
    tables = {kind: np.zeros(shape) for kind in schedule.computes}
    for stage, spans in enumerate(stages):
        for span in spans:
            if span.kind in tables:
                tables[span.kind][stage, span.chunk, span.micro_batch] += span.seconds
        expected = sum(i.kind in tables for i in schedule.stages[stage])
        found = sum(span.kind in tables for span in spans)
        if found != expected:
            raise ValueError(f"stage {stage} has {found} forward and backward spans, {schedule.name} has {expected}")
    messages = {kind: np.full(shape, np.nan) for kind in RECEIVE_OF_SEND}
    for sender, _, send, receive in transfers(stages, schedule.stages):
        if receive.start_ns <= send.start_ns:
            seconds = (receive.end_ns - send.start_ns) / 1e9
            messages[send.kind][sender, send.chunk, send.micro_batch] = seconds
    return tables | {kind: _filled(table) for kind, table in messages.items()}


def _passes(schedule: Schedule) -> dict[str, Mask]:
    """Which passes there are, as `durations`: a schedule may split the backward passes of some micro-batches only."""
    shape = (len(schedule.stages), schedule.num_chunks, schedule.num_micro_batches)
    there = {kind: np.zeros(shape, dtype=np.bool_) for kind in schedule.computes}
    for stage, instructions in enumerate(schedule.stages):
        for kind, micro_batch, chunk, _ in instructions:
            if kind in there:
                there[kind][stage, chunk, micro_batch] = True
    return there


def _loads(table: Table, there: Mask) -> Table:
    """Factor of each micro-batch that all stages and chunks share, [1, 1, micro-batch]."""
    means = _mean(table, there, (2,))
    return _mean(np.divide(table, means, out=there.astype(float), where=means > 0), there, (0, 1))


def _mean(table: Table, there: Mask, axes: tuple[int, ...]) -> Table:
    """Over the passes that there are, axes kept; 0 where there is none."""
    total, number = (values.sum(axis=axes, keepdims=True) for values in (table, there))
    return np.asarray(total / np.maximum(number, 1))


def _filled(table: Table) -> Table:
    """[stage, chunk, micro-batch] with means where nothing is known."""
    known = ~np.isnan(table)
    overall = table[known].mean() if known.any() else 0.0
    number = known.sum(axis=2, keepdims=True)
    means = np.where(number > 0, np.nansum(table, axis=2, keepdims=True) / np.maximum(number, 1), overall)
    return np.where(known, table, means)


def _bubble(stages: Sequence[Sequence[Span]], schedule: Schedule) -> Bubble:
    learns = schedule.computes != {"forward"}
    return measured_bubble([[activity(spans, learns)] for spans in stages])
