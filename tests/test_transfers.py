"""What is on one wire does not wait for what has nothing to do with it."""

from __future__ import annotations

from itertools import combinations

import pytest

from harness.run.engines.deepspeed.transfers import TRAINED, tags
from harness.spec.placement import Placement


@pytest.mark.parametrize("is_v", [False, True])
@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_lanes_between_two_stages_differ_in_their_tag(p: int, v: int, is_v: bool) -> None:
    placement = Placement(p, v, is_v)
    found = tags(placement)

    def stages(boundary: int) -> set[int]:
        return {placement.stage_of(boundary), placement.stage_of(boundary + 1)}

    crossed = [boundary for boundary in range(p * v - 1) if len(stages(boundary)) == 2]
    assert {(lane.kind, lane.boundary) for lane in found} == {(kind, b) for kind in TRAINED for b in crossed}
    for one, other in combinations(found, 2):
        assert stages(one.boundary) != stages(other.boundary) or found[one] != found[other]
    if p > 2:  # of two, all boundaries are between the same
        assert {*found.values()} == {*range(2 * v)}
