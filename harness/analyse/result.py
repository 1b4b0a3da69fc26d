"""Content of result.json: what a run measured, beside what was predicted of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from harness.analyse.breakdown import breakdown, read_run
from harness.corpus import Corpus
from harness.plan.hardware import peak_flops_per_second, unused_peak
from harness.plan.memory import memory_beside_measured
from harness.record.columns import measured_columns
from harness.record.sources import MeasuredRun, computes, flops_beside_peers
from harness.record.store import Attempt
from harness.spec.counts import stage_counts

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


def build_result(
    attempt: Attempt,
    run: MeasuredRun,
    blocks_per_part: Sequence[int],
    peak_memory_bytes: Sequence[int],
    corpus: Corpus,
    optimizer: str,
    transport: str,
    matrix_products: str,
    extras: Extras,
) -> dict[str, Any]:
    """What is written, as rank 0 knows it.

    Args:
        run: as the ranks measured it; what its files and the datasheets say is added here.
        peak_memory_bytes: by rank.
        optimizer: class of what takes the steps.
        transport: what carries messages between ranks; empty for one.
        matrix_products: what computed them.
        extras: notes what can't be found out.
    """
    config, machine = run.config, run.machine
    assert machine is not None
    peak = extras.part("the datasheet peak", lambda: peak_flops_per_second(config, machine))
    if unused := extras.part("the peak that was given", lambda: unused_peak(config, machine)):
        extras.missing.append(unused)
    bubbles = [record.bubble for record in run.timed]
    explained = extras.part("the breakdown of the steps", lambda: breakdown(read_run(attempt, config), bubbles)) or {}
    bubble = explained.get("bubble")
    simulated = bubble["simulated"]["fraction"] if bubble else None
    run = replace(run, peak_flops_per_second=peak, bubble_fraction_simulated=simulated)
    rate = run.tokens_per_second_per_device
    return {
        "row": measured_columns(run),
        "stages": extras.part("the stages", lambda: describe_stages(run, blocks_per_part)),
        "gemm_flops_per_second": run.gemm_flops_per_second,
        "peak_flops_per_second": peak,
        "flops_conventions": extras.part(
            "the conventions", lambda: flops_beside_peers(config, rate, peak, run.attended_length)
        )
        if computes(config)
        else None,
        "memory": extras.part(
            "the memory of the stages",
            lambda: memory_beside_measured(config, blocks_per_part, peak_memory_bytes, machine.device_kind),
        ),
        "peak_memory_bytes": list(peak_memory_bytes),
        "data": {"source": corpus.description, "num_tokens": corpus.num_tokens, "sha256": corpus.fingerprint},
        "optimizer": optimizer,
        "transport": transport or None,
        "matrix_products": matrix_products,
        "compiled": run.compiled.outcome if run.compiled else "no",
        **dict.fromkeys(("accounting", "bubble", "lost")),
        **explained,
        "missing": extras.missing,
    }


def describe_stages(run: MeasuredRun, blocks_per_part: Sequence[int]) -> list[dict[str, Any]]:
    """What each stage holds and computes, and its mean seconds per micro-batch."""
    micro_batches = len(run.timed) * run.config.num_micro_batches
    return [
        {
            "stage": stage,
            **asdict(counted),
            "forward_seconds": sum(record.forward_seconds[stage] for record in run.timed) / micro_batches,
            "backward_seconds": sum(record.backward_seconds[stage] for record in run.timed) / micro_batches,
        }
        for stage, counted in enumerate(stage_counts(run.config, blocks_per_part))
    ]
