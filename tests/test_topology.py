"""Ranks and groups are those of DeepSpeed's topology."""

from __future__ import annotations

from itertools import product

import pytest

from harness.spec.topology import Topology

OURS = {"pp": "pipe", "dp": "data", "tp": "model"}


@pytest.mark.parametrize("pp", range(1, 5))
def test_same_as_deepspeed(pp: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    for dp, tp in product(range(1, 5), repeat=2):
        ours, theirs = Topology(pp, dp, tp), PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
        assert ours.world_size == theirs.world_size()
        for rank in range(ours.world_size):
            coordinate = theirs.get_coord(rank)
            assert ours.coordinate(rank) == (coordinate.pipe, coordinate.data, coordinate.model)
            assert ours.rank(*ours.coordinate(rank)) == rank
        for axis, name in OURS.items():
            groups = ours.groups(axis)  # type: ignore[arg-type]
            if getattr(ours, axis) > 1:
                assert sorted(groups) == sorted(theirs.get_axis_comm_lists(name))
            assert sorted(rank for group in groups for rank in group) == list(range(ours.world_size))
            assert groups == sorted(groups)


def test_groups_of_a_small_layout() -> None:
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.coordinate(5) == (1, 0, 1)
    assert topology.rank(pp=1, tp=1) == 5


def test_ranks_by_pipeline_stage_and_replica() -> None:
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.pipelines() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.stages() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert topology.arranged(range(8)) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_tp_subgroups() -> None:
    topology = Topology(pp=1, dp=2, tp=4)
    assert topology.tp_subgroups(2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.tp_subgroups(4) == topology.groups("tp")
    assert topology.tp_subgroups(1) == [[rank] for rank in range(8)]
