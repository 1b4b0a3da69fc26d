"""The measurement beside known truth: emulated stages in DeepSpeed's real engine; and its bounds catch mistakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import fmean

import pytest
from benchmarks.known_truth import (
    BACKWARD_SECONDS,
    FORWARD_SECONDS,
    LOADING_SECONDS,
    SHORT,
    SLOW_LINK,
    SLOW_LINK_SECONDS,
    STAGES,
    Case,
    Measured,
    bounds,
    cases,
    found_seconds,
    injected_seconds,
    measure,
    set_seconds,
)
from helpers import agree

from harness.plan.simulate import simulate
from harness.spans.span import COMPUTE_KINDS, Span, activity, measured_bubble
from harness.spec.schedules import SCHEDULES, fill_and_drain

SLACK = 0.01
"""Of bubble fractions, beyond what the machine adds."""


@pytest.mark.slow
@pytest.mark.parametrize("p", STAGES)
def test_the_measured_bubble_is_the_set_one_and_what_the_machine_adds(
    p: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agree(lambda _: check_measured(measure(p, tmp_path_factory.mktemp("ranks"))))


def check_measured(measured: dict[Case, Measured]) -> None:
    for case, found in measured.items():
        least, most = bounds(case, found.excess_seconds)
        ideal, simulated, real = (found.bubble[key]["fraction"] for key in ("ideal", "simulated", "measured"))
        # Where there is no formula, or it is of split passes, it depends a little on how long the passes really took.
        alike = 1e-6 if SCHEDULES[case.schedule].ideal_overhead is fill_and_drain else 5e-3
        assert ideal == pytest.approx(bounds(case.undisturbed, 0)[0], abs=alike), case
        assert least - SLACK <= real <= most + SLACK, case
        assert least - SLACK <= simulated <= real + SLACK, case
        # What disturbs most of the steps is no longer of the machine alone, but the waits' own clock sees it as well.
        assert least - SLACK <= found.median_fraction <= found.waits_fraction + SLACK, case
        assert all(accounting["closes"] for accounting in found.accounting), case
        if case.slow_stage or case.slow_link:
            without = measured[case.undisturbed]
            excess = max(found.excess_seconds, without.excess_seconds)
            assert found_seconds(case, measured) == pytest.approx(injected_seconds(case), abs=excess), case
        if case.slow_link:
            slower = case.m * (found.link_seconds[SLOW_LINK] - without.link_seconds[SLOW_LINK])
            assert slower == pytest.approx(case.m * SLOW_LINK_SECONDS, abs=excess), case


Stages = list[list[Span]]
Method = Callable[[Stages], float]


def right(stages: Stages) -> float:
    """Of two equal tensor-parallel ranks for each stage."""
    return measured_bubble([[activity(spans), activity(spans)] for spans in stages]).fraction


def bubble_fraction(
    stages: Stages,
    *,
    begin: tuple[str, ...] = ("forward",),
    busy: tuple[str, ...] = COMPUTE_KINDS,
    counted: slice = slice(None),
    last_micro_batch: int | None = None,
    times: int = 1,
) -> float:
    """The definition again, with places to be wrong in."""
    start = min(span.start_ns for spans in stages for span in spans if not begin or span.kind in begin)
    end = max(span.end_ns for spans in stages for span in spans if span.kind in COMPUTE_KINDS)
    of_stages = [
        sum(s.end_ns - s.start_ns for s in spans if s.kind in busy and s.micro_batch != last_micro_batch)
        for spans in stages[counted]
    ]
    return 1 - times * fmean(of_stages) / (end - start)


def last_micro_batch(stages: Stages) -> int:
    return max(span.micro_batch for spans in stages for span in spans)


WRONG: dict[str, Method] = {
    "T of one stage": lambda stages: fmean(bubble_fraction([spans]) for spans in stages),
    "T of the last stage": lambda stages: 1 - (1 - bubble_fraction(stages)) / (1 - bubble_fraction(stages[-1:])),
    "T from the first span": lambda stages: bubble_fraction(stages, begin=()),
    "busy while receiving": lambda stages: bubble_fraction(
        stages, busy=(*COMPUTE_KINDS, "recv_activation", "recv_gradient")
    ),
    "over busy time, (p-1)/m": lambda stages: 1 / (1 - bubble_fraction(stages)) - 1,
    "without the first stage": lambda stages: bubble_fraction(stages, counted=slice(1, None)),
    "without the last stage": lambda stages: bubble_fraction(stages, counted=slice(-1)),
    "the last stage idle": lambda stages: (
        1 - (1 - bubble_fraction(stages, counted=slice(-1))) * (len(stages) - 1) / len(stages)
    ),
    "sum of the tensor-parallel ranks": lambda stages: bubble_fraction(stages, times=2),
    "without the last micro-batch": lambda stages: bubble_fraction(stages, last_micro_batch=last_micro_batch(stages)),
    "without backward": lambda stages: bubble_fraction(stages, busy=("forward",)),
}


@cache
def emulated(case: Case, machine: float, scale: float) -> Stages:
    """A step as a machine would do it, whose own work takes 1 ms in computations and half of that in others."""
    own = 0.001 * machine
    sends = [0.5 * own + SLOW_LINK_SECONDS * scale * (case.slow_link and stage == SLOW_LINK) for stage in range(case.p)]
    load = [[LOADING_SECONDS if stage == k == 0 else 0.5 * own for k in range(case.m)] for stage in range(case.p)]
    halves = {"forward": FORWARD_SECONDS, "backward": BACKWARD_SECONDS}
    seconds = {
        **{
            kind: [halves.get(kind, BACKWARD_SECONDS / 2) * scale * factor + own for factor in case.factors]
            for kind in case.built.computes
        },
        "send_activation": sends,
        "send_gradient": 0.5 * own,
        "load": load,
    }
    return simulate(case.built, seconds)


@cache
def bounds_on(case: Case, machine: float) -> tuple[float, float]:
    """`bounds` by a step of short waits."""
    short = [activity(spans) for spans in emulated(case, machine, SHORT)]
    start, end = min(a.first_forward_start_ns for a in short), max(a.last_backward_end_ns for a in short)
    return bounds(case, (end - start) / 1e9 - SHORT * set_seconds(case)[0])


def misses(method: Method, machine: float) -> list[Case]:
    """The cases in which what a method finds is out of bounds."""
    missed = []
    for case in [case for p in STAGES for case in cases(p)]:
        least, most = bounds_on(case, machine)
        if not least - SLACK <= method(emulated(case, machine, 1.0)) <= most + SLACK:
            missed.append(case)
    return missed


@pytest.mark.parametrize("machine", [0, 1, 5], ids=["no own time", "as tried", "five times slower"])
def test_wrong_methods_miss_the_bounds(machine: float) -> None:
    assert not misses(right, machine)
    assert not misses(bubble_fraction, machine)
    assert [name for name, method in WRONG.items() if not misses(method, machine)] == []


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 16), (8, 32)])
def test_the_set_times_of_equal_stages_have_the_ideal_bubble(p: int, m: int) -> None:
    assert bounds(Case(p, m), 0)[0] == pytest.approx((p - 1) / (m + p - 1))
    without_own_time = bounds(Case(p, m), 0)[1]
    assert without_own_time == pytest.approx((p - 1) / (m + p - 1))
    twice = bounds(Case(p, m), (m + p - 1) * (FORWARD_SECONDS + BACKWARD_SECONDS))[1]
    assert 1 - twice == pytest.approx(0.5 * m / (m + p - 1))
