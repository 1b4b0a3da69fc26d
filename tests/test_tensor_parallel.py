"""Layers, blocks, losses and models on real ranks against one rank: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from distributed import run_ranks
from helpers_model import CHECKS, TOLERANCE

WORLD_SIZE = 4
TP_SIZES = (2, 4)

Errors = dict[str, float] | str | None


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str, int], Errors]:
    """Errors by (rank, check, tp) from one launch of four gloo ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD_SIZE, "helpers_model", TP_SIZES, folder)
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
    return lambda rank, check, tp: results[rank].get((check, tp))


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("check", CHECKS)
def test_ranks_compute_what_one_rank_does(errors: Callable[[int, str, int], Errors], check: str, tp: int) -> None:
    for rank in range(WORLD_SIZE):
        found = errors(rank, check, tp)
        assert found is not None, f"rank {rank} did not get here: an earlier check broke"
        assert not isinstance(found, str), f"rank {rank}:\n{found}"
        assert found
        wrong = {what: error for what, error in found.items() if not error <= TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"
