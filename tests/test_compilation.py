"""Blocks through torch.compile: the same training, compiled once and before the first step, or else without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import make_config

from harness.errors import ConfigError

SLICED = [
    "parallel.tp=2", "parallel.sequence_parallel=true", "model=llama_tiny", "model.num_key_value_heads=1",
    "train.precision=bf16", "train.activation_checkpointing=full",
]  # fmt: skip
SPLIT = ["parallel.pp=2", "parallel.schedule=zb_h1", "train.micro_batch_size=1", "model=gpt2_tiny", "model.dropout=0.2"]
ROWS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"overrides": ["parallel.engine=torch", "model=gpt2_tiny"]},
        {"overrides": ["model=gpt2_tiny"], "without_compiler": [0]},
    ],
    2: [{"overrides": SLICED}, {"overrides": SPLIT}, {"overrides": SLICED, "without_compiler": [1]}],
}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_compiled_computes_the_same_and_no_step_waits(world_size: int, tmp_path: Path) -> None:
    rows = ROWS[world_size]
    answers = run_ranks(world_size, "ranks_compile", rows, tmp_path)
    for row, answer in zip(rows, answers, strict=True):
        assert answer["passed"], row
        assert answer["graphs"] > 0, row
        assert answer["in_steps"] == 0, row
        if "without_compiler" in row:  # its neighbour waits for it in collectives, and computes as it does
            assert answer["outcome"].startswith(f"not on rank{'s 0 and 1' if world_size > 1 else ' 0'}: ")
            assert "No working C++ compiler" in answer["outcome"]
        else:
            assert answer["outcome"] == "yes", row


def test_blocks_that_wait_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.compile=true has nothing to compile in model\.family=emulated"):
        make_config("model=emulated", "model.compile=true")
