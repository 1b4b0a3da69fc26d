"""Measured spans: every instruction of an engine, on every rank.

The tracer observes an engine, and what happens inside a forward or backward pass where it is asked to. On a GPU the
marks are CUDA events that are read after the step, so that nothing waits inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from harness.model.groups import TensorParallel
from harness.run.engines.engine import Observer, Observers
from harness.spans.span import COMPUTE_KINDS, KINDS, Span
from harness.spec.schedules import Instruction


class Clock(Protocol):
    """Marks moments cheaply and says afterwards when they were."""

    def start_step(self) -> None:
        """Called before the first mark of a step."""

    def mark(self) -> Any:
        """Note this moment."""

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        """Moments of the step's marks on the host's monotonic clock, once its work is done."""

    def host_nanoseconds(self, mark: Any) -> int | None:
        """When the host made a mark, which may be long before the device came to it; None: nothing lies between."""


class Observed(Protocol):
    """Whatever executes instructions, an engine for one."""

    observers: Observers
    tp: TensorParallel


class HostClock:
    """The host's monotonic clock, which all processes of a machine share."""

    mark = staticmethod(time.monotonic_ns)

    def start_step(self) -> None:
        """Nothing to prepare."""

    def nanoseconds(self, marks: list[int]) -> list[int]:
        """Marks are moments already."""
        return marks

    def host_nanoseconds(self, mark: int) -> None:
        """The host does the work itself."""


class CudaClock:
    """CUDA events on the current stream, tied to the host's clock at the start of each step."""

    def start_step(self) -> None:
        """Tie the device's clock to the host's."""
        torch.cuda.synchronize()
        self._base = self.mark()

    def mark(self) -> tuple[torch.cuda.Event, int]:
        """Record an event, and when that was asked for."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event, time.monotonic_ns()

    def nanoseconds(self, marks: list[tuple[torch.cuda.Event, int]]) -> list[int]:
        """Wait for the device, then read the events."""
        torch.cuda.synchronize()
        base, base_ns = self._base  # an idle device comes to an event at once
        return [base_ns + round(base.elapsed_time(event) * 1e6) for event, _ in marks]

    def host_nanoseconds(self, mark: tuple[torch.cuda.Event, int]) -> int:
        """When the event was recorded by the host."""
        return mark[1]


def build_clock(device_kind: str) -> Clock:
    """The clock that sees the work of a device."""
    return CudaClock() if device_kind == "cuda" else HostClock()


class Note(NamedTuple):
    """Something that was done: between two marks of a clock."""

    instruction: Instruction
    """Or, of the one it is inside, with the kind of the part."""
    start: Any
    end: Any
    is_part: bool = False


class Tracer(Observer):
    """Notes the instructions of one engine, step by step.

    Args:
        clock: what marks the moments.
        nested: also note tensor-parallel collectives and recomputation, inside the instructions.
    """

    def __init__(self, clock: Clock, nested: bool = False) -> None:
        self._clock, self._nested = clock, nested
        self._active = False
        self._notes: list[Note] = []
        """In the order of ends."""
        self._current = Instruction("")
        self._start: Any = None
        self._parts: list[tuple[str, Any]] = []
        """Those that have begun: kind, mark."""
        self._used_bytes: Callable[[], int] | None = None
        self._memory: list[tuple[Any, int]] = []
        """Mark after an instruction, bytes in use then."""

    def attach(self, engine: Observed) -> None:
        """Observe an engine: those that observe it already are inside the spans."""
        engine.observers.append(self)
        if self._nested:
            engine.tp.parts.observers.append(self)

    def began(self, instruction: Instruction) -> None:
        """Note the begin.

        Raises:
            ValueError: an instruction of a kind that no span has.
        """
        if instruction.kind not in KINDS:
            raise ValueError(f"an instruction of kind {instruction.kind!r} can't be traced; name it in KINDS")
        if self._active:
            self._current, self._start = instruction, self._clock.mark()

    def ended(self, instruction: Instruction) -> None:
        """Note the end."""
        if self._active:
            end = self._clock.mark()
            self._notes.append(Note(instruction, self._start, end))
            if self._used_bytes is not None:
                self._memory.append((end, self._used_bytes()))

    def part_began(self, kind: str) -> None:
        """Note that a part of the instruction begins."""
        if self._active:
            self._parts.append((kind, self._clock.mark()))

    def part_ended(self, kind: str) -> None:
        """Note its end."""
        if self._active:
            _, start = self._parts.pop()
            self._notes.append(Note(self._current._replace(kind=kind), start, self._clock.mark(), is_part=True))

    def start_step(self, used_bytes: Callable[[], int] | None = None) -> None:
        """Forget the last step and take notes.

        Args:
            used_bytes: memory in use, to be noted after each instruction.
        """
        self._notes.clear()
        self._memory.clear()
        self._parts.clear()
        self._used_bytes, self._active = used_bytes, True
        self._clock.start_step()

    def spans(self, step: int) -> list[Span]:
        """What happened since `start_step`, in order, an instruction before what is nested in it; ends the notes."""
        self._active = False
        moments = iter(self._clock.nanoseconds([mark for note in self._notes for mark in (note.start, note.end)]))
        spans: list[Span] = []
        inside: list[Span] = []
        for (kind, micro_batch, chunk, _), _, _, is_part in self._notes:
            span = Span(step, kind, micro_batch, next(moments), next(moments), chunk)
            if is_part:
                inside.append(span)
                continue
            spans += [span, *sorted(inside, key=lambda nested: (nested.start_ns, -nested.end_ns))]
            inside.clear()
        return spans

    def memory(self) -> list[tuple[int, int]]:
        """After `spans`: the end of each instruction in nanoseconds, and the bytes in use once it was launched.

        A GPU's memory is taken when work is launched, in the order of its stream, so what is in use at the launch
        belongs to the moment when the device gets there.
        """
        moments = self._clock.nanoseconds([mark for mark, _ in self._memory])
        return [(moment, size) for moment, (_, size) in zip(moments, self._memory, strict=True)]

    def launch_gap_seconds(self, spans: Sequence[Span]) -> float | None:
        """After `spans`: at most so long a GPU waited in forward and backward for the host to launch its next kernel.

        It can wait only as long as the host has not launched all of the instruction, so from the instruction's begin
        on the device to its last launch by the host, if the device had not begun it later.

        Args:
            spans: what `spans` returned.

        Returns:
            None where the host does the work itself.
        """
        launched = [self._clock.host_nanoseconds(note.end) for note in self._notes if not note.is_part]
        instructions = [span for span in spans if span.kind in KINDS]
        gap_ns = 0
        for span, launched_ns in zip(instructions, launched, strict=True):
            if launched_ns is None:
                return None
            if span.kind in COMPUTE_KINDS:
                gap_ns += max(0, min(launched_ns, span.end_ns) - span.start_ns)
        return gap_ns / 1e9
