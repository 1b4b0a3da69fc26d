"""The steps of a rank: train, measure, and bring every rank's numbers to rank 0."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.record.steps import StepRecord, metrics_line
from harness.record.store import Attempt
from harness.run.data import Load
from harness.run.engines.engine import Engine
from harness.run.evaluate import Evaluation
from harness.run.instruments.clock import measure_clock_offset
from harness.run.instruments.memory import peak_memory_bytes, used_memory_bytes
from harness.run.instruments.tracer import Tracer
from harness.spans.clock import to_reference
from harness.spans.files import SpanWriter
from harness.spans.span import STEP, Span, StageActivity, activity, bubble_of_step
from harness.spec.config import RunConfig
from harness.strict_json import dumps


class RankStep(NamedTuple):
    """What one rank tells rank 0 of a step."""

    seconds: float
    peak_bytes: int
    activity: StageActivity
    launch_gap_seconds: float
    """`Tracer.launch_gap_seconds`; 0 on CPU."""


def launch_gap_fraction(ranks: Sequence[RankStep]) -> float:
    """At most this share of all forward and backward time the GPUs waited for launches."""
    return sum(rank.launch_gap_seconds for rank in ranks) / sum(rank.activity.busy_seconds for rank in ranks)


class Loop:
    """Steps of one rank: train, measure, and bring every rank's numbers to rank 0.

    Args:
        load: what a step, counted from 0, has to compute, where padding is none of it.
    """

    def __init__(
        self,
        attempt: Attempt,
        config: RunConfig,
        rank: int,
        engine: Engine,
        tracer: Tracer,
        device: torch.device,
        evaluation: Evaluation | None = None,
        load: Callable[[int], Load] | None = None,
    ) -> None:
        self.config, self.rank, self.engine, self.tracer, self.device = config, rank, engine, tracer, device
        self.records: list[StepRecord] = []
        self.peak_bytes = [0] * dist.get_world_size()
        """By rank, so far; known to rank 0."""
        # What ranks tell each other for the record travels over gloo, also where the model uses NCCL.
        self.group = None if device.type == "cpu" else dist.new_group(backend="gloo")
        self._evaluation, self._load = evaluation, load
        self._steps_done = 0
        self._clock_offset = measure_clock_offset(self.group)
        self._to_reference = to_reference(self._clock_offset)
        header = {"rank": rank, **engine.topology.coordinate(rank)._asdict()}
        self._spans = SpanWriter(attempt.spans_file(rank), header, self._clock_offset)
        self._metrics = attempt.metrics_file.open("w") if rank == 0 else None
        self._started = time.monotonic()
        gc.freeze()  # a full collection over all that imports have made takes 0.1 s, in the middle of some step

    def step(self, step: int, data: Any) -> None:
        """One optimizer step (counted from 1), and an evaluation where one is due."""
        learning_rate = self.engine.learning_rate()
        is_shown = step in self.config.tracking.trace_steps
        self.tracer.start_step(used_memory_bytes if is_shown else None)  # waits for the device
        dist.barrier(group=self.group)  # what a rank did since the last step is no part of this one
        start = time.monotonic_ns()
        loss = self.engine.train_step(data)  # waits for the device
        end = time.monotonic_ns()
        spans = self.tracer.spans(step)
        self._steps_done += 1
        is_kept = 0 < self._steps_done - self.config.train.warmup_steps <= self.config.tracking.span_steps
        if is_kept or is_shown:
            self._spans.write([*spans, Span(step, STEP, -1, start, end)])
        if is_shown:
            self._spans.write_memory(self.tracer.memory())
        norm = self.engine.gradient_norm()
        gathered = self._gather(end - start, activity(spans), self.tracer.launch_gap_seconds(spans))
        eval_loss = self._evaluate(step)
        if gathered is not None:
            self._record(step, loss, learning_rate, norm, eval_loss, gathered)
        if compares_clocks_after(self._steps_done):
            self._to_reference = to_reference(self._clock_offset, measure_clock_offset(self.group))

    def _evaluate(self, step: int) -> float | None:
        """Loss on the held-out samples where a step ends with an evaluation."""
        if self._evaluation is None or not is_due(self.config.train.eval_interval, step, self.config):
            return None
        return self._evaluation.loss()

    def _gather(self, seconds_ns: int, own: StageActivity, launch_gap_seconds: float | None) -> list[RankStep] | None:
        """What rank 0 records of each rank; None on the others."""
        numbers = [
            seconds_ns,
            peak_memory_bytes(),
            self._to_reference(own.first_forward_start_ns),
            self._to_reference(own.last_backward_end_ns),
            round(own.forward_seconds * 1e9),
            round(own.backward_seconds * 1e9),
            round((launch_gap_seconds or 0) * 1e9),
        ]
        mine = torch.tensor(numbers, dtype=torch.int64)
        received = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if self.rank == 0 else None
        dist.gather(mine, received, dst=0, group=self.group)
        if received is None:
            return None
        return [
            RankStep(seconds / 1e9, peak, StageActivity(begin, end, forward / 1e9, backward / 1e9), gap / 1e9)
            for seconds, peak, begin, end, forward, backward, gap in (tensor.tolist() for tensor in received)
        ]

    def _record(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        norm: float | None,
        eval_loss: float | None,
        ranks: Sequence[RankStep],
    ) -> None:
        """Rank 0: one line of metrics.jsonl, one line for the user."""
        replicas = self.engine.topology.arranged([rank.activity for rank in ranks])
        stages = [[a for replica in replicas for a in replica[s]] for s in range(self.config.parallel.pp)]
        # Linux counts resident pages approximately: the peak it reports may be lower than it was.
        self.peak_bytes = [max(known, rank.peak_bytes) for known, rank in zip(self.peak_bytes, ranks, strict=True)]
        load = self._load(step - 1) if self._load is not None else None
        record = StepRecord(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            step_seconds=max(rank.seconds for rank in ranks),
            bubble=bubble_of_step(replicas),
            forward_seconds=[sum(a.forward_seconds for a in stage) / len(stage) for stage in stages],
            backward_seconds=[sum(a.backward_seconds for a in stage) / len(stage) for stage in stages],
            peak_memory_bytes=max(self.peak_bytes),
            eval_loss=eval_loss,
            **(load._asdict() if load is not None else {}),
            launch_gap_fraction=launch_gap_fraction(ranks) if self.device.type == "cuda" else None,
        )
        self.records.append(record)
        assert self._metrics is not None
        line = metrics_line(record, self.config)
        self._metrics.write(dumps(line) + "\n")
        self._metrics.flush()
        left = (time.monotonic() - self._started) / self._steps_done * (self.config.train.steps - step)
        evaluated = f"  held-out loss {eval_loss:.4f}" if eval_loss is not None else ""
        print(
            f"step {step:>{len(str(self.config.train.steps))}}/{self.config.train.steps}  loss {loss:.4f}  "
            f"{line['perf/tokens_per_second']:,.0f} tokens/s  {left:.0f} s left{evaluated}",
            flush=True,
        )

    def close(self) -> None:
        """Close this rank's files; a collective call of all ranks."""
        self._spans.close(measure_clock_offset(self.group))
        if self._metrics is not None:
            self._metrics.close()


def compares_clocks_after(steps_done: int) -> bool:
    """Whether clocks are compared again, which takes some milliseconds per rank: after 1, 2, 4 ... steps, every 64.

    Until the next, a line through the first comparison and the latest is extended by no more than its own length: it
    is then wrong by a few of their uncertainties, however large a constant drift, and 64 steps bound what changes.
    """
    return steps_done % 64 == 0 or steps_done.bit_count() == 1


def is_due(interval: int, step: int, config: RunConfig) -> bool:
    """Whether a step ends with what happens at intervals and after the last step; interval 0: never."""
    return interval > 0 and (step % interval == 0 or step == config.train.steps)
