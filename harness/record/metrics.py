"""From what a step measured to the lines of metrics.jsonl and the columns of results.csv.

Times are those of whole steps, the maximum over ranks, and their median over the steps after warm-up. A value
that is not known is None here and empty in files, never 0 and never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from statistics import median
from typing import Any

import numpy

from harness.machine import Machine
from harness.record.spread import detect_warmup, drift
from harness.record.store import Attempt, Point, is_stale, read_json, read_jsonl, read_measured
from harness.spans.span import Bubble
from harness.spec.config import RunConfig
from harness.spec.counts import flops_conventions, parameters, training_flops_per_token
from harness.spec.schedules import ideal_bubble_fraction, ideal_bubble_overhead

COLUMNS = tuple(
    """point status reason tp pp dp world_size schedule micro_batch_size num_micro_batches global_batch_size
    sequence_length precision zero_stage activation_checkpointing step_seconds step_seconds_p10
    step_seconds_p90 tokens_per_second tokens_per_second_per_device model_tflops_per_device mfu
    gemm_utilization bubble_fraction_ideal bubble_fraction_measured bubble_overhead_ideal
    bubble_overhead_measured peak_memory_bytes first_loss last_loss oversubscribed wandb_run_id command
    attempt stale model num_parameters partition threads_per_rank model_tflops_per_device_causal
    eval_loss eval_perplexity repeats drift warmup_steps_detected parity
    parity_max_error sequence_parallel dropout bubble_fraction_simulated
    checkpoint_interval slots launch_gap_fraction_max""".split()
)
"""Columns of results.csv: people script against their names and order, so new ones go to the end."""

RATES = frozenset(
    """tokens_per_second tokens_per_second_per_device model_tflops_per_device mfu gemm_utilization
    model_tflops_per_device_causal""".split()
)
"""Columns that are something over step_seconds."""


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
    launch_gap_fraction: float | None = None
    """At most this share of forward and backward time GPUs waited for the host to launch; None on CPU."""


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a diverged loss leaves nothing else."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of the global batch."""
    return config.train.global_batch_size * config.train.sequence_length


def metrics_line(record: StepRecord, config: RunConfig) -> dict[str, Any]:
    """One line of metrics.jsonl, and one point of wandb's history."""
    loss = record.eval_loss
    evaluation = {} if loss is None else {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
    return {
        "step": record.step,
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "perf/step_seconds": record.step_seconds,
        "perf/tokens_per_second": tokens_per_step(config) / record.step_seconds,
        "perf/bubble_fraction": record.bubble.fraction,
        "memory/peak_bytes": record.peak_memory_bytes,
        **evaluation,
    }


def layout_columns(config: RunConfig) -> dict[str, Any]:
    """Columns known before any run."""
    parallel, train, m = config.parallel, config.train, config.num_micro_batches
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "dp": parallel.dp,
        "world_size": parallel.world_size,
        "schedule": parallel.schedule,
        "micro_batch_size": train.micro_batch_size,
        "num_micro_batches": m,
        "global_batch_size": train.global_batch_size,
        "sequence_length": train.sequence_length,
        "precision": train.precision,
        "zero_stage": parallel.zero_stage,
        "activation_checkpointing": train.activation_checkpointing,
        "bubble_fraction_ideal": ideal_bubble_fraction(parallel.schedule, parallel.pp, m),
        "bubble_overhead_ideal": ideal_bubble_overhead(parallel.schedule, parallel.pp, m),
        "model": config.model.name,
        "num_parameters": parameters(config.model),
        "partition": str(parallel.partition),
        "threads_per_rank": config.launch.threads_per_rank,
        "sequence_parallel": parallel.sequence_parallel,
        "dropout": config.model.dropout,
        "checkpoint_interval": train.checkpoint_interval,
        "slots": config.launch.slots,
    }


def is_oversubscribed(config: RunConfig, machine: Machine) -> bool:
    """Whether ranks x threads exceed the cores, on CPU: then the times compare with nothing but themselves.

    Ranks that wait instead of computing need no core of their own.
    """
    threads = config.parallel.world_size * config.launch.threads_per_rank
    return machine.device_kind == "cpu" and computes(config) and threads > machine.num_cores


def computes(config: RunConfig) -> bool:
    """Whether the model does; an emulated one waits, and what it would compute means nothing."""
    return config.model.architecture.computes


