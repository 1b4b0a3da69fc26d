"""Bandwidths by hand, the fit against known latency and bandwidth, and a benchmark on real ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from distributed import run_ranks
from helpers import MACHINE, compose_raw

from harness.errors import ConfigError
from harness.launch import comm_bench
from harness.plan.communication import AlphaBeta, Measurement, bus_factor, fit_alpha_beta, measured_sizes
from harness.spec.resolve import load_config

SIZES = measured_sizes(1024, 64 * 2**20)


def test_sizes_grow_by_four() -> None:
    assert [2**exponent for exponent in range(10, 27, 2)] == SIZES
    assert measured_sizes(1000, 5000) == [1000, 4000, 5000]


def test_bus_bandwidths_are_those_of_nccl_tests() -> None:
    # 2(n-1)/n, (n-1)/n, (n-1)/n, 1 and 1 of the algorithm bandwidth.
    expected = {"all_reduce": 1.5, "all_gather": 0.75, "reduce_scatter": 0.75, "broadcast": 1, "point_to_point": 1}
    for operation, factor in expected.items():
        assert bus_factor(operation, 4) == factor
    measured = Measurement("tp", 4, "all_reduce", [8000, 16000], [2.0, 4.0])
    assert measured.algorithm_bytes_per_second == [4000, 4000]
    assert measured.bus_bytes_per_second == [6000, 6000]


class TestFit:
    def test_finds_latency_and_bandwidth(self) -> None:
        fitted = fit_alpha_beta(SIZES, [50e-6 + size / 2e9 for size in SIZES])
        assert fitted.alpha_seconds == pytest.approx(50e-6)
        assert fitted.beta_bytes_per_second == pytest.approx(2e9)
        assert fitted.fit_error == pytest.approx(0, abs=1e-9)
        assert fitted.seconds(2e9) == pytest.approx(1.00005)

    def test_noise_costs_no_more_than_its_size(self) -> None:
        draw = random.Random(7)
        times = [(50e-6 + size / 2e9) * draw.uniform(0.9, 1.1) for size in SIZES]
        fitted = fit_alpha_beta(SIZES, times)
        assert fitted.alpha_seconds == pytest.approx(50e-6, rel=0.1)
        assert fitted.beta_bytes_per_second == pytest.approx(2e9, rel=0.1)
        assert 0.02 < fitted.fit_error < 0.1

    def test_small_messages_count_as_much_as_large_ones(self) -> None:
        times = [50e-6 + size / 2e9 for size in SIZES]
        times[-1] *= 1.5  # 17 ms too much, 300 times the latency
        assert fit_alpha_beta(SIZES, times).alpha_seconds == pytest.approx(50e-6, rel=0.1)

    def test_nothing_is_negative(self) -> None:
        assert fit_alpha_beta([1000, 4000], [1e-3, 8e-3]).alpha_seconds == 0
        flat = fit_alpha_beta([1000, 4000], [3e-3, 2e-3])
        assert flat == AlphaBeta(pytest.approx(2.308e-3, rel=1e-3), None, pytest.approx(0.196, rel=1e-2))
        assert flat.seconds(1e9) == flat.alpha_seconds
        json.dumps(flat.beta_bytes_per_second, allow_nan=False)


@pytest.mark.slow
def test_groups_of_a_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = ["comm_bench.min_bytes=1000", "comm_bench.max_bytes=16000", "comm_bench.repeats=2"]
    layouts = ["parallel.tp=2 parallel.pp=2", "parallel.pp=4 train.precision=bf16"]
    collectives = {"all_reduce", "all_gather", "reduce_scatter", "broadcast"}
    results = run_ranks(4, "ranks_comm_bench", [[*small, *layout.split()] for layout in layouts], tmp_path)
    measured = [{(m["axis"], m["num_ranks"], m["operation"]) for m in result["measurements"]} for result in results]
    assert measured == [
        {*(("tp", 2, operation) for operation in collectives), ("pp", 2, "point_to_point")},
        {("pp", 4, "point_to_point")},
    ]
    for measurement in (m for result in results for m in result["measurements"]):
        assert len(measurement["num_bytes"]) == len(measurement["seconds"]) == 3
        assert all(0 < seconds < 5 for seconds in measurement["seconds"])
        assert measurement["alpha_seconds"] >= 0
        assert 0 <= measurement["fit_error"] < 10
    kept = [json.loads(file.read_text()) for file in (tmp_path / "shardwright" / "comm").glob("*.json")]
    assert sorted(map(str, kept)) == sorted(map(str, results))
    assert "parallel.dp=1: nothing to measure" in (tmp_path / "rank0.log").read_text()


@pytest.mark.slow
def test_the_command_measures_a_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = ["parallel.dp=2", "comm_bench.max_bytes=4096", "comm_bench.repeats=1", f"results_dir={tmp_path}"]
    assert comm_bench.main(overrides) == 0
    (attempt,) = tmp_path.glob("comm_bench/points/tp1_pp1_dp2_mbs1_*/attempt-1")
    assert len(json.loads((attempt / "result.json").read_text())["measurements"]) == 4
    assert (attempt / "command.txt").read_text().startswith("python launchers/comm_bench.py parallel.dp=2 ")
    assert "seconds = alpha + bytes / beta" in capsys.readouterr().out


def test_one_rank_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert comm_bench.main([f"results_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "error: one rank has nobody to talk to; use parallel.tp, parallel.pp or parallel.dp above 1\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_single_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"comm_bench\.min_bytes=2048 is not below comm_bench\.max_bytes=2048"):
        load_config(compose_raw("comm_bench.min_bytes=2048", "comm_bench.max_bytes=2048"), MACHINE)
