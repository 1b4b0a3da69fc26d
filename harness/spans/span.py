"""Spans of time on a rank: the pipeline bubble they add up to, where a step's time goes, and traces to look at.

The tracer measures spans and the simulator predicts them: both produce `Span`, and everything derived
from spans lives here, so that "predicted minus measured" is a subtraction.

Bubble of a pipeline step (p stages, m micro-batches): T is the time from the first forward's start to
the last backward's end over all stages, busy_s the seconds stage s spends in forward and backward.
`bubble_fraction` = 1 - mean_s(busy_s) / T and `bubble_overhead` = (T - mean_s(busy_s)) / mean_s(busy_s).
With equal stages and free transfers 1F1B and GPipe reach (p-1)/(m+p-1) and (p-1)/m
(arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, NamedTuple

BACKWARD_KINDS = ("backward", "backward_input", "backward_weight")
"""Whole, or split into the gradients of activations and of weights (arXiv 2401.10241)."""
COMPUTE_KINDS = ("forward", *BACKWARD_KINDS)
RECEIVE_OF_SEND = {"send_activation": "recv_activation", "send_gradient": "recv_gradient"}
KINDS = (
    *COMPUTE_KINDS,
    "load",
    "send_activation",
    "recv_activation",
    "send_gradient",
    "recv_gradient",
    "reduce_tied_gradients",
    "reduce_gradients",
    "optimizer",
    "reduce_loss",
)
NESTED_KINDS = ("recompute", "tp_all_reduce", "tp_all_gather", "tp_reduce_scatter")
"""Inside an instruction: computing activations again in backward, and collectives of tensor parallelism."""
STEP = "step"
"""Around all instructions of a step, by a clock of its own: what the others must add up to."""


class Span(NamedTuple):
    """One instruction of one rank, or a nested part of it."""

    step: int
    kind: str
    micro_batch: int
    """-1 where an instruction belongs to no micro-batch."""
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class StageActivity:
    """What the bubble needs to know of one rank in one step."""

    first_forward_start_ns: int
    last_backward_end_ns: int
    forward_seconds: float
    backward_seconds: float

    @property
    def busy_seconds(self) -> float:
        """Seconds in forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Bubble:
    """The bubble of one pipeline in one step."""

    fraction: float
    """Idle share of T, the mean over stages."""
    overhead: float
    """Idle time over busy time."""
    seconds: float
    """Mean idle seconds of a stage."""


def activity(spans: Iterable[Span]) -> StageActivity:
    """Sum up the compute spans of one rank in one step.

    Raises:
        ValueError: no forward or no backward among them, as in the last step of a killed run.
    """
    forwards, backwards = [], []
    for span in spans:
        if span.kind == "forward":
            forwards.append(span)
        elif span.kind in BACKWARD_KINDS:
            backwards.append(span)
    return StageActivity(
        first_forward_start_ns=min(span.start_ns for span in forwards),
        last_backward_end_ns=max(span.end_ns for span in backwards),
        forward_seconds=sum(span.seconds for span in forwards),
        backward_seconds=sum(span.seconds for span in backwards),
    )


def measured_bubble(stages: Sequence[Sequence[StageActivity]]) -> Bubble:
    """Bubble of one pipeline from the activity of its ranks.

    Args:
        stages: per stage, the activities of its tensor-parallel ranks; a stage's busy time is their mean.
    """
    ranks = [rank for stage in stages for rank in stage]
    start = min(rank.first_forward_start_ns for rank in ranks)
    end = max(rank.last_backward_end_ns for rank in ranks)
    total = (end - start) / 1e9
    busy = sum(sum(r.busy_seconds for r in stage) / len(stage) for stage in stages) / len(stages)
    return Bubble(fraction=1 - busy / total, overhead=total / busy - 1, seconds=total - busy)


def ideal_bubble_fraction(num_stages: int, num_micro_batches: int) -> float:
    """(p-1)/(m+p-1): 1F1B with equal stages and free transfers."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)


def ideal_bubble_overhead(num_stages: int, num_micro_batches: int) -> float:
    """(p-1)/m: the same bubble over busy time."""
    return (num_stages - 1) / num_micro_batches


class Transfer(NamedTuple):
    """One message between two stages: the span of either end."""

    sender: int
    receiver: int
    send: Span
    receive: Span

    @property
    def seconds(self) -> float:
        """From when both ends were there until it had arrived."""
        start = max(self.receive.start_ns, min(self.send.start_ns, self.receive.end_ns))
        return (self.receive.end_ns - start) / 1e9


def transfers(stages: Sequence[Sequence[Span]]) -> Iterator[Transfer]:
    """Pair the sends of one pipeline with their receives; an end whose other end is missing is left out.

    Activations go to the next stage and gradients to the previous one, around the end where stages hold
    several chunks. Messages of one micro-batch between the same two stages arrive in the order they left.

    Args:
        stages: the spans of one rank per stage.
    """
    receives = [_numbered(spans, RECEIVE_OF_SEND.values()) for spans in stages]
    for sender, spans in enumerate(stages):
        for (step, kind, micro_batch, number), send in _numbered(spans, RECEIVE_OF_SEND).items():
            receiver = (sender + (1 if kind == "send_activation" else -1)) % len(stages)
            receive = receives[receiver].get((step, RECEIVE_OF_SEND[kind], micro_batch, number))
            if receive is not None:
                yield Transfer(sender, receiver, send, receive)


def _numbered(spans: Iterable[Span], kinds: Collection[str]) -> dict[tuple[int, str, int, int], Span]:
    """Spans of some kinds by (step, kind, micro-batch, how many of these went before)."""
    numbers: dict[tuple[int, str, int], Iterator[int]] = defaultdict(count)
    return {(*span[:3], next(numbers[span[:3]])): span for span in spans if span.kind in kinds}


def as_dict(value: StageActivity | Bubble) -> dict[str, Any]:
    """Plain form for result files."""
    return asdict(value)
