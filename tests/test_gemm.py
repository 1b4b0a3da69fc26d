"""The matrix-product rate: ranks that share cores, a rank that can't, and little memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from helpers import MACHINE, agree, make_config

SECONDS, LONG_SECONDS, WINDOW_SECONDS = 0.005, 0.7, 0.5


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """What the ranks find, by the number of the try."""
    return cache(lambda _: start(tmp_path_factory.mktemp("gemm")))


@pytest.fixture
def answer(measure: Callable[[int], Any]) -> Any:
    return measure(0)


def start(folder: Path) -> Any:
    argument = {"seconds": SECONDS, "long_seconds": LONG_SECONDS, "window_seconds": WINDOW_SECONDS}
    return run_ranks(2, "ranks_gemm", argument, folder)


def test_ranks_that_share_a_core_share_its_rate(measure: Callable[[int], Any]) -> None:
    agree(lambda number: check_shared(measure(number)))


def check_shared(answer: Any) -> None:
    # 2 n^3 over the seconds of a product: what the only core gives. Two ranks that took turns would each show all
    # of it, twice as much; its window may begin on one while the other still wakes up.
    core = 2 * 256**3 / answer["product_seconds"]
    assert 0.2 * core < sum(answer["rates"]) < 1.4 * core
    assert 0 <= answer["cores"] < 1  # those who wait compute nothing


def test_a_rank_that_fails_holds_up_no_other(answer: Any) -> None:
    assert answer["problems"] == ["RuntimeError: rank 1: MemoryError: no room for a matrix"] * 2


def test_matrices_take_a_small_part_of_free_memory(answer: Any) -> None:
    assert answer["sizes"] == [256, 512]


@pytest.fixture
def rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """The rate that a run uses with an empty cache; each measurement finds one more than that before."""
    from harness.run.instruments import gemm

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gemm.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gemm.dist, "broadcast_object_list", lambda *_, **__: None)
    rates = itertools.count(1.0)

    def run(
        *overrides: str, num_cores: int = 8, achieved: float = 0.0, had: float = 64.0, device: str = "cpu"
    ) -> float:
        monkeypatch.setattr(gemm, "measure", lambda *_: (next(rates), had))
        machine = replace(MACHINE, num_cores=num_cores)
        config = make_config("launch.threads_per_rank=1", *overrides, machine=machine)
        return gemm.gemm_flops_per_second(config, machine, gemm.torch.device(device), achieved)

    return run


def test_a_rate_is_kept_for_what_it_was_measured_under(rate: Callable[..., float]) -> None:
    """Threads, ranks, cores and points at once, each for itself."""
    slots = "launch.slots=2"
    assert [rate(), rate("parallel.tp=2"), rate(num_cores=4), rate(slots), rate("launch.threads_per_rank=2")] == [
        1.0, 2.0, 3.0, 4.0, 5.0
    ]  # fmt: skip
    assert [rate(), rate("parallel.tp=2"), rate(num_cores=4), rate(slots)] == [1.0, 2.0, 3.0, 4.0]
    assert rate(achieved=1.5) == 6.0


def test_each_library_has_its_rate(rate: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.run.instruments import gemm

    found = []
    for name in ("torch", "onednn", "torch", "onednn"):
        monkeypatch.setattr(gemm, "library", lambda name=name: name)
        found.append(rate())
    assert found == [1.0, 2.0, 1.0, 2.0]


def test_measured_is_the_library_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And measuring is no product of the layers."""
    from harness.model import products
    from harness.run.instruments import gemm

    used: list[str] = []
    monkeypatch.setattr(gemm.torch, "mm", lambda *_, **__: used.append("torch"))
    monkeypatch.setattr(gemm, "product_by_onednn", lambda *_: used.append("onednn"))
    products.use_onednn(None)
    for by in ("torch", "onednn"):
        gemm.build_product(256, gemm.torch.float32, gemm.torch.device("cpu"), by)
    assert used == ["torch", "onednn"]
    assert products.library() == "torch"


def test_a_rate_is_not_kept_that_others_took_the_cores_from(rate: Callable[..., float]) -> None:
    """Those of all ranks together: one more program takes half a core or more."""
    assert [rate(had=0.5), rate(had=0.95), rate()] == [1.0, 2.0, 2.0]
    two = "launch.threads_per_rank=2"
    assert [rate(two, had=1.5), rate(two, had=1.95), rate(two)] == [3.0, 4.0, 4.0]
    layout = ["parallel.tp=2", "parallel.pp=2"]
    assert [rate(*layout, num_cores=2, had=cores) for cores in (1.6, 1.95, 2.0)] == [5.0, 6.0, 6.0]  # four share two
    assert [rate(*layout, two, had=cores) for cores in (7.5, 7.85, 8.0)] == [7.0, 8.0, 8.0]
    slots = ["launch.slots=2", "parallel.tp=2"]  # each point sees its own two cores
    assert [rate(*slots, num_cores=2, had=cores) for cores in (1.5, 1.95, 2.0)] == [9.0, 10.0, 10.0]
    assert [rate(num_cores=3, device="cuda", had=0.1) for _ in range(2)] == [11.0, 11.0]  # the host only waits


def test_cores_that_others_took_beyond_the_best_size_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger matrices might have been faster; small ones keep few threads busy."""
    from harness.run.instruments import gemm

    cores = {256: 1.0, 512: 2.0, 1024: 1.5, 2048: 1.9}
    flops = {256: 1e9, 512: 3e9, 1024: 2e9, 2048: 2e9}
    monkeypatch.setattr(gemm, "SIZES", tuple(cores))
    monkeypatch.setattr(gemm, "WINDOW_SECONDS", 1000.0)
    monkeypatch.setattr(gemm, "agreed", lambda act, group: [act()])
    monkeypatch.setattr(gemm, "free_bytes", lambda device: 2**40)
    monkeypatch.setattr(gemm, "_products_per_second", lambda size, *_: (flops[size] / (2 * size**3), cores[size]))
    assert gemm.measure(gemm.torch.float32, gemm.torch.device("cpu")) == (pytest.approx(3e9), 1.5)


def test_a_window_lasts_and_counts_whole_products() -> None:
    from harness.run.instruments.gemm import WINDOW_SECONDS, repeat

    moments = iter(step * 0.4 * WINDOW_SECONDS for step in range(9))
    assert repeat(lambda: None, lambda: next(moments))[:2] == pytest.approx((3, 3 * 0.4 * WINDOW_SECONDS))
    moments = iter([0.0, 2.0])  # a product that outlasts the window
    assert repeat(lambda: None, lambda: next(moments))[:2] == (1, 2.0)


def test_a_window_knows_the_cores_it_had() -> None:
    from harness.run.instruments.gemm import repeat

    def compute() -> None:
        until = time.thread_time() + 0.03
        while time.thread_time() < until:
            pass

    def two_threads() -> None:
        threads = [threading.Thread(target=compute) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    window = repeat(two_threads)
    assert window.cpu_seconds >= 0.06 * window.products
    assert repeat(lambda: time.sleep(0.02)).cpu_seconds < 0.05