def summarize(
    config: RunConfig,
    records: Sequence[StepRecord],
    *,
    gemm_flops_per_second: float | None,
    peak_flops_per_second: float | None,
    machine: Machine,
) -> dict[str, Any]:
    """Columns that a run measured.

    Args:
        records: all steps of the run in order; the first `train.warmup_steps` are not timed.
        gemm_flops_per_second: largest matrix-product rate measured on one device of this machine.
        peak_flops_per_second: dense datasheet peak of one device; None for an unknown device.
    """
    timed = records[config.train.warmup_steps :]
    assert timed, "at least one step must be timed"
    seconds = [record.step_seconds for record in timed]
    step_seconds = median(seconds)
    tokens_per_second = tokens_per_step(config) / step_seconds
    tokens_per_second_per_device = tokens_per_second / config.parallel.world_size

    def flops_per_second(causal: bool) -> float:
        per_token = training_flops_per_token(config.model, config.train.sequence_length, causal)
        return tokens_per_second_per_device * per_token

    flops = flops_per_second(causal=False) if computes(config) else None
    gaps = [record.launch_gap_fraction for record in timed if record.launch_gap_fraction is not None]
    eval_losses = [record.eval_loss for record in records if record.eval_loss is not None]
    memory = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    return {
        "step_seconds": step_seconds,
        "step_seconds_p10": float(numpy.percentile(seconds, 10)),
        "step_seconds_p90": float(numpy.percentile(seconds, 90)),
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second_per_device,
        "model_tflops_per_device": flops and flops / 1e12,
        "model_tflops_per_device_causal": flops and flops_per_second(causal=True) / 1e12,
        "mfu": flops / peak_flops_per_second if flops and peak_flops_per_second else None,
        "gemm_utilization": flops / gemm_flops_per_second if flops and gemm_flops_per_second else None,
        "bubble_fraction_measured": median(record.bubble.fraction for record in timed),
        "bubble_overhead_measured": median(record.bubble.overhead for record in timed),
        "peak_memory_bytes": max(memory, default=None),
        "first_loss": records[0].loss,
        "last_loss": records[-1].loss,
        "oversubscribed": is_oversubscribed(config, machine),
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "eval_perplexity": perplexity(eval_losses[-1]) if eval_losses else None,
        "launch_gap_fraction_max": median(gaps) if gaps else None,
        "drift": drift(seconds),
        "warmup_steps_detected": detect_warmup([record.step_seconds for record in records]),
    }


def flops_beside_peers(
    config: RunConfig, tokens_per_second_per_device: float, peak_flops_per_second: float | None
) -> dict[str, dict[str, float | None]]:
    """Convention -> TFLOP/s per device, and its share of the datasheet peak, as that tool's users would quote them."""
    rates = {
        name: tokens_per_second_per_device * per_token
        for name, per_token in flops_conventions(config.model, config.train.sequence_length).items()
    }
    return {
        name: {
            "tflops_per_device": rate / 1e12,
            "mfu": rate / peak_flops_per_second if peak_flops_per_second else None,
        }
        for name, rate in rates.items()
    }


