"""Where the time of a step went: every nanosecond of a rank belongs to a part, and the parts meet the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.spans.span import BACKWARD_KINDS, NESTED_KINDS, RECEIVE_OF_SEND, Orders, Span, transfers

PART_OF_KIND = {
    "forward": "forward",
    **dict.fromkeys(BACKWARD_KINDS, "backward"),
    "recompute": "recomputation",
    "tp_all_reduce": "tp_communication",
    "tp_all_gather": "tp_communication",
    "tp_reduce_scatter": "tp_communication",
    **dict.fromkeys([*RECEIVE_OF_SEND, *RECEIVE_OF_SEND.values()], "pp_transfer"),
    "reduce_tied_gradients": "dp_reduction",
    "reduce_gradients": "dp_reduction",
    "reduce_loss": "dp_reduction",
    "optimizer": "optimizer",
    "load": "data",
}
PARTS = (*dict.fromkeys(PART_OF_KIND.values()), "pp_wait", "host_gap")
"""What the step of a rank consists of."""
PART_LABELS = {
    "forward": "forward", "backward": "backward", "recomputation": "recomputation",
    "tp_communication": "TP communication", "pp_transfer": "PP transfer", "dp_reduction": "reductions",
    "optimizer": "optimizer", "data": "data", "host_gap": "host gap", "pp_wait": "waiting",
}  # fmt: skip
"""What people read, in the order in which it is shown."""


@dataclass(frozen=True)
class Accounting:
    """Where the time of one rank's step went."""

    seconds: dict[str, float]
    """Of each of `PARTS`; each is a sum of spans or of gaps between two of them, none a remainder."""
    step_seconds: float
    """Duration of the step by another clock."""
    num_missing: int
    """Instructions of the schedule without a span."""

    @property
    def residual_seconds(self) -> float:
        """What the parts leave of the step, or exceed it by if negative."""
        return self.step_seconds - sum(self.seconds.values())

    def closes(self, tolerance: float = 0.01) -> bool:
        """Whether all instructions are there and the parts meet the step within a share of it."""
        return self.num_missing == 0 and abs(self.residual_seconds) <= tolerance * self.step_seconds


def account(
    stages: Sequence[Sequence[Span]],
    orders: Orders,
    step_seconds: Sequence[float],
    waiting_kinds: Collection[str] = ("reduce_tied_gradients",),
) -> list[Accounting]:
    """Sum up one step of one pipeline, stage by stage.

    A nested span (recomputation, a collective) counts for itself and not for the span around it. `pp_wait`,
    the stage's idle time, is the part of a receive before the sender's send began, the part of a send before
    the receive began if it outlasted that, and the part of `waiting_kinds` before the last stage began it.
    `host_gap` is the time between two instructions that follow each other in the schedule: where a span is
    missing there is no gap but a residual.

    Args:
        stages: spans of one rank per stage in order of execution, all of one step, on one clock.
        orders: what every stage does.
        step_seconds: of every stage, by another clock.
        waiting_kinds: instructions that no stage finishes before every stage that takes part has begun.

    Raises:
        ValueError: a span that is not in the schedule.
    """
    waits = _waits_ns(stages, orders, waiting_kinds)
    result = []
    for stage, (spans, order, whole) in enumerate(zip(stages, orders, step_seconds, strict=True)):
        instructions = [span for span in spans if span.kind not in NESTED_KINDS]
        nanoseconds = dict.fromkeys(PARTS, 0) | {"host_gap": _gaps_ns(instructions, order)}
        for span, own in _own_ns(spans):
            wait = waits.get((stage, span), 0)
            nanoseconds[PART_OF_KIND[span.kind]] += own - wait
            nanoseconds["pp_wait"] += wait
        seconds = {part: value / 1e9 for part, value in nanoseconds.items()}
        result.append(Accounting(seconds, whole, num_missing=len(order) - len(instructions)))
    return result


def _waits_ns(
    stages: Sequence[Sequence[Span]], orders: Orders, waiting_kinds: Collection[str]
) -> dict[tuple[int, Span], int]:
    """How long a stage's span waited for another stage.

    Who comes first to a transfer waits (`~`) until the other begins; what follows (`=`) is the transfer itself:

        sender     | forward  |= send =|          sender     |~ send ~~~|====|
        receiver   |~ receive |========|          receiver   | backward |====| receive

    A send that ended before its receive began was buffered, and neither waited:

        sender     |= send =| forward   |
        receiver   | backward |= receive =|

    Whoever is early at a common instruction (`waiting_kinds`) waits for the last stage to begin it:

        stage 0    |~ reduce_tied_gradients |====|
        stage 1    | backward               |====|
    """

    def wait(span: Span, other_start_ns: int) -> int:
        # A span that ended before the other began did not need it: a buffered send, a stage without tied weights.
        return max(0, other_start_ns - span.start_ns) if other_start_ns <= span.end_ns else 0

    waits = {}
    for sender, receiver, send, receive in transfers(stages, orders):
        waits[sender, send] = wait(send, receive.start_ns)
        waits[receiver, receive] = wait(receive, send.start_ns)
    common = [(stage, span) for stage, spans in enumerate(stages) for span in spans if span.kind in waiting_kinds]
    for stage, span in common:
        last = max(other.start_ns for _, other in common if other.kind == span.kind)
        waits[stage, span] = wait(span, last)
    return waits


def _own_ns(spans: Iterable[Span]) -> Iterator[tuple[Span, int]]:
    """Every span with its duration less that of the spans directly inside it."""
    around: list[tuple[Span, list[int]]] = []
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns, span.kind in NESTED_KINDS)):
        while around and (around[-1][0].end_ns <= span.start_ns or span.kind not in NESTED_KINDS):
            yield _less_inner(*around.pop())
        if around:
            around[-1][1].append(span.end_ns - span.start_ns)
        around.append((span, []))
    while around:
        yield _less_inner(*around.pop())


def _less_inner(span: Span, inner_ns: list[int]) -> tuple[Span, int]:
    return span, span.end_ns - span.start_ns - sum(inner_ns)


def _gaps_ns(spans: Sequence[Span], order: Sequence[tuple[str, int, int, int]]) -> int:
    """Time between spans that are neighbours in `order`."""
    positions: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for position in reversed(range(len(order))):
        positions[order[position][:3]].append(position)
    placed = []
    for span in spans:
        possible = positions[span.kind, span.micro_batch, span.chunk]
        if not possible:
            raise ValueError(f"{span.kind} of micro-batch {span.micro_batch} is not, or not so often, in the schedule")
        placed.append((possible.pop(), span))
    return sum(b.start_ns - a.end_ns for (first, a), (second, b) in pairwise(placed) if second == first + 1)
