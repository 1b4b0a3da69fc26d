"""Spans of time on a rank, the pipeline bubble they add up to, and the transfers they are ends of.

The tracer measures spans and the simulator predicts them: both produce `Span`, and everything derived
from spans lives in this package, so that "predicted minus measured" is a subtraction.

Bubble of a pipeline step (p stages, m micro-batches): T is the time from the first forward's start to
the last backward's end over all stages, busy_s the seconds stage s spends in forward and backward.
`bubble_fraction` = 1 - mean_s(busy_s) / T and `bubble_overhead` = (T - mean_s(busy_s)) / mean_s(busy_s)
(arXiv 2104.04473, section 2.2). Of a step with several pipelines it is their mean, of a run the median over its timed
steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from statistics import median
from typing import Any, NamedTuple

BACKWARD_KINDS = ("backward", "backward_input", "backward_weight")
"""Whole, or split into the gradients of activations and of weights (arXiv 2401.10241)."""
COMPUTE_KINDS = ("forward", *BACKWARD_KINDS)
RECEIVE_OF_SEND = {
    "send_activation": "recv_activation",
    "send_gradient": "recv_gradient",
    "send_tokens": "recv_tokens",
}
SEND_OF_RECEIVE = {receive: send for send, receive in RECEIVE_OF_SEND.items()}
KINDS = (
    *COMPUTE_KINDS,
    "load",
    "send_activation",
    "recv_activation",
    "send_gradient",
    "recv_gradient",
    "send_tokens",
    "recv_tokens",
    "reduce_tied_gradients",
    "reduce_gradients",
    "optimizer",
    "reduce_loss",
)
NESTED_KINDS = ("recompute", "tp_all_reduce", "tp_all_gather", "tp_reduce_scatter")
"""Inside an instruction: computing activations again in backward, and collectives of tensor parallelism."""
STEP = "step"
"""Around all instructions of a step, by a clock of its own: what the others must add up to."""
PHASES = ("prefill", "decode")
"""The same around a part of a step of inference, after which all ranks meet."""


class Span(NamedTuple):
    """One instruction of one rank, or a nested part of it."""

    step: int
    kind: str
    micro_batch: int
    """-1 where an instruction belongs to no micro-batch."""
    start_ns: int
    end_ns: int
    chunk: int = 0
    """Which of the stage's model chunks it works on."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return (self.end_ns - self.start_ns) / 1e9


Orders = Sequence[Sequence[tuple[str, int, int, int]]]
"""What every stage does, in order: kind, micro-batch, chunk and the stage at the other end of a transfer (or -1)."""


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


def activity(spans: Iterable[Span], learns: bool = True) -> StageActivity:
    """Sum up the compute spans of one rank in one step.

    Args:
        learns: whether backward passes end it; without, the last forward pass does.

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
        last_backward_end_ns=max(span.end_ns for span in (backwards if learns else forwards)),
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


def bubble_of_step(replicas: Sequence[Sequence[Sequence[StageActivity]]]) -> Bubble:
    """Bubble of a step: that of each replica's pipeline, then the mean.

    Args:
        replicas: activities by [replica][stage][tensor-parallel rank].
    """
    bubbles = [measured_bubble(stages) for stages in replicas]
    return Bubble(
        fraction=sum(b.fraction for b in bubbles) / len(bubbles),
        overhead=sum(b.overhead for b in bubbles) / len(bubbles),
        seconds=sum(b.seconds for b in bubbles) / len(bubbles),
    )


def median_bubble(steps: Sequence[Bubble]) -> Bubble:
    """The bubble of a run from those of its timed steps."""
    return Bubble(
        fraction=median(bubble.fraction for bubble in steps),
        overhead=median(bubble.overhead for bubble in steps),
        seconds=median(bubble.seconds for bubble in steps),
    )


def replica_wait_seconds(replicas: Sequence[Sequence[Sequence[StageActivity]]]) -> float | None:
    """What a replica waits for the latest one, from the end of its last backward to that of the latest: their mean.

    None for a single one.

    Args:
        replicas: as in `bubble_of_step`, on one clock.
    """
    if len(replicas) == 1:
        return None
    ends = [max(rank.last_backward_end_ns for stage in stages for rank in stage) for stages in replicas]
    return sum(max(ends) - end for end in ends) / len(ends) / 1e9


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


def transfers(stages: Sequence[Sequence[Span]], orders: Orders) -> Iterator[Transfer]:
    """Pair the sends of one pipeline with their receives; an end whose other end is missing is left out.

    Messages of one kind and micro-batch between the same two stages arrive in the order they left.

    Args:
        stages: the spans of one rank per stage.
        orders: what the stages do, which says who talks to whom.
    """
    pairs = list(zip(stages, orders, strict=True))
    receives = [_by_message(spans, order, RECEIVE_OF_SEND.values()) for spans, order in pairs]
    for sender, (spans, order) in enumerate(pairs):
        for (step, kind, micro_batch, receiver, number), send in _by_message(spans, order, RECEIVE_OF_SEND).items():
            receive = receives[receiver].get((step, RECEIVE_OF_SEND[kind], micro_batch, sender, number))
            if receive is not None:
                yield Transfer(sender, receiver, send, receive)


def _by_message(
    spans: Iterable[Span], order: Sequence[tuple[str, int, int, int]], kinds: Collection[str]
) -> dict[tuple[int, str, int, int, int], Span]:
    """Spans of some kinds by (step, kind, micro-batch, the other stage, how many of these went before)."""
    peers = {(kind, micro_batch, chunk): peer for kind, micro_batch, chunk, peer in order}
    numbers: dict[tuple[int, str, int, int], Iterator[int]] = defaultdict(count)
    found = {}
    for span in spans:
        if span.kind in kinds and (peer := peers.get((span.kind, span.micro_batch, span.chunk))) is not None:
            message = (span.step, span.kind, span.micro_batch, peer)
            found[*message, next(numbers[message])] = span
    return found


def as_dict(value: StageActivity | Bubble) -> dict[str, Any]:
    """Plain form for result files."""
    return asdict(value)