def row(attempt: Attempt, reference: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All columns of an attempt, whatever became of it; None for what is not known.

    Args:
        reference: the environment of now; an attempt measured in another one is stale.
    """
    status, result = attempt.status(), attempt.result() or {}
    environment = status.get("environment") or {}
    columns = dict.fromkeys(COLUMNS) | {
        "point": attempt.point.name,
        "attempt": attempt.number,
        "status": status["status"],
        "reason": status.get("reason"),
        "command": attempt.command() or None,
        "stale": is_stale(environment, reference) if environment and reference else None,
        "wandb_run_id": attempt.wandb_run_id(),
        "repeats": 1 if status["status"] == "ok" else None,
    }
    try:
        config = attempt.config()
    except ValueError:
        columns |= _columns_asked_for(attempt.raw_config())
    else:
        columns |= layout_columns(config)
        machine = _machine(environment.get("hardware"))
        if machine:
            columns["oversubscribed"] = is_oversubscribed(config, machine)
        if "row" not in result:
            columns |= _before_the_end(attempt, config, machine)
    parity = read_measured(attempt.parity_file) or {}
    columns |= {key: parity.get(key) for key in ("parity", "parity_max_error")}
    if not is_sound(columns):
        columns["reason"] = columns["reason"] or parity.get("reason")
    measured = result.get("row")
    return columns | {key: measured[key] for key in columns if isinstance(measured, dict) and key in measured}


def is_sound(columns: Mapping[str, Any]) -> bool:
    """Whether nothing speaks against the layout of a row: it passed its parity check, or none was asked for."""
    return columns["parity"] in (None, "pass")


def _before_the_end(attempt: Attempt, config: RunConfig, machine: Machine | None) -> dict[str, Any]:
    """Columns that a run measured before it failed: loss and memory from its first step on, times after warm-up."""
    try:
        records = [record_of(line) for line in read_jsonl(attempt.metrics_file)]
    except (KeyError, TypeError, ZeroDivisionError):  # not a file of ours
        return {}
    errors = [read_json(path) or {} for path in attempt.error_file(0).parent.glob("*.json")]
    peaks = [*(record.peak_memory_bytes for record in records), *(error.get("peak_memory_bytes") for error in errors)]
    columns: dict[str, Any] = {}
    if machine and len(records) > config.train.warmup_steps:
        columns = summarize(config, records, gemm_flops_per_second=None, peak_flops_per_second=None, machine=machine)
    elif records:
        columns = {"first_loss": records[0].loss, "last_loss": records[-1].loss}
    return columns | {"peak_memory_bytes": max((peak for peak in peaks if isinstance(peak, int)), default=None)}


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
    )


def point_row(point: Point, reference: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """All columns of a point: of its newest finished attempt and, where that is ok, over all its repeats.

    step_seconds is the median of the repeats' medians, p10 and p90 are over all their steps, other measured columns
    are medians.

    Args:
        reference: as for `row`.

    Returns:
        None for a point without attempts.
    """
    shown = point.shown()
    if shown is None:
        return None
    columns = row(shown, reference)
    repeats = point.measured_in(shown.status().get("environment") or {})
    if columns["status"] != "ok" or len(repeats) < 2:
        return columns
    rows = [row(repeat, reference) for repeat in repeats]
    if checked := [row for row in rows if row["parity"]]:  # repeats are one layout: the last verdict is that of all
        columns |= {key: checked[-1][key] for key in ("parity", "parity_max_error", "reason")}
    columns |= {key: _middle(key, [row[key] for row in rows], columns[key]) for key in COLUMNS if key != "attempt"}
    if seconds := [value for repeat in repeats for value in timed_step_seconds(repeat)]:
        columns["step_seconds_p10"], columns["step_seconds_p90"] = map(float, numpy.percentile(seconds, [10, 90]))
    return columns | {"repeats": len(repeats), "slots": max(row["slots"] or 1 for row in rows)}


def _middle(key: str, values: Sequence[Any], shown: Any) -> Any:
    """Median of the numbers among `values` where they differ; of rates that of their inverses, so that all agree."""
    known = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(set(known)) < 2:
        return shown
    if key in RATES:
        return 1 / median(1 / value for value in known)
    middle = median(known)
    return round(middle) if all(isinstance(value, int) for value in known) else middle


def timed_step_seconds(attempt: Attempt) -> list[float]:
    """Seconds of every step after warm-up, as far as metrics.jsonl can be read."""
    lines = read_jsonl(attempt.metrics_file)
    warmup_steps = (attempt.raw_config().get("train") or {}).get("warmup_steps", 0)
    return [line["perf/step_seconds"] for line in lines[warmup_steps:] if "perf/step_seconds" in line]


def _machine(hardware: Any) -> Machine | None:
    """The machine of a status file, None when it doesn't say."""
    try:
        return Machine(**{field.name: hardware[field.name] for field in fields(Machine) if field.default is MISSING})
    except (KeyError, TypeError):
        return None


def _columns_asked_for(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Layout columns of a configuration that is not valid: what it says where that makes sense, nothing derived."""
    columns: dict[str, Any] = {}
    for section, kind, keys in (
        ("model", str, "name"),
        ("parallel", int, "tp pp dp zero_stage"),
        ("parallel", str, "schedule partition"),
        ("train", int, "micro_batch_size global_batch_size sequence_length"),
        ("train", str, "precision activation_checkpointing"),
        ("launch", int, "threads_per_rank slots"),
    ):
        values = raw.get(section)
        for key in keys.split():
            if isinstance(values, Mapping) and isinstance(value := values.get(key), kind):
                columns["model" if key == "name" else key] = value
    return columns
