"""Nothing that comes after the measurement can lose it, and nothing beside the steps gets into it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from distributed import run_ranks
from helpers import agree

from harness.model.products import HAS_ONEDNN

SHORT = ["parallel.pp=2", "data=synthetic", "train.sequence_length=32"]
EMULATED = ["parallel.pp=2", "data=synthetic", "model=emulated", "model.num_hidden_layers=2"]
EMULATED += ["train.sequence_length=16", "train.global_batch_size=2", "train.micro_batch_size=1"]
pytestmark = pytest.mark.slow

RUNS = {
    "broken": [*SHORT, "train.steps=3"],
    "diverged": [*SHORT, "train.steps=4", "model.onednn=true", "train.eval_interval=2", "train.eval_samples=2",
                 "train.optimizer=sgd", "train.learning_rate=1e30", "train.learning_rate_warmup_steps=0",
                 "train.gradient_clipping=0"],
    "slow": [*EMULATED, "train.steps=6", "model.forward_seconds=0.005", "model.backward_seconds=0.01"],
    "drifting": [*EMULATED, "train.steps=14", "model.forward_seconds=0.04", "model.backward_seconds=0.08"],
}  # fmt: skip
SLOW_SECONDS = 0.25


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start(tmp_path_factory.mktemp("result"), *RUNS)


def start(folder: Path, *names: str) -> Any:
    """The runs of these names."""
    argument = {"runs": {name: RUNS[name] for name in names}, "slow_seconds": SLOW_SECONDS, "drift": 0.05}
    return run_ranks(2, "ranks_result", argument, folder)


def test_what_fails_besides_the_measurement_is_said_and_costs_nothing(answer: Any) -> None:
    result = answer["broken"]["result"]
    assert result["row"]["step_seconds"] == median(
        [line["perf/step_seconds"] for line in answer["broken"]["lines"][2:]]
    )
    assert result["row"]["tokens_per_second"] > 0
    missing = ("accounting", "bubble", "stages", "memory", "flops_conventions", "gemm_flops_per_second")
    assert [result[key] for key in (*missing, "peak_flops_per_second")] == [None] * 7
    assert result["missing"] == [
        "the end of the span files (OSError: [Errno 28] No space left on device)",
        "the matrix-product rate (RuntimeError: rank 1: MemoryError: nothing left)",
        "the datasheet peak (MemoryError: nothing left)",
        "the breakdown of the steps (MemoryError: nothing left)",
        "the stages (MemoryError: nothing left)",
        "the conventions (MemoryError: nothing left)",
        "the memory of the stages (MemoryError: nothing left)",
    ]
    assert "result.partial.json" not in answer["broken"]["files"]


def test_a_run_that_diverges_without_a_cache_folder_is_measured(answer: Any) -> None:
    result, lines = answer["diverged"]["result"], answer["diverged"]["lines"]
    text = json.dumps([result, lines])
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert result["missing"] == []
    assert result["row"]["last_loss"] in ("NaN", "Infinity")
    assert result["row"]["eval_perplexity"] in ("NaN", "Infinity")
    assert result["row"]["step_seconds"] > 0
    assert result["row"]["gemm_utilization"] > 0  # measured, though it could not be kept


def test_every_ranks_memory_and_the_data_are_recorded(answer: Any) -> None:
    result = answer["diverged"]["result"]
    peaks = result["peak_memory_bytes"]
    assert all(2**26 < peak < 2**30 for peak in peaks)  # without the 2**30 bytes that were used before
    assert max(peaks) == result["row"]["peak_memory_bytes"]
    assert result["data"]["source"] == "random tokens below 256"
    assert len(result["data"]["sha256"]) == 64


def test_who_computed_the_products_of_the_layers_is_recorded(answer: Any) -> None:
    """Not who computed those of the matrix-product rate, which is measured after that."""
    assert HAS_ONEDNN
    assert answer["diverged"]["result"]["matrix_products"] == "onednn"
    assert answer["slow"]["result"]["matrix_products"] == "torch"  # all are small


def test_a_peak_never_falls(answer: Any) -> None:
    """Linux counts resident pages approximately, and its peak (VmHWM) may be lower than it was a step before."""
    result, lines = answer["slow"]["result"], answer["slow"]["lines"]
    assert result["peak_memory_bytes"] == [2**30, 2**30]
    assert result["row"]["peak_memory_bytes"] == 2**30
    assert [line["memory/peak_bytes"] for line in lines] == [2**30] * len(lines)


def test_what_rank_0_does_between_steps_is_in_no_step(answer: Any) -> None:
    seconds = [line["perf/step_seconds"] for line in answer["slow"]["lines"]]
    # Three slots of 15 ms are a step; whatever else the machine does only adds to it. With rank 0's writing of the
    # step before, every step but the first took SLOW_SECONDS and more.
    assert 0.045 < min(seconds[1:]) < SLOW_SECONDS


def test_a_drifting_clock_bends_no_bubble(answer: Any, tmp_path: Path) -> None:
    agree(lambda number: check_drifting((start(tmp_path, "drifting") if number else answer)["drifting"]))


def check_drifting(answer: Any) -> None:
    # Equal stages that wait: (p-1)/(m+p-1) = 1/3, and some of 360 ms for instructions and transfers. By the last
    # steps the clock has gained 5 % of more than 4 s, half a step.
    fractions = [line["perf/bubble_fraction"] for line in answer["lines"]]
    assert median(fractions[-5:]) == pytest.approx(1 / 3, abs=0.06)
    assert answer["result"]["row"]["bubble_fraction_measured"] == pytest.approx(1 / 3, abs=0.06)
