"""What a measurement of inference measured, and its line in metrics.jsonl.

Moments are those at which rank 0 has a token, or begins to offer requests. A value that is not known is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy

from harness.machine import Machine
from harness.spec.config import RunConfig


@dataclass(frozen=True)
class Bubbles:
    """Of a phase: idle share of its stages, from the first forward's start to the last one's end."""

    simulated: float | None
    """With the measured mean durations of stages and transfers; None where only metrics.jsonl is left."""
    measured: float


@dataclass(frozen=True)
class PhaseRecord:
    """A phase that was measured on its own: nothing of another one was under way."""

    seconds: float
    tokens: int
    """Of prompts that it computed, or chosen."""
    bubbles: Bubbles | None
    """None where some spans are missing."""


@dataclass(frozen=True)
class InferenceRecord:
    """One measurement, over all ranks."""

    number: int
    """Counted from 1."""
    seconds: float
    """From the first offer to the last token."""
    tokens: int
    """That were computed or chosen in it: of what `tokens_per_second` says."""
    peak_memory_bytes: int
    """The maximum over ranks, so far."""
    first_token_seconds: list[float] = field(default_factory=list)
    """Of each request, from its offer to its first token."""
    inter_token_seconds: list[float] = field(default_factory=list)
    """Between one token of a sequence and the next, of all sequences."""
    queue_seconds: list[float] = field(default_factory=list)
    """Of each request, from its offer to the begin of its first pass."""
    prefill: PhaseRecord | None = None
    decode: PhaseRecord | None = None


@dataclass(frozen=True)
class HeldOut:
    """Loss on held-out text, the mean over its tokens."""

    loss: float
    """As configured."""
    loss_fp32: float
    """In fp32, without quantization."""
    num_tokens: int
    source: str
    """What the text is."""


@dataclass(frozen=True)
class MeasuredInference:
    """A run of task=generate or task=forward, as far as it came."""

    config: RunConfig
    records: Sequence[InferenceRecord]
    """Those that count."""
    machine: Machine | None
    kv_cache_bytes: int | None = None
    """Of the rank with most."""
    held_out: HeldOut | None = None
    """None where it was not asked for."""

    @property
    def seconds(self) -> list[float]:
        """Of each measurement."""
        return [record.seconds for record in self.records]

    @property
    def tokens_per_second(self) -> float:
        """Of the median measurement."""
        return median(record.tokens / record.seconds for record in self.records)

    def rate(self, phase: str) -> float | None:
        """Tokens per second of a phase, in the median measurement; None where it was not measured on its own."""
        return known_median([of.tokens / of.seconds for of in self._phases(phase) if of.tokens])

    def bubble(self, phase: str, kind: str) -> float | None:
        """Of a phase, `simulated` or `measured`: the median over measurements."""
        values = [getattr(of.bubbles, kind) for of in self._phases(phase) if of.bubbles]
        return known_median([value for value in values if value is not None])

    def _phases(self, phase: str) -> list[PhaseRecord]:
        return [of for record in self.records if (of := getattr(record, phase)) is not None]

    def percentile(self, what: str, share: float) -> float | None:
        """Of all values of `what` in all measurements; None without any."""
        values = [value for record in self.records for value in getattr(record, what)]
        return float(numpy.percentile(values, share)) if values else None


def known_median(values: Sequence[float]) -> float | None:
    """None of none."""
    return median(values) if values else None


def inference_line(record: InferenceRecord) -> dict[str, Any]:
    """One line of metrics.jsonl, and one point of wandb's history."""
    prefill, decode = record.prefill, record.decode
    return {
        "step": record.number,
        "perf/seconds": record.seconds,
        "perf/tokens_per_second": record.tokens / record.seconds,
        "perf/time_to_first_token_seconds": known_median(record.first_token_seconds),
        "perf/inter_token_seconds": known_median(record.inter_token_seconds),
        "perf/prefill_seconds": prefill and prefill.seconds,
        "perf/decode_seconds": decode and decode.seconds,
        "perf/prefill_tokens_per_second": prefill and prefill.tokens / prefill.seconds,
        "perf/decode_tokens_per_second": decode and decode.tokens / decode.seconds,
        "perf/prefill_bubble_fraction": prefill and prefill.bubbles and prefill.bubbles.measured,
        "perf/decode_bubble_fraction": decode and decode.bubbles and decode.bubbles.measured,
        "memory/peak_bytes": record.peak_memory_bytes,
    }


def inference_record_of(line: Mapping[str, Any]) -> InferenceRecord:
    """What a line of metrics.jsonl tells of a measurement: nothing of single requests.

    Raises:
        KeyError, TypeError: it is no such line.
    """

    def phase(name: str) -> PhaseRecord | None:
        seconds, rate = line[f"perf/{name}_seconds"], line[f"perf/{name}_tokens_per_second"]
        measured = line[f"perf/{name}_bubble_fraction"]
        bubbles = None if measured is None else Bubbles(None, measured)
        return None if seconds is None else PhaseRecord(seconds, round(rate * seconds), bubbles)

    seconds = line["perf/seconds"]
    return InferenceRecord(
        number=line["step"],
        seconds=seconds,
        tokens=round(line["perf/tokens_per_second"] * seconds),
        peak_memory_bytes=line["memory/peak_bytes"],
        prefill=phase("prefill"),
        decode=phase("decode"),
    )
