"""Where the values of columns come from: a run that was measured, and an attempt with what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

from harness.machine import Machine
from harness.record.steps import StepRecord, positions_per_step, tokens_of
from harness.record.store import Attempt, is_stale
from harness.spans.span import Bubble, median_bubble
from harness.spec.config import RunConfig
from harness.spec.counts import flops_conventions, training_flops_per_token


class Compiled(NamedTuple):
    """What `model.compile=true` came to."""

    seconds: float
    """Of the slowest rank, before the first step."""
    outcome: str
    """`yes`, or which ranks compute without, and why."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run, as far as it came: what its steps measured, and what is known beside them.

    Times and rates need a timed step, one after warm-up.
    """

    config: RunConfig
    records: Sequence[StepRecord]
    """All steps in order; the first `train.warmup_steps` are not timed."""
    machine: Machine | None
    gemm_flops_per_second: float | None = None
    """Largest matrix-product rate measured on one device of this machine."""
    peak_flops_per_second: float | None = None
    """Dense datasheet peak of one device; None for an unknown device."""
    bubble_fraction_simulated: float | None = None
    compiled: Compiled | None = None

    @property
    def timed(self) -> Sequence[StepRecord]:
        """The steps after warm-up."""
        return self.records[self.config.train.warmup_steps :]

    @property
    def seconds(self) -> list[float]:
        """Of each timed step."""
        return [record.step_seconds for record in self.timed]

    @property
    def step_seconds(self) -> float:
        """Of the median timed step."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, in the median timed step; padding is none."""
        return self.tokens_per_step / self.step_seconds

    @property
    def tokens_per_step(self) -> float:
        """Mean of the timed steps."""
        return fmean(tokens_of(record, self.config) for record in self.timed)

    @property
    def attended_length(self) -> float:
        """Tokens of the document that a token is in, the mean of all; of a row, where documents are cut."""
        pairs = [record.pairs for record in self.timed if record.pairs is not None]
        return sum(pairs) / (self.tokens_per_step * len(pairs)) if pairs else self.config.train.sequence_length

    @property
    def padding_fraction(self) -> float | None:
        """Share of positions that are padding; None where there can be none."""
        if all(record.tokens is None for record in self.timed):
            return None
        return 1 - self.tokens_per_step / positions_per_step(self.config)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of one device, in the median timed step."""
        return self.tokens_per_second / self.config.parallel.world_size

    def flops_per_second(self, causal: bool = False) -> float | None:
        """Model FLOP/s of one device in the median timed step; None where the model does not compute.

        Args:
            causal: attention counted half.
        """
        if not computes(self.config):
            return None
        counted = [record.causal_flops if causal else record.flops for record in self.timed]
        known = [flops for flops in counted if flops is not None]
        if known:
            return fmean(known) / self.step_seconds / self.config.parallel.world_size
        per_token = training_flops_per_token(self.config.model, self.config.train.sequence_length, causal)
        return self.tokens_per_second_per_device * per_token

    def share_of(self, flops_per_second: float | None) -> float | None:
        """Model FLOP/s of one device over another rate; None where either is not known."""
        flops = self.flops_per_second()
        return flops / flops_per_second if flops and flops_per_second else None

    @property
    def bubble(self) -> Bubble:
        """The median over the timed steps."""
        return median_bubble([record.bubble for record in self.timed])

    @property
    def eval_loss(self) -> float | None:
        """Of the last evaluation; None when there was none."""
        losses = [record.eval_loss for record in self.records if record.eval_loss is not None]
        return losses[-1] if losses else None


@dataclass(frozen=True)
class Tried:
    """An attempt, what became of it, and what its layout's parity check found."""

    attempt: Attempt
    status: Mapping[str, Any]
    """As `Attempt.status` returns it."""
    parity: Mapping[str, Any]
    """Content of parity.json; empty without a check."""
    reference: Mapping[str, Any] | None
    """The environment of now."""
    result: Mapping[str, Any]
    """Content of result.json; empty without."""

    @property
    def is_stale(self) -> bool | None:
        """Whether it was measured in another environment than that of now; None where either is not known."""
        environment = self.status.get("environment")
        return is_stale(environment, self.reference) if environment and self.reference else None

    @property
    def reason(self) -> str | None:
        """What went wrong with it or else with its parity check; None when nothing did."""
        reason: str | None = self.status.get("reason")
        return reason if is_sound(self.parity) else reason or self.parity.get("reason")


def is_sound(parity: Mapping[str, Any]) -> bool:
    """Whether nothing speaks against a layout: it passed its parity check, or none was asked for.

    Args:
        parity: a row, or the content of parity.json.
    """
    return parity.get("parity") in (None, "pass")


def is_oversubscribed(config: RunConfig, machine: Machine) -> bool:
    """Whether ranks x threads exceed the cores, on CPU: then the times compare with nothing but themselves.

    Ranks that wait instead of computing need no core of their own.
    """
    threads = config.parallel.world_size * config.launch.threads_per_rank
    return machine.device_kind == "cpu" and computes(config) and threads > machine.num_cores


def computes(config: RunConfig) -> bool:
    """Whether the model does; an emulated one waits, and what it would compute means nothing."""
    return config.model.architecture.computes


def flops_beside_peers(
    config: RunConfig,
    tokens_per_second_per_device: float,
    peak_flops_per_second: float | None,
    attended_length: float | None = None,
) -> dict[str, dict[str, float | None]]:
    """Convention -> TFLOP/s per device, and its share of the datasheet peak, as that tool's users would quote them."""
    rates = {
        name: tokens_per_second_per_device * per_token
        for name, per_token in flops_conventions(config.model, attended_length or config.train.sequence_length).items()
    }
    return {
        name: {
            "tflops_per_device": rate / 1e12,
            "mfu": rate / peak_flops_per_second if peak_flops_per_second else None,
        }
        for name, rate in rates.items()
    }
