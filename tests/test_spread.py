"""Warm-up and drift of synthetic series, and how seldom noise is taken for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from helpers import MACHINE, make_config, step_records

from harness.record.columns import layout_columns, measured_columns
from harness.record.sources import MeasuredRun
from harness.record.spread import detect_warmup, drift
from harness.record.summary import summary_lines


def series(count: int, seed: int, level: Callable[[float], float] = lambda _: 1.0, noise: float = 0.02) -> list[float]:
    """Noisy step times; every tenth is half as long again, as when another process takes the core."""
    draw = random.Random(seed)
    return [
        level(number / (count - 1)) * draw.gauss(1, noise) * (1.5 if draw.random() < 0.1 else 1)
        for number in range(count)
    ]


class TestDrift:
    def test_of_exact_series(self) -> None:
        assert drift([1.0] * 18) == 0
        assert drift([1.0] * 9 + [1.2] * 9) == pytest.approx(0.2)
        assert drift([2.0] * 10 + [1.0] * 20) == pytest.approx(-0.5)

    def test_is_not_known_of_a_few_steps(self) -> None:
        assert drift([1.0] * 17) is None

    @pytest.mark.parametrize("count", [18, 50, 200])
    def test_noise_is_none(self, count: int) -> None:
        flagged = sum(drift(series(count, seed)) != 0 for seed in range(500))
        assert flagged <= 0.04 * 500

    def test_a_slow_change_is_found_with_its_size(self) -> None:
        found = [drift(series(60, seed, level=lambda x: 1 + 0.15 * x)) or 0.0 for seed in range(100)]
        assert sum(value > 0 for value in found) > 95
        # The middles of the thirds are a sixth and five sixths through: 1.125 / 1.025.
        assert sum(found) / len(found) == pytest.approx(0.0976, abs=0.02)

    def test_one_slow_step_and_odd_ones_are_no_drift(self) -> None:
        assert drift([1.0] * 29 + [30.0]) == 0
        assert drift([1.0, 1.02] * 30) == 0


class TestWarmup:
    @pytest.mark.parametrize("slow", [0, 1, 2, 5])
    def test_counts_slow_steps_at_the_beginning(self, slow: int) -> None:
        found = [detect_warmup([3.0] * slow + series(20, seed)) for seed in range(100)]
        assert sum(number == slow for number in found) >= 85  # else a slow step of the noise follows

    def test_ends_with_the_first_steady_step(self) -> None:
        assert detect_warmup([9.0, 1.0, 9.0, *[1.0] * 9]) == 1
        assert detect_warmup([1.04] * 3 + [1.0] * 9) == 0

    def test_ends_where_the_last_half_is_steady(self) -> None:
        assert detect_warmup([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 7
        assert detect_warmup([2.0] * 9 + [1.0] * 3) == 0  # fewer steady ones than slow ones

    def test_is_not_known_of_a_few_steps(self) -> None:
        assert detect_warmup([9.0, 1.0, 1.0, 1.0, 1.0]) is None


def lines(seconds: list[float], *overrides: str) -> str:
    config = make_config(*overrides)
    row = measured_columns(MeasuredRun(config, step_records(seconds), MACHINE))
    return "\n".join(summary_lines(config, layout_columns(config) | row))


def test_the_user_is_told_when_it_matters() -> None:
    quiet = lines([9.0, 9.0, *[1.0] * 20])
    assert "drift" not in quiet
    assert "warm-up" not in quiet
    told = lines([9.0] * 4 + [1.0] * 9 + [1.1] * 15)
    assert "drift       +10.0% from the first to the last third" in told
    assert "the first 4 steps are slow, and train.warmup_steps=2 of them are left out" in told
