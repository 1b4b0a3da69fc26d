"""The measurement beside known truth: emulated stages in DeepSpeed's real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.known_truth import SLOW_LINK, SLOW_LINK_SECONDS, STAGES, Case, found_seconds, injected_seconds, measure


@pytest.mark.slow
@pytest.mark.parametrize("p", STAGES)
def test_the_measured_bubble_is_the_simulated_and_the_ideal_one(p: int, tmp_path: Path) -> None:
    measured = dict(measure(p, tmp_path))
    for case, answer in measured.items():
        bubble = answer["bubble"]
        real = bubble["measured"]["fraction"]
        assert real == pytest.approx(bubble["simulated"]["fraction"], abs=0.02), case
        assert all(accounting["closes"] for accounting in answer["accounting"]), case
        if case.slow_stage or case.slow_link:
            undisturbed = measured[Case(case.p, case.m)]
            found = found_seconds(case, bubble, undisturbed["bubble"])
            assert found == pytest.approx(injected_seconds(case), rel=0.1), case
        else:
            assert real == pytest.approx(bubble["ideal"]["fraction"], abs=0.03), case
        if case.slow_link:
            slower = answer["link_seconds"][SLOW_LINK] - undisturbed["link_seconds"][SLOW_LINK]
            assert slower == pytest.approx(SLOW_LINK_SECONDS, rel=0.1)
