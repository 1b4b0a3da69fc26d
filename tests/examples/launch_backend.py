"""A launch backend that starts the ranks itself: without `deepspeed`'s launcher, and without a guard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.launch.backends.base import WORKER
from harness.launch.backends.local import Slots, child_environment, reserve_port
from harness.machine import Machine
from harness.record.diagnose import Death
from harness.record.store import Attempt
from harness.spec.config import RunConfig


class Bare:
    """Ranks as plain children of this process."""

    def share_out(self, machine: Machine, count: int) -> Slots:
        return Slots(machine, count)

    @contextmanager
    def start(
        self, attempt: Attempt, config: RunConfig, machine: Machine, task: str, stops: Sequence[int]
    ) -> Iterator[Ranks]:
        size, command = config.parallel.world_size, [sys.executable, "-m", WORKER, str(attempt.path.resolve()), task]
        with reserve_port() as port, attempt.log_file.open("ab") as log:
            shared = child_environment(config, machine) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = [{"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
            ranks = Ranks([subprocess.Popen(command, env=shared | names, stdout=log, stderr=log) for names in own])
            try:
                yield ranks
            finally:
                ranks.end()

    def prefix(self, config: RunConfig) -> list[str]:
        return ["python"]

    def can_start_again(self, attempt: Attempt, config: RunConfig) -> bool:
        return False

    def end_leftovers(self, folder: Path) -> None:
        """Nothing would find them."""


class Ranks:
    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def exit_status(self) -> int | None:
        statuses = [process.poll() for process in self._processes]
        return None if None in statuses else max(abs(status or 0) for status in statuses)

    def death(self) -> Death | None:
        deadly = [-status for process in self._processes if (status := process.poll() or 0) < 0]
        return Death(deadly[0]) if deadly else None

    def wait_for_ranks(self) -> None:
        for process in self._processes:
            process.wait()

    def out_of_memory(self) -> bool:
        return False

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
