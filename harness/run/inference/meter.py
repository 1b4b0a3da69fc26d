"""What a ring takes: phases timed on all ranks at once, their bubbles, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from harness.analyse.explain import explain
from harness.machine import Machine
from harness.record.inference import Bubbles
from harness.record.store import Attempt
from harness.run.inference.ring import Ring
from harness.run.instruments.clock import measure_clock_offset
from harness.run.instruments.gemm import synchronize
from harness.run.instruments.memory import peak_memory_bytes
from harness.run.instruments.tracer import Tracer, build_clock
from harness.spans.clock import to_reference
from harness.spans.files import SpanWriter
from harness.spans.span import STEP, Span
from harness.spec.batching import Chosen, Feed
from harness.spec.config import RunConfig
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule


class Timed(NamedTuple):
    """What was measured while a feed went round; known to rank 0."""

    seconds: float
    """From a moment that all ranks share to the last token, or the end of the last forward pass."""
    bubbles: Bubbles | None
    peak_memory_bytes: int
    """The maximum over ranks, so far."""


class _RankPhase(NamedTuple):
    """What one rank tells rank 0 of a phase."""

    seconds: float
    peak_bytes: int
    spans: list[Span]
    executed: list[Instruction]


class Meter:
    """Runs a ring and measures it; built and called by all ranks at once."""

    def __init__(self, attempt: Attempt, config: RunConfig, rank: int, ring: Ring, machine: Machine) -> None:
        self._config, self._rank, self._ring = config, rank, ring
        self._tracer = Tracer(build_clock(machine.device_kind), nested=config.tracking.trace_level == "collectives")
        self._tracer.attach(ring)
        device = ring.stage.device
        self.group = None if device.type == "cpu" else dist.new_group(backend="gloo")
        self._clock_offset = measure_clock_offset(self.group)
        move = to_reference(self._clock_offset)
        ring.clock = lambda: move(time.monotonic_ns())
        header = {"rank": rank, **ring.topology.coordinate(rank)._asdict()}
        self._spans = SpanWriter(attempt.spans_file(rank), header, self._clock_offset)
        gc.freeze()

    def run(
        self, feed: Feed | None, told: Callable[[list[Chosen]], None], step: int | None, kind: str = STEP
    ) -> Timed | None:
        """Let a feed go round; what it took, on rank 0.

        Args:
            feed: on rank 0.
            told: of the tokens that came back, on rank 0.
            step: under which spans are written to the rank's file; None: they are not.
            kind: of the span around them all: a whole step, or a phase of it.
        """
        self._tracer.start_step()
        dist.barrier(group=self.group)
        start = time.monotonic_ns()
        self._ring.run(feed, told)
        synchronize(self._ring.stage.device)
        end = time.monotonic_ns()
        spans = self._tracer.spans(step or 0)
        if self._rank != 0:
            spans.pop()  # waiting for what was the end, and no pass
        if step is not None:
            self._spans.write([*spans, Span(step, kind, -1, start, end)])
        move = to_reference(self._clock_offset)
        moved = [span._replace(start_ns=move(span.start_ns), end_ns=move(span.end_ns)) for span in spans]
        tells_all = self._ring.tp.rank == 0
        own = _RankPhase(
            (end - start) / 1e9,
            peak_memory_bytes(),
            moved if tells_all else [],
            self._ring.executed if tells_all else [],
        )
        ranks: list[_RankPhase] | None = [own] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object(own, ranks, dst=0, group=self.group)
        if ranks is None:
            return None
        stages = [ranks[group[0]] for group in self._ring.topology.groups("tp")]
        peak = max(rank.peak_bytes for rank in ranks)
        return Timed(max(rank.seconds for rank in ranks), _bubbles(stages), peak)

    def close(self) -> None:
        """Close this rank's files. Collective."""
        self._spans.close(measure_clock_offset(self.group))


def _bubbles(stages: Sequence[_RankPhase]) -> Bubbles | None:
    """Of one rank per stage; None where nothing was computed."""
    numbers = [i.micro_batch for i in stages[0].executed if i.kind == "forward"]
    if not numbers:
        return None
    first = min(numbers)
    orders = [[i._replace(micro_batch=i.micro_batch - first) for i in stage.executed] for stage in stages]
    schedule = Schedule("ring", len(numbers), Placement(len(stages)), orders)
    spans = [[span._replace(micro_batch=span.micro_batch - first) for span in stage.spans] for stage in stages]
    explained = explain(spans, schedule, has_load=False)
    return Bubbles(
        max(0.0, explained.simulated.fraction), explained.measured.fraction
    )  # a rounding below 0 of one stage
