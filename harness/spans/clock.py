"""Clocks of several hosts put on one scale: offsets from round trips, and the drift between two of them.

As in NTP (RFC 5905, section 8): a question leaves at t0, is answered at T by the other clock, and the answer
arrives at t1. The other clock is ahead by T - (t0 + t1) / 2, and no way of sharing the round trip between its two
legs makes that wrong by more than half of it. The shortest of several trips says most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class ClockOffset(NamedTuple):
    """How far the reference clock is ahead of a rank's own at one moment, in nanoseconds."""

    at_ns: int
    """The moment, on the own clock."""
    offset_ns: int
    uncertainty_ns: int
    """The true offset differs from `offset_ns` by at most this."""


class RoundTrip(NamedTuple):
    """A question and its answer, in nanoseconds: the first and the last by the own clock."""

    sent_ns: int
    answered_ns: int
    received_ns: int


def offset_of(trips: Iterable[RoundTrip]) -> ClockOffset:
    """The offset that the shortest of some round trips shows.

    One that is not larger than its uncertainty counts as none: clocks of one host are the same clock.
    """
    sent, answered, received = min(trips, key=lambda trip: trip.received_ns - trip.sent_ns)
    middle = (sent + received) // 2
    offset, uncertainty = answered - middle, (received - sent + 1) // 2
    return ClockOffset(middle, offset if abs(offset) > uncertainty else 0, uncertainty)


def to_reference(start: ClockOffset, end: ClockOffset | None = None) -> Callable[[int], int]:
    """A function from nanoseconds of the own clock to those of the reference.

    Args:
        end: a later measurement, for the linear drift between the two; None takes the offset as constant.
    """
    if end is None or end.at_ns <= start.at_ns:
        return lambda moment_ns: moment_ns + start.offset_ns
    drift = (end.offset_ns - start.offset_ns) / (end.at_ns - start.at_ns)
    return lambda moment_ns: moment_ns + start.offset_ns + round((moment_ns - start.at_ns) * drift)
