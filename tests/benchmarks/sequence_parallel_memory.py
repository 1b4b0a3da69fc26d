"""What sequence parallelism saves: bytes a transformer block keeps for its backward pass, on one rank.

    python tests/benchmarks/sequence_parallel_memory.py [OVERRIDE ...]

Counted are the tensors that autograd saves on rank 0, beside what `harness.plan.memory` predicts, per token of the
micro-batch. Default: gpt2_small in fp32, one sequence of 128 tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

TP_SIZES = (1, 2, 4)


def main() -> None:
    """Start the ranks of each size and print the table."""
    from benchmarks.circumstances import print_circumstances
    from distributed import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["model=gpt2_small"])
    overrides = parser.parse_args().overrides
    print_circumstances()
    print(f"{'tp':>2}{'whole':>10}{'counted':>10}{'sliced':>10}{'counted':>10}{'sliced / whole':>16}   bytes per token")
    for tp in TP_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            argument = [*overrides, f"parallel.tp={tp}", "launch.max_ranks_per_core=8"]
            (whole, counted), (sliced, counted_sliced) = run_ranks(
                tp, "benchmarks.sequence_parallel_memory", argument, Path(folder)
            )
        print(
            f"{tp:>2}{whole:>10,.0f}{counted:>10,.0f}{sliced:>10,.0f}{counted_sliced:>10,.0f}{sliced / whole:>16.3f}",
            flush=True,
        )


def run(overrides: list[str], folder: Path) -> list[tuple[float, float]]:
    """One rank: a block without and with sequence parallelism, measured and counted."""
    import torch
    from helpers import make_config
    from helpers_model import saved_bytes

    from harness.model.block import TransformerBlock
    from harness.model.groups import build_tensor_parallel
    from harness.plan.memory import block_activation_bytes_per_token
    from harness.run.engines.deepspeed.join import initialize_distributed
    from harness.spec.topology import Topology

    initialize_distributed()
    torch.set_num_threads(1)
    rank, config = int(os.environ["RANK"]), make_config(*overrides)
    model, train, size = config.model, config.train, config.parallel.tp
    tp = build_tensor_parallel(Topology(pp=1, dp=1, tp=size), rank, model.num_key_value_heads)
    answers = []
    for sequence_parallel in (False, True):
        parallel = config.parallel.model_copy(update={"sequence_parallel": sequence_parallel})
        place = replace(tp, sequence_parallel=sequence_parallel and size > 1)
        block = TransformerBlock(model, place, activation_checkpointing=train.activation_checkpointing == "full")
        length = train.sequence_length // (size if sequence_parallel else 1)
        hidden = torch.randn(train.micro_batch_size, length, model.hidden_size, requires_grad=True)
        tokens = train.micro_batch_size * train.sequence_length
        saved = saved_bytes(block, hidden) / tokens
        answers.append((saved, block_activation_bytes_per_token(model, parallel, "fp32")))
    return answers


if __name__ == "__main__":
    main()
