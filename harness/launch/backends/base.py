"""What a launch backend is: it starts the ranks of an attempt somewhere, and leaves nothing behind.

Whoever follows an attempt (`harness.launch.attempts`) reads what happened from the attempt's files, which all its
ranks write to; a backend is asked only for what the files don't tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from harness.machine import Machine
from harness.record.diagnose import Death
from harness.record.store import Attempt
from harness.spec.config import RunConfig

WORKER = "harness.run.worker"
"""Module that a rank runs, with the attempt's folder and the task as its arguments."""

GRACE_SECONDS = 2.0
"""For processes to end by themselves when they are told to, before they are made to."""


class Processes(Protocol):
    """The processes of one attempt, from their start to their end."""

    def exit_status(self) -> int | None:
        """That of the whole; None while it runs."""

    def death(self) -> Death | None:
        """The signal that ended one of them, the first as far as is known."""

    def wait_for_ranks(self) -> None:
        """Give the ranks, which have written their result, a moment to end by themselves."""

    def out_of_memory(self) -> bool:
        """Whether a process has been ended for want of memory since the start."""


class Shares(Protocol):
    """What the points of a sweep that run at once get of a machine."""

    count: int
    """How many run at once at most."""

    def take(self, config: RunConfig) -> Machine | None:
        """The machine with what a point gets of it as `visible_devices`; None while that is not free."""

    def give_back(self, share: Machine) -> None:
        """Free what `take` gave."""


class Backend(Protocol):
    """Starts and ends processes in one kind of place. It keeps no state: that is in the attempts' files."""

    def share_out(self, machine: Machine, count: int) -> Shares:
        """Divide a machine among up to `count` points at once."""

    def start(
        self, attempt: Attempt, config: RunConfig, machine: Machine, task: str, stops: Sequence[int]
    ) -> AbstractContextManager[Processes]:
        """Start one process of WORKER for each rank; when the context is left, all have been ended.

        What they print goes to the end of the attempt's log.txt. What finds them again, should this process be killed,
        goes into its status.json.

        Args:
            attempt: with its config.yaml; its folder is the same one for every rank.
            machine: its `visible_devices` are those to use; on CPU, the cores, all when there are none.
            task: one of the worker's TASKS.
            stops: signals to stop that have come so far; of two or more, nobody waits for an orderly end.

        Raises:
            OSError: they can't be started.
        """

    def prefix(self, config: RunConfig) -> Sequence[str]:
        """What stands before `launchers/train.py` in the command that runs a point again."""

    def can_start_again(self, attempt: Attempt, config: RunConfig) -> bool:
        """Whether an attempt crashed of what a second start may not meet, like a port that another program took."""

    def end_leftovers(self, folder: Path) -> None:
        """End what still runs of the attempts in a folder, whose starter is gone."""
