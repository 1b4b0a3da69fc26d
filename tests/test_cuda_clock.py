"""The clock of CUDA events and what is derived from it, fed with times of a device that lags behind its host."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import harness.run.instruments.tracer as tracer
from harness.run.instruments.tracer import CudaClock, HostClock, Tracer
from harness.spec.schedules import Instruction

# What one forward and one backward do, in milliseconds: (launch by the host, end on the device) of each event.
Moments = list[tuple[float, float]]


class Device:
    """Hands out the moments of a list, one per recorded event."""

    def __init__(self, moments: Moments) -> None:
        self._moments: Iterator[tuple[float, float]] = iter(moments)
        self.now_ms = 0.0
        self.synchronized = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at_ms=None)

        def record() -> None:
            self.now_ms, event.at_ms = next(self._moments)

        event.record = record
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event

    def synchronize(self) -> None:
        self.synchronized += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Device:
    device = Device(request.param)
    monkeypatch.setattr(tracer.torch.cuda, "Event", device.event)
    monkeypatch.setattr(tracer.torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(tracer.time, "monotonic_ns", lambda: round((1000 + device.now_ms) * 1e6))
    return device


def execute(own: Tracer, *kinds: str) -> None:
    for kind in kinds:
        own.began(Instruction(kind, 0))
        own.ended(Instruction(kind, 0))


def traced_step(used_bytes: list[int] | None = None) -> Tracer:
    """One forward and one backward of an engine that does nothing else."""
    own = Tracer(CudaClock())
    own.start_step((lambda: used_bytes.pop(0)) if used_bytes is not None else None)
    execute(own, "forward", "backward")
    return own


# The host launches everything within 3 ms; the device takes 10 ms for the forward and 20 ms for the backward pass.
HOST_AHEAD = [(0.0, 0.0), (0.1, 5.0), (1.0, 15.0), (1.1, 15.0), (3.0, 35.0)]
# Kernels end as they are launched: the device waits for every one.
LAUNCH_BOUND = [(0.0, 0.0), (0.1, 0.1), (10.0, 10.0), (10.0, 10.0), (30.0, 30.0)]
# The host is done with the forward pass 4 ms after the device began it, and far ahead in the backward pass.
HALF = [(0.0, 0.0), (0.1, 1.0), (5.0, 11.0), (5.0, 11.0), (9.0, 31.0)]


@pytest.mark.parametrize("device", [HOST_AHEAD], indirect=True)
def test_spans_are_when_the_device_worked(device: Device) -> None:
    forward, backward = traced_step().spans(step=7)
    assert [span.kind for span in (forward, backward)] == ["forward", "backward"]
    assert [forward.start_ns, forward.end_ns] == [1_005_000_000, 1_015_000_000]
    assert [backward.start_ns, backward.end_ns] == [1_015_000_000, 1_035_000_000]
    assert device.synchronized == 2  # before the step, and before its events are read


@pytest.mark.parametrize("device", [HOST_AHEAD], indirect=True)
def test_memory_belongs_to_the_moment_the_device_gets_there(device: Device) -> None:
    own = traced_step(used_bytes=[700, 300])
    own.spans(step=1)
    assert own.memory() == [(1_015_000_000, 700), (1_035_000_000, 300)]


@pytest.mark.parametrize(
    ("device", "seconds"),
    [(HOST_AHEAD, 0.0), (LAUNCH_BOUND, 0.0299), (HALF, 0.004)],
    indirect=["device"],
    ids=["host ahead", "launch bound", "half"],
)
def test_launch_gaps_are_bounded(device: Device, seconds: float) -> None:
    own = traced_step()
    assert own.launch_gap_seconds(own.spans(step=1)) == pytest.approx(seconds, abs=1e-9)


def test_a_host_that_computes_launches_nothing() -> None:
    own = Tracer(HostClock())
    own.start_step()
    execute(own, "forward")
    assert own.launch_gap_seconds(own.spans(step=1)) is None


def test_an_instruction_that_no_span_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="'teleport' can't be traced"):
        execute(Tracer(HostClock()), "teleport")
