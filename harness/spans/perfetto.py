"""Traces to look at: span files as Perfetto (ui.perfetto.dev) reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from harness.spans.files import SpanFile
from harness.spans.span import PHASES, STEP, Orders, transfers


def chrome_trace(
    ranks: Sequence[SpanFile],
    pipelines: Iterable[Sequence[int]],
    orders: Orders,
    steps: Collection[int] | None = None,
) -> dict[str, Any]:
    """Trace of several ranks that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    A process per rank with nested slices, an arrow from each send to its receive, and a memory counter.
    Follows the Trace Event Format; times are microseconds from the first span.

    Args:
        ranks: spans of every rank on one clock, whose headers name `rank`, `pp`, `dp` and `tp`; some may be missing.
        pipelines: ranks that pass micro-batches to each other, in the order of their stages.
        orders: what every stage does.
        steps: which to show; all if None.

    Raises:
        ValueError: a step without spans.
    """
    there = sorted({span.step for file in ranks for span in file.spans})
    chosen = set(there) if steps is None else set(steps)
    if missing := sorted(chosen.difference(there)):
        held = f"steps {there[0]} to {there[-1]}" if there else "no step"
        raise ValueError(f"there are no spans of step {missing[0]}; the trace holds {held}")
    around = (STEP, *PHASES)
    files = [
        file._replace(spans=[s for s in file.spans if s.step in chosen and s.kind not in around]) for file in ranks
    ]
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
        for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
            arguments = {"step": span.step, "micro_batch": span.micro_batch, "chunk": span.chunk}
            microseconds = (span.end_ns - span.start_ns) / 1e3
            events.append(event("X", span.kind, header["rank"], span.start_ns, dur=microseconds, args=arguments))
        inside = [(moment, size) for moment, size in memory if origin <= moment <= end]
        events += [event("C", "memory", header["rank"], moment, args={"bytes": size}) for moment, size in inside]
    numbers, spans_of = count(), {header["rank"]: spans for header, spans, _ in files}
    for pipeline in pipelines:
        for transfer in transfers([spans_of.get(rank, []) for rank in pipeline], orders):
            sender, receiver = pipeline[transfer.sender], pipeline[transfer.receiver]
            arrow = {"cat": "transfer", "id": next(numbers)}
            middle = transfer.receive.end_ns - round(transfer.seconds * 1e9) // 2  # surely inside the slice
            events.append(event("s", "transfer", sender, transfer.send.start_ns, **arrow))
            events.append(event("f", "transfer", receiver, middle, bp="e", **arrow))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


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
