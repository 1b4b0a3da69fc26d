"""Traces for Perfetto and chrome://tracing: what they show, and the rules of the format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from harness.plan.simulate import simulate
from harness.spans.files import SpanFile
from harness.spans.perfetto import chrome_trace, trace_problems
from harness.spans.span import Span
from harness.spec.schedules import build_schedule
from harness.spec.topology import Topology

Trace = dict[str, Any]


def trace_of(ranks: list[SpanFile], p: int = 2, tp: int = 2, m: int = 3, steps: list[int] | None = None) -> Trace:
    """The trace of p x tp ranks under 1F1B."""
    pipelines = Topology(pp=p, dp=1, tp=tp).pipelines()
    return chrome_trace(ranks, pipelines, build_schedule("1f1b", p, m).stages, steps)


def build_ranks(p: int = 2, tp: int = 2, m: int = 3, steps: int = 2) -> list[SpanFile]:
    """Files of p x tp ranks, with a collective in every forward."""
    schedule = build_schedule("1f1b", p, m)
    seconds = {"forward": 0.002, "backward": 0.004, "send_activation": 0.0005, "send_gradient": 0.0001}
    stages = [simulate(schedule, seconds, step=step) for step in range(steps)]
    files = []
    for rank in range(p * tp):
        spans: list[Span] = []
        for step in range(steps):
            later = step * 10**8 + 12345
            for _, kind, k, start, end, _ in stages[step][rank // tp]:
                spans.append(Span(step, kind, k, start + later, end + later))
                if kind == "forward":
                    spans.append(Span(step, "tp_all_reduce", k, start + later + 1_000_001, start + later + 1_500_000))
        files.append(SpanFile({"rank": rank, "pp": rank // tp, "dp": 0, "tp": rank % tp}, spans))
    return files


def of_phase(trace: Trace, phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_a_trace_shows_every_rank_and_every_transfer() -> None:
    ranks = build_ranks()
    ranks[0] = ranks[0]._replace(memory=[(12345, 1000), (5_012_345, 3000), (10**10, 1)])
    trace = json.loads(json.dumps(trace_of(ranks)))
    assert trace_problems(trace) == []
    slices = of_phase(trace, "X")
    assert len(slices) == sum(len(file.spans) for file in ranks)
    names = {event["pid"]: event["args"]["name"] for event in of_phase(trace, "M") if event["name"] == "process_name"}
    assert names[1] == "rank 0 (pp 0, dp 0, tp 0)"
    assert names[4] == "rank 3 (pp 1, dp 0, tp 1)"
    first = min(slices, key=lambda event: float(event["ts"]))
    assert (first["ts"], first["dur"], first["args"]) == (0, first["dur"], {"step": 0, "micro_batch": 0, "chunk": 0})
    # Activations and gradients of 3 micro-batches, 2 steps, 2 tensor-parallel neighbours.
    begins, ends = of_phase(trace, "s"), of_phase(trace, "f")
    assert len(begins) == len(ends) == 2 * 3 * 2 * 2
    crossed = {(b["pid"], e["pid"]) for b, e in zip(begins, ends, strict=True)}
    assert crossed == {(1, 3), (2, 4), (3, 1), (4, 2)}
    counters = of_phase(trace, "C")
    assert [(c["pid"], c["ts"], c["args"]) for c in counters] == [(1, 0, {"bytes": 1000}), (1, 5000, {"bytes": 3000})]


def test_chosen_steps() -> None:
    ranks = build_ranks()
    trace = trace_of(ranks, steps=[1])
    assert trace_problems(trace) == []
    assert {event["args"]["step"] for event in of_phase(trace, "X")} == {1}
    assert min(event["ts"] for event in of_phase(trace, "X")) == 0
    with pytest.raises(ValueError, match="no spans of step 7; the trace holds steps 0 to 1"):
        trace_of(ranks, steps=[1, 7])
    with pytest.raises(ValueError, match="no spans of step 1; the trace holds no step"):
        trace_of([], steps=[1])
    assert trace_of([])["traceEvents"] == []


def test_ranks_may_be_missing() -> None:
    """A stage that is not there draws no arrows, and none to the wrong stage."""
    ranks = build_ranks(p=4, tp=1)
    trace = trace_of([ranks[0], ranks[1], ranks[3]], p=4, tp=1)
    assert trace_problems(trace) == []
    assert {event["pid"] for event in of_phase(trace, "s")} == {1, 2}


def test_overlapping_transfers_and_one_rank() -> None:
    schedule = build_schedule("interleaved", 2, 4, 2)
    stages = simulate(schedule, {"forward": 2, "backward": 2})
    files = [SpanFile({"rank": s, "pp": s, "dp": 0, "tp": 0}, spans) for s, spans in enumerate(stages)]
    trace = chrome_trace(files, [[0, 1]], schedule.stages)
    assert trace_problems(trace) == []
    assert len(of_phase(trace, "s")) == sum(i.kind.startswith("send") for stage in schedule.stages for i in stage)
    single = trace_of(build_ranks(p=1, tp=1), p=1, tp=1)
    assert trace_problems(single) == []
    assert of_phase(single, "s") == []


def damage(phase: str, **fields: Any) -> Callable[[Trace], None]:
    """Set fields of the last event of a phase; None removes one."""

    def change(trace: Trace) -> None:
        event = of_phase(trace, phase)[-1]
        event.update(fields)
        for key in [key for key, value in event.items() if value is None]:
            del event[key]

    return change


def drop(phase: str) -> Callable[[Trace], None]:
    return lambda trace: trace["traceEvents"].remove(of_phase(trace, phase)[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (damage("X", ph="Z"), "unknown phase"),
        (damage("X", dur=None), "dur missing or of a wrong type"),
        (damage("X", dur=-1.0), "a time below 0"),
        (damage("X", ts="0"), "ts missing or of a wrong type"),
        (damage("X", pid=0), "process or thread below 1"),
        (damage("X", tid=None), "tid missing"),
        (damage("X", ts=0.0, dur=10_000.0), "cross at"),
        (damage("M", name="process_title"), "unknown metadata"),
        (damage("C", args={"bytes": "many"}), "a counter that is no number"),
        (damage("f", bp=None), "bp missing"),
        (damage("f", bp="s"), "not bound to the slice around its end"),
        (damage("f", id=10**6), "does not begin once and then end once"),
        (damage("f", ts=0.0), "does not begin once and then end once"),
        (damage("s", pid=99), "an end outside any slice"),
        (drop("s"), "does not begin once and then end once"),
        (drop("f"), "does not begin once and then end once"),
    ],
)
def test_broken_rules_are_named(change: Callable[[Trace], None], problem: str) -> None:
    trace = copy.deepcopy(trace_of([file._replace(memory=[(12345, 1)]) for file in build_ranks(steps=1)]))
    assert trace_problems(trace) == []
    change(trace)
    assert any(problem in found for found in trace_problems(trace)), trace_problems(trace)
