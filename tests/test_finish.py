"""Time limits of what finishes a run, by a clock of our own; `test_mirror` and `test_breakdown` have real children."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.analyse import finish
from harness.analyse.finish import PICTURES_SECONDS, Child, Finishing


class Clock:
    """The time, which passes as children are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.killed: list[int] = []
        monkeypatch.setattr(finish, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(finish.os, "killpg", lambda pid, _: self.killed.append(pid))

    def child(self, folder: Path, pid: int, seconds: float) -> Child:
        """A process that ends at so many seconds."""

        def wait(timeout: float | None = None) -> int:
            if timeout is None or pid in self.killed:
                return 0
            if self.now + timeout < seconds:
                self.now += timeout
                raise subprocess.TimeoutExpired("child", timeout)
            self.now = max(self.now, seconds)
            return 0

        path = folder / str(pid)
        path.mkdir()
        return Child(cast(Any, SimpleNamespace(pid=pid, wait=wait)), [path])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_all_mirrors_share_one_limit(clock: Clock, tmp_path: Path) -> None:
    begun = [Finishing(mirror=clock.child(tmp_path, pid, seconds)) for pid, seconds in ((1, 4), (2, 99), (3, 10.5))]
    warnings = finish.finish(begun, wandb_seconds=10)
    assert warnings == ["wandb is not complete (not done in 10 s); report.py --wandb writes what it lacks"] * 2
    assert (clock.now, clock.killed) == (10, [2, 3])


def test_pictures_of_each_run_have_a_limit_of_their_own(clock: Clock, tmp_path: Path) -> None:
    late = PICTURES_SECONDS + 1
    begun = [
        Finishing(pictures=clock.child(tmp_path, pid, seconds)) for pid, seconds in ((1, late), (2, late), (3, 1e9))
    ]
    names = [f"{tmp_path.name}/{pid}: no pictures within {PICTURES_SECONDS:g} s" for pid in (1, 3)]
    assert finish.finish(begun, wandb_seconds=0) == names
    assert (clock.now, clock.killed) == (late + PICTURES_SECONDS, [1, 3])


def test_pictures_are_waited_for_after_mirrors(clock: Clock, tmp_path: Path) -> None:
    begun = [Finishing(clock.child(tmp_path, 1, 99), clock.child(tmp_path, 2, 50))]
    assert len(finish.finish(begun, wandb_seconds=10)) == 1
    assert (clock.now, clock.killed) == (50, [1])


def test_a_late_child_ends_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    grandchild = Path("/proc") / process.stdout.readline().decode().strip()
    assert finish.finish([Finishing(mirror=Child(process, [tmp_path]))], wandb_seconds=0) != []
    deadline = time.monotonic() + 20
    while grandchild.exists() and (grandchild / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
