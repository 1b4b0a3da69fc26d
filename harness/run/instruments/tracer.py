"""Measured spans: every instruction of DeepSpeed's pipeline engine, on every rank.

`PipelineEngine` looks its instructions up in `_INSTRUCTION_MAP`; the tracer replaces the entries of one
engine by versions that note when they begin and end. What happens inside a forward or backward pass goes
through two names of `harness.model`, `dist` in `collectives` and `checkpoint` in `block`: while a step is
traced in detail they stand for versions that take notes, and otherwise for what they are. On a GPU the marks
are CUDA events that are read after the step, so that nothing waits inside it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.utils.checkpoint import checkpoint

from harness.model import block, collectives
from harness.spans.span import COMPUTE_KINDS, NESTED_KINDS, Span

KIND_OF_INSTRUCTION = {
    schedule.LoadMicroBatch: "load",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "send_activation",
    schedule.RecvActivation: "recv_activation",
    schedule.SendGrad: "send_gradient",
    schedule.RecvGrad: "recv_gradient",
    schedule.ReduceTiedGrads: "reduce_tied_gradients",
    schedule.ReduceGrads: "reduce_gradients",
    schedule.OptimizerStep: "optimizer",
}
ONCE_PER_STEP = frozenset({"reduce_tied_gradients", "reduce_gradients", "optimizer", "reduce_loss"})
KIND_OF_COLLECTIVE = {
    "all_reduce": "tp_all_reduce",
    "all_gather": "tp_all_gather",
    "all_gather_single": "tp_all_gather",
    "reduce_scatter": "tp_reduce_scatter",
    "reduce_scatter_single": "tp_reduce_scatter",
    "all_to_all_single": "tp_reduce_scatter",  # how it is done over gloo
}


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


class Tracer:
    """Notes the instructions of one engine, step by step.

    Args:
        clock: what marks the moments.
        nested: also note tensor-parallel collectives and recomputation, inside the instructions.
    """

    def __init__(self, clock: Clock, nested: bool = False) -> None:
        self._clock = clock
        self._notes: list[tuple[str, Any, Any]] = []
        """Kind, mark of the begin, mark of the end, in the order of ends."""
        self._used_bytes: Callable[[], int] | None = None
        self._memory: list[tuple[Any, int]] = []
        """Mark of an instruction's end, bytes in use once it was launched."""
        self._seams: list[tuple[ModuleType, str, Any]] = []
        """Module, name in it, what the name stands for while a step is traced."""
        if nested:
            traced = {name: self._traced(kind, getattr(dist, name)) for name, kind in KIND_OF_COLLECTIVE.items()}
            noted = partial(checkpoint, context_fn=self._checkpoint_contexts)
            self._seams = [(collectives, "dist", _Distributed(traced)), (block, "checkpoint", noted)]
        self._originals: list[Any] = []

    def attach(self, engine: PipelineEngine) -> None:
        """Wrap the engine's instructions as they are now, and the reduction of the loss that ends a step."""
        engine._INSTRUCTION_MAP = {
            instruction: self._traced(KIND_OF_INSTRUCTION[instruction], execute)
            for instruction, execute in engine._INSTRUCTION_MAP.items()
            if instruction in KIND_OF_INSTRUCTION
        }
        engine._aggregate_total_loss = self._traced("reduce_loss", engine._aggregate_total_loss)

    def _traced(self, kind: str, execute: Callable[..., Any]) -> Callable[..., Any]:
        note, mark = self._notes.append, self._clock.mark

        def traced(*arguments: Any, **options: Any) -> Any:
            start = mark()
            result = execute(*arguments, **options)
            end = mark()
            note((kind, start, end))
            if self._used_bytes is not None and kind not in NESTED_KINDS:
                self._memory.append((end, self._used_bytes()))
            return result

        return traced

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        """What `torch.utils.checkpoint` does the first and the second computation in."""
        return contextlib.nullcontext(), self._recomputing()

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        start = self._clock.mark()
        try:
            yield
        finally:  # it ends by an exception once everything needed is there
            self._notes.append(("recompute", start, self._clock.mark()))

    def start_step(self, used_bytes: Callable[[], int] | None = None) -> None:
        """Forget the last step and take notes.

        Args:
            used_bytes: memory in use, to be noted after each instruction.
        """
        self._notes.clear()
        self._memory.clear()
        self._used_bytes = used_bytes
        self._originals = [getattr(module, name) for module, name, _ in self._seams]
        for module, name, traced in self._seams:
            setattr(module, name, traced)
        self._clock.start_step()

    def spans(self, step: int) -> list[Span]:
        """What happened since `start_step`, in order, an instruction before what is nested in it; ends the notes."""
        for (module, name, _), original in zip(self._seams, self._originals, strict=True):
            setattr(module, name, original)
        moments = iter(self._clock.nanoseconds([mark for _, *marks in self._notes for mark in marks]))
        seen: dict[str, int] = defaultdict(int)
        spans: list[Span] = []
        inside: list[Span] = []
        for kind, *_ in self._notes:
            span = Span(step, kind, -1, next(moments), next(moments))
            if kind in NESTED_KINDS:
                inside.append(span)
                continue
            # 1F1B runs each kind of instruction in the order of the micro-batches.
            micro_batch = -1 if kind in ONCE_PER_STEP else seen[kind]
            seen[kind] += 1
            inside.sort(key=lambda nested: (nested.start_ns, -nested.end_ns))
            spans += [nested._replace(micro_batch=micro_batch) for nested in (span, *inside)]
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
        launched = [self._clock.host_nanoseconds(end) for kind, _, end in self._notes if kind not in NESTED_KINDS]
        instructions = [span for span in spans if span.kind not in NESTED_KINDS]
        gap_ns = 0
        for span, launched_ns in zip(instructions, launched, strict=True):
            if launched_ns is None:
                return None
            if span.kind in COMPUTE_KINDS:
                gap_ns += max(0, min(launched_ns, span.end_ns) - span.start_ns)
        return gap_ns / 1e9


class _Distributed:
    """`torch.distributed` with some of its functions replaced."""

    def __init__(self, replaced: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)
