"""What a step measured, and its line in metrics.jsonl.

Times are those of whole steps, the maximum over ranks. A value that is not known is None here and empty in files,
never 0 and never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.record.store import Attempt, read_jsonl
from harness.spans.span import Bubble
from harness.spec.config import RunConfig

LOAD = ("tokens", "pairs", "flops", "causal_flops")
"""What a global batch has to compute, where documents are not cut."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step measured, over all ranks."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the valid tokens of the global batch."""
    learning_rate: float
    grad_norm: float | None
    """Norm of the whole gradient before clipping."""
    step_seconds: float
    """The maximum over ranks."""
    bubble: Bubble
    """The mean over pipelines."""
    forward_seconds: list[float]
    """Per stage, of all its micro-batches."""
    backward_seconds: list[float]
    """Per stage, of all its micro-batches."""
    peak_memory_bytes: int | None
    """The maximum over ranks."""
    eval_loss: float | None = None
    """Mean over the tokens of the held-out samples, at steps that end with an evaluation."""
    tokens: int | None = None
    """Positions of the global batch that are no padding, where documents may leave some; None: there is none."""
    pairs: int | None = None
    """Of positions of the same document, where documents are not cut."""
    flops: int | None = None
    """Of training on these tokens, each in its own document; None where documents are cut."""
    causal_flops: int | None = None
    """The same with the part of attention that a causal mask leaves."""
    launch_gap_fraction: float | None = None
    """At most this share of forward and backward time GPUs waited for the host to launch; None on CPU."""


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a diverged loss leaves nothing else."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def positions_per_step(config: RunConfig) -> int:
    """Of the global batch, padding included."""
    return config.train.global_batch_size * config.train.sequence_length


def tokens_of(record: StepRecord, config: RunConfig) -> int:
    """Of the global batch of a step, without padding."""
    return positions_per_step(config) if record.tokens is None else record.tokens


def metrics_line(record: StepRecord, config: RunConfig) -> dict[str, Any]:
    """One line of metrics.jsonl, and one point of wandb's history."""
    loss = record.eval_loss
    load = {} if record.tokens is None else {f"data/{key}": getattr(record, key) for key in LOAD}
    evaluation = {} if loss is None else {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
    return {
        "step": record.step,
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "perf/step_seconds": record.step_seconds,
        "perf/tokens_per_second": tokens_of(record, config) / record.step_seconds,
        "perf/bubble_fraction": record.bubble.fraction,
        "memory/peak_bytes": record.peak_memory_bytes,
        **load,
        **evaluation,
    }


def record_of(line: Mapping[str, Any]) -> StepRecord:
    """What a line of metrics.jsonl tells of a step: all but the time of each stage.

    Raises:
        KeyError, TypeError, ZeroDivisionError: it is no such line.
    """
    fraction, seconds = line["perf/bubble_fraction"], line["perf/step_seconds"]
    return StepRecord(
        step=line["step"],
        loss=line["train/loss"],
        learning_rate=line["train/learning_rate"],
        grad_norm=line["train/grad_norm"],
        step_seconds=seconds,
        bubble=Bubble(fraction, fraction / (1 - fraction), fraction * seconds),
        forward_seconds=[],
        backward_seconds=[],
        peak_memory_bytes=line["memory/peak_bytes"],
        eval_loss=line.get("eval/loss"),
        **{key: line.get(f"data/{key}") for key in LOAD},
    )


def timed_seconds(attempt: Attempt) -> list[float]:
    """Seconds of every step after warm-up, or of every measurement, as far as metrics.jsonl can be read."""
    lines, raw = read_jsonl(attempt.metrics_file), attempt.raw_config()
    key = "perf/step_seconds" if raw.get("task", "train") == "train" else "perf/seconds"
    warmup_steps = 0 if raw.get("task") == "generate" else (raw.get("train") or {}).get("warmup_steps", 0)
    return [line[key] for line in lines[warmup_steps:] if key in line]
