"""Wrong parts are noticed: each defect that other stacks shipped is put in, and must be reported.

The replacements are made by monkeypatching in the ranks; the product has no hook for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks

import harness.spec.schedules as schedules
from harness.run.parity import compare
from harness.spans.span import StageActivity, measured_bubble

TP2 = ["parallel.tp=2", "train.global_batch_size=4"]
SLICED = [*TP2, "parallel.sequence_parallel=true"]
PP2 = ["parallel.pp=2", "train.global_batch_size=4"]
ZB_H1 = [*PP2, "parallel.schedule=zb_h1"]
CHUNKS = [*PP2, "parallel.schedule=interleaved", "parallel.num_chunks=3", "model.num_hidden_layers=6"]
# defect -> (layout, a comparison that must fail)
EXPECTED = {
    "none": (TP2, None),
    "f_does_not_reduce": (TP2, "AdamW: gradient"),
    "g_does_not_reduce": (TP2, "AdamW: loss"),
    "qkv_sliced_contiguously": (TP2, "AdamW: loss"),
    "row_bias_added_on_every_rank": (TP2, "AdamW: loss"),
    "norm_gradients_not_summed_under_sequence_parallelism": (SLICED, "AdamW: gradient"),
    "sum_of_slices_skips_the_other_ranks": (SLICED, "AdamW: loss"),
    "tied_copies_not_reduced": (PP2, "AdamW: gradient"),
    "gradient_scaled_by_m": (PP2, "AdamW: gradient"),
    "one_gradient_off_by_a_thousandth": (PP2, "AdamW: gradient"),
    "last_micro_batch_left_out": (PP2, "AdamW: gradient"),
    "a_weight_pass_dropped": (ZB_H1, "AdamW: gradient"),
    "a_weight_pass_doubled": (ZB_H1, "AdamW: gradient"),
    "a_chunk_on_the_wrong_stage": (CHUNKS, "AdamW: loss"),
    "a_gradient_received_into_a_live_buffer": (PP2, "AdamW: gradient"),
    "clipping_key_left_out": (PP2, "SGD: update after 3 steps"),
    "clipping_by_one_stage": (PP2, "SGD, clipped: update after 3 steps"),
    "step_taken_twice": (PP2, "SGD: update after 3 steps"),
    "labels_of_the_micro_batch_before": (PP2, "AdamW: loss"),
    "norms_and_biases_decay": (PP2, "AdamW: update after 2 steps"),
    "learning_rate_a_step_late": (PP2, "AdamW: update after 2 steps"),
    "betas_swapped": (PP2, "AdamW: exp_avg after 2 steps"),
    "copies_differ": (TP2, "AdamW: gradient"),
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Failed comparisons of every defect, from one launch."""
    folder: Path = tmp_path_factory.mktemp("defects")
    cases = [[name, overrides, (kind or "").partition(":")[0]] for name, (overrides, kind) in EXPECTED.items()]
    answer: dict[str, list[str]] = run_ranks(2, "ranks_defects", cases, folder)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_parity_check_reports_defect(name: str, reported: dict[str, list[str]]) -> None:
    kind = EXPECTED[name][1]
    if kind is None:
        assert reported[name] == []
    else:
        assert kind in reported[name]


def test_copies_that_differ_are_reported() -> None:
    """`Layout.gather` makes NaN of them."""
    found = compare("weights", {"w @ stage 0": torch.tensor([torch.nan, 1.0])}, {"w": torch.ones(2)}, 1e-5, {"w": 1.0})
    assert found.error != found.error
    assert not found.passed


def test_cancelling_gradients_are_a_scale_and_no_excuse() -> None:
    expected = {"w": torch.tensor([3.0, 4.0])}
    found = compare("gradient", {"w @ stage 0": 1.1 * expected["w"]}, expected, 5e-2, cancelling={"w": 1.6})
    assert found.error == pytest.approx(0.1 / 1.6)
    assert not found.passed
    assert compare("gradient", {"w @ stage 0": 1.1 * expected["w"]}, expected, 5e-2).error == pytest.approx(0.1)


def ideal_pipeline(p: int, m: int) -> list[list[StageActivity]]:
    """Activities of 1F1B with forwards of 1 s and backwards of 2 s, by the closed formula of its makespan."""
    total = (m + p - 1) * 3
    # Stage s starts its first forward s seconds in and ends its last backward 2 s seconds before the end.
    return [[StageActivity(s * 10**9, (total - 2 * s) * 10**9, m, 2 * m)] for s in range(p)]


def bubble_is_ideal() -> bool:
    return all(
        measured_bubble(ideal_pipeline(p, m)).fraction
        == pytest.approx(schedules.ideal_bubble_fraction("1f1b", p, m), abs=1e-12)
        for p in range(1, 9)
        for m in range(1, 17)
    )


def test_bubble_reference_reports_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bubble_is_ideal()
    wrong: dict[str, Any] = {
        "overhead taken for fraction": lambda _, p, m: (p - 1) / m,
        "a stage too many": lambda _, p, m: p / (m + p),
    }
    for formula in wrong.values():
        with monkeypatch.context() as patch:
            patch.setattr(schedules, "ideal_bubble_fraction", formula)
            assert not bubble_is_ideal()
