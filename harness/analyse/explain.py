"""Why a measured step has the bubble it has: ideal, simulated and measured beside each other, and the causes.

Each cause is the difference between two simulations of the same schedule, from what the schedule dictates to
what was measured:

    ideal      equal stages (the mean forward and backward of all), free transfers: fill and drain
    imbalance  + every stage's own mean forward and backward
    transfer   + every link's mean transfer time
    jitter     + the durations of the single micro-batches
    host       the measured step: what no simulation holds, loading data and gaps between instructions

A cause can be negative: variation of durations sometimes helps. Together they are the measured bubble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.plan.simulate import simulate
from harness.spans.span import COMPUTE_KINDS, RECEIVE_OF_SEND, Bubble, Span, activity, measured_bubble, transfers
from harness.spec.schedules import Schedule

Table = NDArray[np.float64]


@dataclass(frozen=True)
class BubbleExplanation:
    """The bubble of one pipeline in one step."""

    ideal: Bubble
    """Of equal stages and free transfers."""
    simulated: Bubble
    """Of the measured mean durations of stages and transfers."""
    measured: Bubble
    causes_seconds: dict[str, float]
    """ideal, imbalance, transfer, jitter and host: mean idle seconds of a stage; the sum is the measured bubble."""
    total_seconds: float
    """T: from the first forward's start to the last backward's end."""

    @property
    def causes_percent(self) -> dict[str, float]:
        """Share of T; the sum is 100 times the measured bubble fraction."""
        return {cause: 100 * seconds / self.total_seconds for cause, seconds in self.causes_seconds.items()}


def explain(stages: Sequence[Sequence[Span]], schedule: Schedule) -> BubbleExplanation:
    """Explain the bubble of one pipeline in one step, whose transfers occupied their senders as DeepSpeed's do.

    Args:
        stages: the spans of one rank per stage, on one clock.
        schedule: what these ranks executed.

    Raises:
        ValueError: computations of the schedule have no span.
    """
    single = durations(stages, schedule)
    computing = {kind: table for kind, table in single.items() if kind in COMPUTE_KINDS}
    per_stage = {kind: table.mean(axis=1) for kind, table in single.items()}
    equal = {kind: table.mean() for kind, table in computing.items()}

    def bubble_of(seconds: Mapping[str, Table | float]) -> Bubble:
        given = {kind: np.asarray(table).tolist() for kind, table in seconds.items()}
        return _bubble(simulate(schedule, given))

    bubbles = {
        "ideal": bubble_of(equal),
        "imbalance": bubble_of({kind: per_stage[kind] for kind in computing}),
        "transfer": bubble_of(per_stage),
        "jitter": bubble_of(single),
        "host": _bubble(stages),
    }
    before = [0.0, *(bubble.seconds for bubble in bubbles.values())]
    causes = {cause: bubble.seconds - less for (cause, bubble), less in zip(bubbles.items(), before, strict=False)}
    total = bubbles["host"].seconds + sum(table.sum() for table in computing.values()) / len(stages)
    return BubbleExplanation(bubbles["ideal"], bubbles["transfer"], bubbles["host"], causes, float(total))


def durations(stages: Sequence[Sequence[Span]], schedule: Schedule) -> dict[str, Table]:
    """Measured seconds as `simulate` takes them: [stage, micro-batch] by kind.

    Computations with what is nested in them, over all chunks of a stage, and transfers from when both ends
    were there, the mean where chunks send several; a stage that sends nothing of a kind has zeros.

    Raises:
        ValueError: computations of the schedule have no span.
    """
    shape = (len(schedule.stages), schedule.num_micro_batches)
    computed = {i.kind for stage in schedule.stages for i in stage if i.kind in COMPUTE_KINDS}
    tables = {kind: np.zeros(shape) for kind in [*computed, *RECEIVE_OF_SEND]}
    for stage, spans in enumerate(stages):
        for span in spans:
            if span.kind in computed:
                tables[span.kind][stage, span.micro_batch] += span.seconds
        expected = sum(i.kind in computed for i in schedule.stages[stage])
        found = sum(span.kind in computed for span in spans)
        if found != expected:
            raise ValueError(f"stage {stage} has {found} forward and backward spans, {schedule.name} has {expected}")
    messages = {kind: np.zeros(shape) for kind in RECEIVE_OF_SEND}
    for transfer in transfers(stages, schedule.stages):
        place = transfer.sender, transfer.send.micro_batch
        tables[transfer.send.kind][place] += transfer.seconds
        messages[transfer.send.kind][place] += 1
    return tables | {kind: tables[kind] / np.maximum(messages[kind], 1) for kind in RECEIVE_OF_SEND}


def _bubble(stages: Sequence[Sequence[Span]]) -> Bubble:
    return measured_bubble([[activity(spans)] for spans in stages])
