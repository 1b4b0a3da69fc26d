"""What ranks tell of where they stand, and how it is read."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from harness.record.heartbeat import DONE, Heart, describe, read_heartbeats


def stands(folder: Path) -> str:
    return str(read_heartbeats(folder)[0])


def test_where_ranks_stand_in_words(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 5):
        Heart(tmp_path, rank)
    Heart(tmp_path, 0).mark(3, 1, 1, b"forward")
    for rank in (1, 2):
        Heart(tmp_path, rank).phase("building the model")
    assert describe(read_heartbeats(tmp_path), 7) == (
        "rank 0 after forward of micro-batch 1, step 3; ranks 1 and 2 in building the model; rank 5 in start; "
        "ranks 3, 4 and 6 yet to begin"
    )


def test_every_mark_is_progress(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0)
    seen = [read_heartbeats(tmp_path)]
    for _ in range(2):
        heart.phase("all_reduce of 1024 bytes along tp")
        seen.append(read_heartbeats(tmp_path))
    assert seen[0] != seen[1] != seen[2]


def test_imports_are_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    heart = Heart(tmp_path, 0)
    heart.beat_with_imports()
    heart.mark(3, 1, 1, b"forward")
    before = read_heartbeats(tmp_path)[0]
    with pytest.raises(ImportError):
        importlib.import_module("no_module_of_that_name")
    after = read_heartbeats(tmp_path)[0]
    assert after.moment_ns > before.moment_ns
    assert str(after) == str(before) == "after forward of micro-batch 1, step 3"


def test_a_name_that_is_too_long_is_cut(tmp_path: Path) -> None:
    Heart(tmp_path, 0).phase("filling " + "x" * 100)
    assert stands(tmp_path) == "in filling " + "x" * 56


def test_a_rank_is_gone_when_its_process_ended_before_its_work(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0)
    file = tmp_path / "heartbeat" / "rank00000"
    assert not read_heartbeats(tmp_path)[0].is_gone()
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"pid_started": ', b'"pid_started": 1'))  # the same number, another process
    assert read_heartbeats(tmp_path)[0].is_gone()
    file.write_bytes(content.replace(b'"host": "', b'"host": "not-'))
    assert not read_heartbeats(tmp_path)[0].is_gone()
    file.write_bytes(content.replace(b'"pid_started": ', b'"pid_started": 1'))
    heart.phase(DONE)
    assert not read_heartbeats(tmp_path)[0].is_gone()


@pytest.mark.parametrize(
    ("device_kind", "begun", "ended"), [("cpu", "in", "after"), ("cuda", "enqueuing", "after enqueuing")]
)
def test_instructions_are_marked(tmp_path: Path, device_kind: str, begun: str, ended: str) -> None:
    """What a GPU was given is not what it has done."""
    from harness.run.instruments.heartbeat import HeartbeatObserver
    from harness.spec.schedules import Instruction

    steps_taken = 0
    observer = HeartbeatObserver(Heart(tmp_path, 0), lambda: steps_taken, device_kind)
    for steps_taken, instruction, where in (
        (0, Instruction("forward", 0), "forward of micro-batch 0, step 1"),
        (0, Instruction("forward", 7), "forward of micro-batch 7, step 1"),
        (1, Instruction("load", 0), "load of micro-batch 0, step 2"),
        (1, Instruction("optimizer"), "optimizer, step 2"),
        (2, Instruction("reduce_loss"), "reduce_loss, step 2"),
    ):
        observer.began(instruction)
        assert stands(tmp_path) == f"{begun} {where}"
        steps_taken += instruction.kind == "optimizer"  # which counts before it has ended
        observer.ended(instruction)
        assert stands(tmp_path) == f"{ended} {where}"
