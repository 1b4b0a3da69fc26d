"""Groups that share memory compute what gloo computes, fall back to it, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks, start_ranks

from harness.record.diagnose import LOST_PEER
from harness.record.store import read_json


def check(name: str, world_size: int, folder: Path, **arguments: Any) -> Any:
    return run_ranks(world_size, "ranks_shared_memory", {"check": name, "with": arguments}, folder, timeout=120)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_collectives_are_those_of_gloo_in_any_order_and_size(world_size: int, tmp_path: Path) -> None:
    assert check("collectives", world_size, tmp_path, seed=world_size, count=80) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_round_alike_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    for error in check("rounding", world_size, tmp_path):  # each addition rounds by half a unit of what it has
        assert error <= world_size - 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_come_in_their_order_whatever_their_number_and_size(world_size: int, tmp_path: Path) -> None:
    assert check("messages", world_size, tmp_path, seed=1) == []


def test_where_memory_can_not_be_shared_gloo_is_used_and_the_reason_is_known(tmp_path: Path) -> None:
    assert check("fallbacks", 2, tmp_path) == [
        ["gloo: its ranks are on 2 hosts", "True", "shared memory"],
        ["gloo: memory of another process can't be opened: No such file or directory", "True", "shared memory"],
        ["gloo: its ranks don't see each other's processes", "True", "shared memory"],
        ["gloo: there is no memory to share: [Errno 28] No space left on device", "True", "shared memory"],
        ["gloo: stores of aarch64 may overtake each other", "True", "shared memory"],
        ["gloo", "True", "gloo"],
    ]


def test_groups_leave_nothing_behind(tmp_path: Path) -> None:
    descriptors, names = check("leftovers", 2, tmp_path)
    assert (descriptors <= 3, names) == (True, 0)


def test_ranks_that_do_not_do_the_same_are_told(tmp_path: Path) -> None:
    assert check("refusals", 2, tmp_path) == [
        "rank 1 of a group says 16 bytes where others say 12",
        "rank 1 of a group sends 12 bytes where rank 0 expects 16",
        "a message can't be received from any rank through shared memory; name its sender",
    ]


@pytest.mark.parametrize(
    ("during", "victim", "waiting"),
    [("collective", 0, 1), ("collective", 1, 0), ("message", 0, 1), ("message", 1, 0), ("collective", 2, 1)],
)
def test_who_waits_for_a_killed_rank_is_told_within_a_second(
    during: str, victim: int, waiting: int, tmp_path: Path
) -> None:
    """Rank 0 keeps what ranks tell each other of where their memory is."""
    before = set(Path("/dev/shm").iterdir())
    argument = {"check": "a_rank_dies", "with": {"during": during, "victim": victim, "waiting": waiting}}
    size = max(victim, waiting) + 1
    statuses = start_ranks(size, "ranks_shared_memory", argument, tmp_path, timeout=120).wait()
    assert statuses == [-9 if rank == victim else 0 for rank in range(size)]
    answer = read_json(tmp_path / "said.json")
    assert answer is not None
    assert answer["seconds"] < 1
    assert LOST_PEER.search(answer["error"])
    if during == "collective":
        assert answer["error"].endswith(f"the process of rank {victim} has ended")
    assert set(Path("/dev/shm").iterdir()) <= before
