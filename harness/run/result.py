"""result.json: what a run measured, and what else there is to say about it.

What was measured is written as soon as the last step is done. Whatever can be said besides may fail, or take the
process with it, and is then missing: it costs the measurement nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.analyse.breakdown import breakdown, read_run
from harness.corpus import Corpus
from harness.machine import Machine
from harness.plan.hardware import peak_flops_per_second, unused_peak
from harness.plan.memory import memory_beside_measured
from harness.record.columns import measured_columns
from harness.record.heartbeat import Phase
from harness.record.sources import MeasuredRun, computes, flops_beside_peers
from harness.record.steps import StepRecord, tokens_per_step
from harness.record.store import Attempt, write_json
from harness.record.summary import print_summary
from harness.run.instruments.gemm import gemm_flops_per_second
from harness.run.loop import Loop
from harness.spec.config import RunConfig
from harness.spec.counts import stage_counts, training_flops_per_token

T = TypeVar("T")


class Extras:
    """Parts of a result that may fail: such a part is None, and what it would have been is said with the reason."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        """A sentence for each part that is."""

    def part(self, name: str, make: Callable[[], T]) -> T | None:
        """What `make` returns; None where it raises, for want of memory too."""
        try:
            return make()
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            self.missing.append(f"{name} ({type(error).__name__}: {reason})")
            return None


def write_result(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    device: torch.device,
    loop: Loop,
    corpus: Corpus,
    phase: Phase,
) -> None:
    """Write result.json, and print the summary for the user; a collective call of all ranks after the last step.

    Rank 0 leaves result.partial.json on the way: whoever started the ranks takes that where they end before the rest.

    Args:
        phase: told what is done next.
    """
    extras = Extras()
    phase("closing its files")
    extras.part("the end of the span files", loop.close)
    dist.barrier(group=loop.group)  # what is written from here on stands for all ranks
    if loop.rank == 0:
        row = measured_columns(MeasuredRun(config, loop.records, machine))
        beginning = {"row": row, "missing": ["all but the row: the run was ended"]}
        extras.part("result.partial.json", lambda: write_json(attempt.partial_result_file, beginning))
    phase("measuring matrix products")
    achieved = model_flops_per_second(config, loop.records)
    gemm = extras.part(
        "the matrix-product rate", lambda: gemm_flops_per_second(config, machine, device, achieved, loop.group)
    )
    phase("writing the result")
    if loop.rank == 0:
        result = build_result(attempt, config, machine, loop, corpus, gemm, extras)
        write_json(attempt.result_file, result)
        attempt.partial_result_file.unlink(missing_ok=True)
        try:
            print_summary(config, result)
        except Exception as error:
            print(f"warning: the summary can't be shown ({type(error).__name__}: {error})", flush=True)


def build_result(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    loop: Loop,
    corpus: Corpus,
    gemm: float | None,
    extras: Extras,
) -> dict[str, Any]:
    """Content of result.json, as rank 0 knows it."""
    blocks = loop.engine.blocks_per_stage
    peak = extras.part("the datasheet peak", lambda: peak_flops_per_second(config, machine))
    if unused := extras.part("the peak that was given", lambda: unused_peak(config, machine)):
        extras.missing.append(unused)
    bubbles = [record.bubble for record in loop.records[config.train.warmup_steps :]]
    explained = extras.part("the breakdown of the steps", lambda: breakdown(read_run(attempt, config), bubbles)) or {}
    bubble = explained.get("bubble")
    simulated = bubble["simulated"]["fraction"] if bubble else None
    run = MeasuredRun(config, loop.records, machine, gemm, peak, simulated)
    rate = run.tokens_per_second_per_device
    return {
        "row": measured_columns(run),
        "stages": extras.part("the stages", lambda: describe_stages(config, blocks, loop.records)),
        "gemm_flops_per_second": gemm,
        "peak_flops_per_second": peak,
        "flops_conventions": extras.part("the conventions", lambda: flops_beside_peers(config, rate, peak))
        if computes(config)
        else None,
        "memory": extras.part(
            "the memory of the stages",
            lambda: memory_beside_measured(config, blocks, loop.peak_bytes, machine.device_kind),
        ),
        "peak_memory_bytes": loop.peak_bytes,
        "data": {"source": corpus.description, "num_tokens": corpus.num_tokens, "sha256": corpus.fingerprint},
        "optimizer": loop.engine.optimizer_name,
        **dict.fromkeys(("accounting", "bubble", "lost")),
        **explained,
        "missing": extras.missing,
    }


def describe_stages(config: RunConfig, blocks: Sequence[int], records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """What each stage holds and computes, and its mean seconds per micro-batch."""
    timed = records[config.train.warmup_steps :]
    micro_batches = len(timed) * config.num_micro_batches
    return [
        {
            "stage": stage,
            **asdict(counted),
            "forward_seconds": sum(record.forward_seconds[stage] for record in timed) / micro_batches,
            "backward_seconds": sum(record.backward_seconds[stage] for record in timed) / micro_batches,
        }
        for stage, counted in enumerate(stage_counts(config, blocks))
    ]


def model_flops_per_second(config: RunConfig, records: Sequence[StepRecord]) -> float:
    """Model FLOP/s of one rank in the median timed step; 0 on ranks that keep no records."""
    seconds = [record.step_seconds for record in records[config.train.warmup_steps :]]
    flops = tokens_per_step(config) * training_flops_per_token(config.model, config.train.sequence_length)
    return flops / config.parallel.world_size / median(seconds) if seconds else 0.0
