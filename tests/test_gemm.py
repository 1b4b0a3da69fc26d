"""The matrix-product rate: ranks that share cores, a rank that can't, and little memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import MACHINE, make_config

SECONDS, LONG_SECONDS, WINDOW_SECONDS = 0.005, 0.3, 0.2


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    argument = {"seconds": SECONDS, "long_seconds": LONG_SECONDS, "window_seconds": WINDOW_SECONDS}
    return run_ranks(2, "ranks_gemm", argument, tmp_path_factory.mktemp("gemm"))


def test_ranks_that_share_a_core_share_its_rate(answer: Any) -> None:
    # 2 n^3 over the seconds of a product: what the only core gives. Two ranks that took turns would each show all
    # of it, twice as much; its window may begin on one while the other still wakes up.
    core = 2 * 256**3 / SECONDS
    assert 0.2 * core < sum(answer["rates"]) < 1.8 * core


def test_a_rank_that_fails_holds_up_no_other(answer: Any) -> None:
    assert answer["problems"] == ["RuntimeError: rank 1: MemoryError: no room for a matrix"] * 2


def test_matrices_take_a_small_part_of_free_memory(answer: Any) -> None:
    assert answer["sizes"] == [256, 512]


def test_a_rate_is_kept_for_what_it_was_measured_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, ranks, cores and points at once, each for itself."""
    from harness.run import gemm

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gemm.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gemm.dist, "broadcast_object_list", lambda *_, **__: None)
    rates = itertools.count(1.0)
    monkeypatch.setattr(gemm, "measure", lambda *_: next(rates))

    def rate(*overrides: str, num_cores: int = 8, achieved: float = 0.0) -> float:
        machine = replace(MACHINE, num_cores=num_cores)
        config = make_config("launch.threads_per_rank=1", *overrides, machine=machine)
        return gemm.gemm_flops_per_second(config, machine, gemm.torch.device("cpu"), achieved)

    slots = "launch.slots=2"
    assert [rate(), rate("parallel.tp=2"), rate(num_cores=4), rate(slots), rate("launch.threads_per_rank=2")] == [
        1.0, 2.0, 3.0, 4.0, 5.0
    ]  # fmt: skip
    assert [rate(), rate("parallel.tp=2"), rate(num_cores=4), rate(slots)] == [1.0, 2.0, 3.0, 4.0]
    assert rate(achieved=1.5) == 6.0  # it was measured on a busy machine


def test_a_window_lasts_and_counts_whole_products() -> None:
    from harness.run.gemm import WINDOW_SECONDS, repeat

    moments = iter(step * 0.4 * WINDOW_SECONDS for step in range(9))
    assert repeat(lambda: None, lambda: next(moments)) == pytest.approx((3, 3 * 0.4 * WINDOW_SECONDS))
    moments = iter([0.0, 2.0])  # a product that outlasts the window
    assert repeat(lambda: None, lambda: next(moments)) == (1, 2.0)
