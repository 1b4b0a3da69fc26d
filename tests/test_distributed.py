"""What starts ranks for the tests, and what ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import REPOSITORY, run_ranks, start_ranks
from reaper import marked

LIGHT = {"RANK_IMPORTS": ""}
PROGRAM = """
import os, time

def run(argument, folder):
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}.began").touch()
    if argument == "fail" and rank == 1:
        raise ValueError("broken on purpose")
    if argument in ("fail", "hang"):
        time.sleep(600)
    found = getattr(time, "patched", None)
    time.patched = argument
    return [argument, rank, os.environ["WORLD_SIZE"], found]
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a program in it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_ranks_answer_and_know_nothing_of_each_other(folder: Path) -> None:
    assert run_ranks(2, "program", "a", folder, variables=LIGHT) == ["a", 0, "2", None]
    assert run_ranks(1, "program", "b", folder, variables=LIGHT) == ["b", 0, "1", None]


def test_a_rank_that_fails_ends_the_others_and_is_told(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)\[-9, 1\].*ValueError: broken on purpose"):
        run_ranks(2, "program", "fail", folder, variables=LIGHT)
    assert run_ranks(1, "program", "and on", folder, variables=LIGHT)[0] == "and on"


def test_ranks_are_killed_at_their_time_out(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"\[-9, -9\]"):
        run_ranks(2, "program", "hang", folder, timeout=0.3, variables=LIGHT)


def test_ranks_can_be_killed(folder: Path) -> None:
    ranks = start_ranks(2, "program", "hang", folder, variables=LIGHT)
    wait_for(lambda: len(list(folder.glob("*.began"))) == 2)
    assert not ranks.has_ended()
    ranks.kill()
    assert ranks.wait() == [-9, -9]


KILLED = """
import subprocess, sys
from pathlib import Path
from distributed import run_ranks

def test_of_two_ranks():
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(asleep, start_new_session=True, stdin=subprocess.DEVNULL)
    run_ranks(2, "program", "hang", Path(__file__).parent, variables={"RANK_IMPORTS": ""})
"""


def test_a_killed_pytest_leaves_no_process(folder: Path) -> None:
    (folder / "test_killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "test_killed.py"]
    python_path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    pytest = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": python_path}, stdout=subprocess.DEVNULL
    )
    mark = f"SHARDWRIGHT_PYTEST_{pytest.pid}"
    try:
        wait_for(lambda: len(list(folder.glob("*.began"))) == 2)
        assert len(marked(mark)) == 4  # two ranks, who starts them, and one that sleeps by itself
    finally:
        pytest.kill()
        pytest.wait()
    wait_for(lambda: not marked(mark), seconds=5)
