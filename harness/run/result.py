"""The end of a rank: result.json, what a run measured and what else there is to say about it.

What was measured is written as soon as the last step is done. Whatever can be said besides may fail, or take the
process with it, and is then missing: it costs the measurement nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from harness.analyse.result import Extras, build_result
from harness.corpus import Corpus
from harness.machine import Machine
from harness.model.products import library
from harness.record.columns import measured_columns
from harness.record.heartbeat import Phase
from harness.record.sources import Compiled, MeasuredRun
from harness.record.store import Attempt, write_json
from harness.record.summary import print_summary
from harness.run.instruments.gemm import gemm_flops_per_second
from harness.run.loop import Loop
from harness.spec.config import RunConfig


def write_result(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    device: torch.device,
    loop: Loop,
    corpus: Corpus,
    compiled: Compiled | None,
    phase: Phase,
) -> None:
    """Write result.json, and print the summary for the user; a collective call of all ranks after the last step.

    Rank 0 leaves result.partial.json on the way: whoever started the ranks takes that where they end before the rest.

    Args:
        compiled: on rank 0; None where nothing was to be.
        phase: told what is done next.
    """
    extras = Extras()
    phase("closing its files")
    extras.part("the end of the span files", loop.close)
    dist.barrier(group=loop.group)  # what is written from here on stands for all ranks
    run = MeasuredRun(config, loop.records, machine, compiled=compiled)
    if loop.rank == 0:
        beginning = {"row": measured_columns(run), "missing": ["all but the row: the run was ended"]}
        extras.part("result.partial.json", lambda: write_json(attempt.partial_result_file, beginning))
    phase("measuring matrix products")
    achieved = run.flops_per_second() or 0.0 if loop.rank == 0 else 0.0
    gemm = extras.part(
        "the matrix-product rate", lambda: gemm_flops_per_second(config, machine, device, achieved, loop.group)
    )
    phase("writing the result")
    if loop.rank == 0:
        run, engine = replace(run, gemm_flops_per_second=gemm), loop.engine
        facts = (engine.blocks_per_part, loop.peak_bytes, corpus, engine.optimizer_name, engine.transport, library())
        result = build_result(attempt, run, *facts, extras)
        write_json(attempt.result_file, result)
        attempt.partial_result_file.unlink(missing_ok=True)
        try:
            print_summary(config, result)
        except Exception as error:
            print(f"warning: the summary can't be shown ({type(error).__name__}: {error})", flush=True)
