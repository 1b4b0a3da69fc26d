"""Where the time of a finished or killed run went, from the span files of its ranks.

Called by rank 0 for result.json, and for the pictures and the trace. It reads what is there: a rank that was killed
leaves a file that is cut off, and then the steps that all ranks have whole are used, and what is lost is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from harness.analyse.executed import executed
from harness.analyse.explain import BubbleExplanation, explain
from harness.record.store import Attempt, read_jsonl
from harness.spans.accounting import PARTS, Accounting, account
from harness.spans.files import SpanFile, aligned, read_spans
from harness.spans.span import (
    Bubble,
    StageActivity,
    activity,
    as_dict,
    bubble_of_step,
    median_bubble,
    replica_wait_seconds,
)
from harness.spec.config import RunConfig
from harness.spec.engines import engine_kind
from harness.spec.schedules import Schedule, schedule_of
from harness.spec.topology import Topology

WAITING_KINDS = ("reduce_tied_gradients", "optimizer", "reduce_loss")
"""Instructions in which all stages meet: tied gradients, the norm of the whole gradient, the loss."""
TOLERANCE = 0.01
"""Share of a step that its parts may miss."""
MOST_STEPS = 10
"""As many timed steps, evenly spread, are looked into: this happens while the user waits for the result."""


@dataclass(frozen=True)
class RunSpans:
    """Spans of all ranks on one clock."""

    config: RunConfig
    files: list[SpanFile]
    """By rank."""
    timed_steps: list[int]
    """Steps after warm-up that every rank has whole."""
    losses: list[str]
    """What is missing, a sentence for each rank that lacks something."""

    @property
    def schedule(self) -> Schedule:
        """What the ranks executed, unless they have an order of their own."""
        return schedule_of(self.config)

    @property
    def has_own_order(self) -> bool:
        """Whether a library said what they execute; then spans tell what it was."""
        return self.config.parallel.pp > 1 and engine_kind(self.config.parallel.engine).has_own_order

    @property
    def topology(self) -> Topology:
        """Which rank is which."""
        return self.config.parallel.topology

    def lines(self) -> list[list[SpanFile]]:
        """The files of ranks that pass micro-batches to each other, by stage, for each replica and tp rank."""
        return [[self.files[rank] for rank in pipeline] for pipeline in self.topology.pipelines()]

    def activities(self, step: int) -> list[list[list[StageActivity]]]:
        """What the ranks did in a step, by [replica][stage][tensor-parallel rank]."""
        return self.topology.arranged([activity(file.instructions(step)) for file in self.files])


def read_run(attempt: Attempt, config: RunConfig) -> RunSpans:
    """Read what the ranks of an attempt have left; ranks without a readable file have no spans."""
    files, losses = [], []
    for rank in range(config.parallel.world_size):
        try:
            file = aligned(read_spans(attempt.spans_file(rank)))
        except (OSError, ValueError):
            file = SpanFile({}, [])
            losses.append(f"rank {rank} left no readable spans")
        else:
            if not file.complete:
                end = f"in or after step {file.spans[-1].step}" if file.spans else "before the first step"
                losses.append(f"the spans of rank {rank} are cut off {end}")
        files.append(file)
    warmup_steps = 0 if config.task == "generate" else config.train.warmup_steps
    timed = [int(line["step"]) for line in read_jsonl(attempt.metrics_file)][warmup_steps:]
    # The span of a step is written after all others of it.
    whole = set(timed).intersection(*(file.step_seconds() for file in files))
    return RunSpans(config, files, sorted(whole), losses)


def breakdown(run: RunSpans, bubbles: Sequence[Bubble] | None = None) -> dict[str, Any]:
    """`accounting` and `bubble` of result.json: means over timed steps, replicas and tensor-parallel ranks.

    But `measured` in `bubble` is the median over all timed steps, as in the run's row; `explained` is the mean over the
    steps that were looked into, whose causes add up to it. `replica_wait_seconds` is the mean over them, too, None with
    one replica; it is no part of the bubble. `accounting` and `bubble` are None when no timed step was kept.

    Args:
        bubbles: measured, of all timed steps; those of the steps with spans where they are not known otherwise.
    """
    steps = _spread(run.timed_steps, MOST_STEPS)
    accounts: list[list[Accounting]] = [[] for _ in range(run.config.parallel.pp)]
    explanations: list[BubbleExplanation] = []
    for line in run.lines():
        seconds = [file.step_seconds() for file in line]
        for step in steps:
            if run.has_own_order:
                stages, schedule = executed(line, step, run.schedule)
            else:
                stages, schedule = [file.instructions(step) for file in line], run.schedule
            whole = [of_step[step] for of_step in seconds]
            for stage, accounting in enumerate(account(stages, schedule.stages, whole, WAITING_KINDS)):
                accounts[stage].append(accounting)
            explanations.append(explain(stages, schedule, has_load=run.config.data.documents != "cut"))
    waits = [wait for step in steps if (wait := replica_wait_seconds(run.activities(step))) is not None]
    return {
        "accounting": [_mean_accounting(stage, of_stage) for stage, of_stage in enumerate(accounts)] if steps else None,
        "bubble": {
            **_mean_explanation(explanations),
            "measured": as_dict(
                median_bubble(bubbles or [bubble_of_step(run.activities(step)) for step in run.timed_steps])
            ),
            "replica_wait_seconds": fmean(waits) if waits else None,
        }
        if steps
        else None,
        "lost": run.losses,
    }


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread."""
    return [values[i * len(values) // count] for i in range(count)] if len(values) > count else list(values)


def _mean_accounting(stage: int, accounts: Sequence[Accounting]) -> dict[str, Any]:
    step_seconds, residual = fmean(a.step_seconds for a in accounts), fmean(a.residual_seconds for a in accounts)
    missing = sum(a.num_missing for a in accounts)
    return {
        "stage": stage,
        "step_seconds": step_seconds,
        "seconds": {part: fmean(a.seconds[part] for a in accounts) for part in PARTS},
        "residual_seconds": residual,
        "largest_residual_percent": max(100 * abs(a.residual_seconds) / a.step_seconds for a in accounts),
        "num_missing": missing,
        "closes": missing == 0 and abs(residual) <= TOLERANCE * step_seconds,
    }


def _mean_explanation(explanations: Sequence[BubbleExplanation]) -> dict[str, Any]:
    def mean(bubbles: Sequence[Bubble]) -> dict[str, float]:
        return {key: fmean(as_dict(bubble)[key] for bubble in bubbles) for key in as_dict(bubbles[0])}

    def mean_of_causes(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {cause: fmean(table[cause] for table in tables) for cause in tables[0]}

    return {
        "ideal": mean([e.ideal for e in explanations]),
        "simulated": mean([e.simulated for e in explanations]),
        "explained": mean([e.measured for e in explanations]),
        "causes_seconds": mean_of_causes([e.causes_seconds for e in explanations]),
        "causes_percent": mean_of_causes([e.causes_percent for e in explanations]),
    }
