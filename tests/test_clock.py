"""Clocks on one scale: by hand, and between processes of which one has a wrong clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from helpers import agree
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spans.clock import ClockOffset, RoundTrip, offset_of, to_reference
from harness.spans.files import SpanFile, aligned
from harness.spans.span import Span

NANOSECONDS = st.integers(0, 10**9)


def test_the_shortest_round_trip_counts() -> None:
    trips = [RoundTrip(0, 5_000, 900), RoundTrip(1_000, 6_050, 1_100), RoundTrip(2_000, 7_000, 2_400)]
    assert offset_of(trips) == ClockOffset(1_050, 5_000, 50)


def test_an_offset_within_its_uncertainty_is_none() -> None:
    assert offset_of([RoundTrip(1_000, 1_090, 1_100)]) == ClockOffset(1_050, 0, 50)


@given(there=NANOSECONDS, back=NANOSECONDS, offset=st.integers(-(10**15), 10**15))
@settings(deadline=None)
def test_the_truth_is_within_the_uncertainty(there: int, back: int, offset: int) -> None:
    found = offset_of([RoundTrip(0, there + offset, there + back)])
    assert abs(found.offset_ns - offset) <= 2 * found.uncertainty_ns  # twice: where the offset is taken for none
    if found.offset_ns:
        assert abs(found.offset_ns - offset) <= found.uncertainty_ns


def test_drift_is_linear_between_two_measurements() -> None:
    start, end = ClockOffset(1_000, 50, 3), ClockOffset(2_000, 70, 4)
    assert [to_reference(start, end)(moment) for moment in (1_000, 1_500, 2_000, 2_500)] == [1_050, 1_560, 2_070, 2_580]
    assert to_reference(start)(9_000) == 9_050


def test_spans_of_a_file_are_put_on_the_reference_clock() -> None:
    header = {"rank": 1, "clock_offset_start": [0, 100, 1], "clock_offset_end": [1_000, 110, 1]}
    file = aligned(SpanFile(header, [Span(1, "forward", 0, 500, 1_000)]))
    assert file.spans == [Span(1, "forward", 0, 605, 1_110)]
    killed = SpanFile({"clock_offset_start": [0, 100, 1]}, [Span(1, "forward", 0, 500, 1_000)])
    assert aligned(killed).spans == [Span(1, "forward", 0, 600, 1_100)]


def test_an_offset_and_a_drift_of_one_ranks_clock_are_found(tmp_path: Path) -> None:
    agree(lambda _: check_a_wrong_clock(tmp_path))


def check_a_wrong_clock(tmp_path: Path) -> None:
    offset_ns, drift = 7_000_000_000, 200e-6
    answer = run_ranks(3, "ranks_clock", {"offset_ns": offset_ns, "drift": drift}, tmp_path)
    (start, middle, end), uncertainty = answer["errors_ns"], answer["uncertainty_ns"]
    assert max(abs(start), abs(middle), abs(end)) <= uncertainty
    assert uncertainty < 20_000_000
    assert answer["drift"] == pytest.approx(drift, abs=2 * uncertainty / 1e9)
    assert answer["other_offset_ns"] == 0
