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

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness.clock import ClockOffset, to_reference
from harness.strict_json import dumps

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
    orders: Sequence[Sequence[tuple[str, int]]],
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
        orders: kind and micro-batch of every stage's instructions in the schedule's order.
        step_seconds: of every stage, by another clock.
        waiting_kinds: instructions that no stage finishes before every stage that takes part has begun.

    Raises:
        ValueError: a span that is not in the schedule.
    """
    waits = _waits_ns(stages, waiting_kinds)
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


def _waits_ns(stages: Sequence[Sequence[Span]], waiting_kinds: Collection[str]) -> dict[tuple[int, Span], int]:
    """How long a stage's span waited for another stage."""

    def wait(span: Span, other_start_ns: int) -> int:
        # A span that ended before the other began did not need it: a buffered send, a stage without tied weights.
        return max(0, other_start_ns - span.start_ns) if other_start_ns <= span.end_ns else 0

    waits = {}
    for sender, receiver, send, receive in transfers(stages):
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


def _gaps_ns(spans: Sequence[Span], order: Sequence[tuple[str, int]]) -> int:
    """Time between spans that are neighbours in `order`."""
    positions: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position in reversed(range(len(order))):
        positions[order[position]].append(position)
    placed = []
    for span in spans:
        if not positions[span.kind, span.micro_batch]:
            raise ValueError(f"{span.kind} of micro-batch {span.micro_batch} is not, or not so often, in the schedule")
        placed.append((positions[span.kind, span.micro_batch].pop(), span))
    return sum(b.start_ns - a.end_ns for (first, a), (second, b) in pairwise(placed) if second == first + 1)


class SpanFile(NamedTuple):
    """Content of one rank's span file."""

    header: dict[str, Any]
    """Of the first line, and of the last one, which only a run that came to its end wrote."""
    spans: list[Span]
    memory: Sequence[tuple[int, int]] = ()
    """Clock in nanoseconds, bytes in use; of the steps in `tracking.trace_steps`."""

    @property
    def complete(self) -> bool:
        """Whether it holds all that its rank measured; a killed run's file is cut off somewhere."""
        return bool(self.header.get("num_spans") == len(self.spans))

    def instructions(self, step: int) -> list[Span]:
        """What the rank did in a step."""
        return [span for span in self.spans if span.step == step and span.kind != STEP]

    def step_seconds(self) -> dict[int, float]:
        """Duration of every step by the clock around it."""
        return {span.step: span.seconds for span in self.spans if span.kind == STEP}


def span_lines(spans: Iterable[Span]) -> Iterator[str]:
    """JSON lines as the span files hold them."""
    for span in spans:
        yield dumps(span, separators=(",", ":")) + "\n"


def read_spans(path: Path) -> SpanFile:
    """Read a span file; a line cut off by a killed run ends it.

    Raises:
        ValueError: the file has no header.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            header = json.loads(next(file))
        except (StopIteration, ValueError):
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{path} is no span file: its first line is not a header")
        spans, memory = [], list[tuple[int, int]]()
        for line in file:
            try:
                content = json.loads(line)
                if isinstance(content, dict) and "num_spans" in content:
                    header |= content
                elif isinstance(content, dict):
                    memory += [(int(moment), int(size)) for moment, size in content["memory"]]
                else:
                    spans.append(Span(*content))
            except (ValueError, TypeError, KeyError):
                break
    return SpanFile(header, spans, memory)


def aligned(file: SpanFile) -> SpanFile:
    """The same spans on rank 0's clock, by the offsets that the file names."""
    start, end = (file.header.get(f"clock_offset_{when}") for when in ("start", "end"))
    if start is None:
        return file
    shift = to_reference(ClockOffset(*start), end and ClockOffset(*end))
    spans = [span._replace(start_ns=shift(span.start_ns), end_ns=shift(span.end_ns)) for span in file.spans]
    return SpanFile(file.header, spans, [(shift(moment), size) for moment, size in file.memory])


def as_dict(value: StageActivity | Bubble) -> dict[str, Any]:
    """Plain form for result files."""
    return asdict(value)


def chrome_trace(ranks: Sequence[SpanFile], steps: Collection[int] | None = None) -> dict[str, Any]:
    """Trace of several ranks that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    A process per rank with nested slices, an arrow from each send to its receive, and a memory counter.
    Follows the Trace Event Format; times are microseconds from the first span.

    Args:
        ranks: spans of every rank on one clock; headers name `rank`, `pp`, `dp` and `tp`.
        steps: which to show; all if None.

    Raises:
        ValueError: a step without spans.
    """
    there = sorted({span.step for file in ranks for span in file.spans})
    chosen = set(there) if steps is None else set(steps)
    if missing := sorted(chosen.difference(there)):
        held = f"steps {there[0]} to {there[-1]}" if there else "no step"
        raise ValueError(f"there are no spans of step {missing[0]}; the trace holds {held}")
    files = [file._replace(spans=[s for s in file.spans if s.step in chosen and s.kind != STEP]) for file in ranks]
    moments = [moment for file in files for span in file.spans for moment in (span.start_ns, span.end_ns)]
    origin, end = min(moments, default=0), max(moments, default=0)

    def event(phase: str, name: str, rank: int, moment_ns: int = origin, **fields: Any) -> dict[str, Any]:
        # Perfetto takes process 0 for the kernel's idle process and merges thread 0 into thread 1.
        return {"ph": phase, "name": name, "pid": rank + 1, "tid": rank + 1, "ts": (moment_ns - origin) / 1e3, **fields}

    events = []
    for header, spans, memory in files:
        place = ", ".join(f"{axis} {header[axis]}" for axis in ("pp", "dp", "tp"))
        events.append(event("M", "process_name", header["rank"], args={"name": f"rank {header['rank']} ({place})"}))
        events.append(event("M", "process_sort_index", header["rank"], args={"sort_index": header["rank"]}))
        for step, kind, micro_batch, start, stop in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
            arguments = {"step": step, "micro_batch": micro_batch}
            events.append(event("X", kind, header["rank"], start, dur=(stop - start) / 1e3, args=arguments))
        inside = [(moment, size) for moment, size in memory if origin <= moment <= end]
        events += [event("C", "memory", header["rank"], moment, args={"bytes": size}) for moment, size in inside]
    numbers = count()
    for pipeline in _pipelines(files):
        for transfer in transfers([file.spans for file in pipeline]):
            sender, receiver = (pipeline[stage].header["rank"] for stage in (transfer.sender, transfer.receiver))
            arrow = {"cat": "transfer", "id": next(numbers)}
            middle = transfer.receive.end_ns - round(transfer.seconds * 1e9) // 2  # surely inside the slice
            events.append(event("s", "transfer", sender, transfer.send.start_ns, **arrow))
            events.append(event("f", "transfer", receiver, middle, bp="e", **arrow))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _pipelines(files: Iterable[SpanFile]) -> list[list[SpanFile]]:
    """Ranks that pass micro-batches to each other, in the order of their stages."""
    pipelines: dict[tuple[int, int], dict[int, SpanFile]] = defaultdict(dict)
    for file in files:
        pipelines[file.header["dp"], file.header["tp"]][file.header["pp"]] = file
    absent = SpanFile({}, [])
    return [[stages.get(pp, absent) for pp in range(max(stages) + 1)] for stages in pipelines.values()]


TRACE_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "X": {"dur": (int, float)},
    "s": {"id": (int, str), "cat": str},
    "f": {"id": (int, str), "cat": str, "bp": str},
    "C": {"args": dict},
    "M": {"args": dict},
}
"""What an event of each phase has besides name, pid, tid and ts; of the phases that `chrome_trace` writes."""
TRACE_METADATA = {"process_name": "name", "process_sort_index": "sort_index",
                  "thread_name": "name", "thread_sort_index": "sort_index"}  # fmt: skip


def trace_problems(trace: Mapping[str, Any]) -> list[str]:
    """Rules of the Trace Event Format that a trace breaks, one sentence each; a good trace breaks none."""
    problems = []
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    arrows: dict[tuple[str, str, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        problem = _event_problem(event)
        if problem is not None:
            problems.append(f"{problem}: {event}")
        elif event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((_ns(event["ts"]), _ns(event["ts"] + event["dur"])))
        elif event["ph"] in ("s", "f"):
            arrows[event["cat"], event["name"], event["id"]].append(event)
    for arrow, ends in arrows.items():
        if [event["ph"] for event in sorted(ends, key=lambda event: float(event["ts"]))] != ["s", "f"]:
            problems.append(f"arrow {arrow} does not begin once and then end once")
        for event in ends:
            if not any(start <= _ns(event["ts"]) <= end for start, end in slices[event["pid"], event["tid"]]):
                problems.append(f"arrow {arrow} has an end outside any slice: {event}")
    for track, times in slices.items():
        around: list[int] = []
        for start, end in sorted(times, key=lambda time: (time[0], -time[1])):
            while around and around[-1] <= start:
                around.pop()
            if around and end > around[-1]:
                problems.append(f"slices of process and thread {track} cross at {start / 1e3} us")
            around.append(end)
    return problems


def _event_problem(event: Mapping[str, Any]) -> str | None:
    """The rule that one event breaks by itself."""
    phase = event.get("ph")
    if phase not in TRACE_FIELDS:
        return "unknown phase"
    wanted = {"name": str, "pid": int, "tid": int, "ts": (int, float), **TRACE_FIELDS[phase]}
    if wrong := [key for key, kind in wanted.items() if not isinstance(event.get(key), kind)]:
        return f"{', '.join(wrong)} missing or of a wrong type"
    if event["ts"] < 0 or event.get("dur", 0) < 0 or min(event["pid"], event["tid"]) < 1:
        return "a time below 0, or a process or thread below 1"
    if phase == "M" and TRACE_METADATA.get(event["name"]) not in event["args"]:
        return "unknown metadata"
    if phase == "C" and not all(isinstance(value, int | float) for value in event["args"].values()):
        return "a counter that is no number"
    if phase == "f" and event["bp"] != "e":
        return "an arrow that is not bound to the slice around its end"
    return None


def _ns(microseconds: float) -> int:
    """Whole nanoseconds, so that sums of fractions compare."""
    return round(microseconds * 1e3)
