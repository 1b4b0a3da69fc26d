"""One attempt: start its processes, follow them to the end, and say how it ended.

What happened is read from files, never from an exit status: `deepspeed` ends with 0 when its own child was
killed. A result stands for all ranks: rank 0 writes it after a barrier that each passes with its own files closed,
first what was measured, and then the whole, which is the end of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from harness.launch.backends import backend_of
from harness.launch.backends.base import Backend, Processes
from harness.machine import Machine
from harness.record.diagnose import DEEPSPEED_LINE, Outcome, Remains, judge, read_remains, record
from harness.record.heartbeat import FOLDER as HEARTBEATS
from harness.record.heartbeat import Heartbeat, describe, read_heartbeats
from harness.record.store import Attempt, environment
from harness.spec.config import RunConfig

POLL_SECONDS = 0.05
START_SECONDS = 60.0
"""For the ranks to begin, beside launch.hang_seconds: the imports of whoever starts them leave no heartbeat."""
ERROR_SECONDS = 3.0
"""From the first rank's error to the end of all: for the others to report theirs."""


def run_attempt(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    echo: bool | Echo,
    task: str | None = None,
    received: Sequence[int] | None = None,
) -> Outcome:
    """Start the ranks of a prepared attempt, follow them to the end, and write its status.

    Ctrl-C, SIGTERM and a closed terminal end the tree, a second one at once; the outcome is then `interrupted`. No
    process remains, neither of this attempt nor of an earlier one at the same point.

    Args:
        attempt: with its config.yaml; log.txt gets everything the processes print.
        machine: its `visible_devices` are those to use; on CPU, the cores, all when there are none.
        echo: print what ranks print, too; or something else of what they leave, as they go.
        task: what the worker does, one of its TASKS; None: that of the configuration.
        received: stop signals, where the caller collects them.

    Raises:
        ConfigError: there is no backend of the name in `launch.backend`.
    """
    backend, task = backend_of(config), task or config.task
    with contextlib.nullcontext(received) if received is not None else stop_signals() as signals:
        for earlier in attempt.point.attempts():
            if "environment" in (status := earlier.status()) and status["status"] in ("interrupted", "ok"):
                backend.end_leftovers(earlier.path)
        attempt.write_status("running", environment=environment(machine))
        outcome = _run_once(backend, attempt, config, machine, echo, signals, task)
        if outcome.status == "crashed" and backend.can_start_again(attempt, config):
            shutil.rmtree(attempt.error_file(0).parent, ignore_errors=True)
            outcome = _run_once(backend, attempt, config, machine, echo, signals, task)
    record(attempt, outcome)
    return outcome


class Echo(Protocol):
    """Shows what the ranks of an attempt leave."""

    def print_new(self) -> None:
        """Print what has come since the last call."""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them; ignored ones stay ignored."""
    received: list[int] = []
    saved = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                saved[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def _run_once(
    backend: Backend,
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    echo: bool | Echo,
    received: Sequence[int],
    task: str,
) -> Outcome:
    shutil.rmtree(attempt.path / HEARTBEATS, ignore_errors=True)
    attempt.log_file.touch()
    tail = echo or None if not isinstance(echo, bool) else _Tail(attempt.log_file) if echo else None
    try:
        with backend.start(attempt, config, machine, task, received) as processes:
            watch = _Watch(attempt, config.parallel.world_size)
            ended_by_us = _follow(attempt, processes, config, received, tail, watch)
            # Before the rest dies and complains.
            exit_status, death, remains = processes.exit_status(), processes.death(), watch.remains()
    finally:
        if tail:
            tail.print_new()
    if ended_by_us is not None and not attempt.keep_partial_result():
        return ended_by_us
    oom_killed = processes.out_of_memory()
    return judge(attempt, remains, exit_status=exit_status, death=death, oom_killed=oom_killed, watched=True)


def _follow(
    attempt: Attempt,
    processes: Processes,
    config: RunConfig,
    received: Sequence[int],
    tail: Echo | None,
    watch: _Watch,
) -> Outcome | None:
    """Wait for the end; the outcome where it is not the ranks' own doing."""
    limits = config.launch
    deadline, failed = time.monotonic() + limits.timeout_seconds, False
    while processes.exit_status() is None:
        if received:
            return Outcome("interrupted", f"stopped by {signal.Signals(received[0]).name} before it finished")
        if tail:
            tail.print_new()
        if attempt.result_file.exists():
            processes.wait_for_ranks()
            return None
        if not failed and any(attempt.error_file(0).parent.glob("*.json")):
            failed, deadline = True, min(deadline, time.monotonic() + ERROR_SECONDS)
            watch.remains()  # whoever is gone now was not ended by deepspeed
        if time.monotonic() > deadline:
            return None if failed else Outcome("timeout", _timeout_reason(attempt, limits.timeout_seconds))
        if not failed and watch.idle_seconds() > limits.hang_seconds:
            stood = describe(watch.heartbeats, config.parallel.world_size)
            return Outcome("hang", f"no progress for launch.hang_seconds={limits.hang_seconds:g}; {stood}"[:1000])
        time.sleep(POLL_SECONDS)
    return None


class _Watch:
    """Watches the ranks of an attempt through what they write."""

    def __init__(self, attempt: Attempt, world_size: int) -> None:
        self._attempt, self._world_size = attempt, world_size
        self._looked = self._changed = time.monotonic()
        self._gone_first: list[int] = []
        self.heartbeats: list[Heartbeat] = []

    def idle_seconds(self) -> float:
        """Time since a rank last began or ended something; before the first begins, since all should have."""
        now = time.monotonic()
        if now - self._looked > 0.5:
            self._looked, found = now, read_heartbeats(self._attempt.path)
            if found != self.heartbeats:
                self._changed, self.heartbeats = now, found
            if any(heartbeat.is_gone() for heartbeat in found):
                self.remains()
        return now - self._changed - (0 if self.heartbeats else START_SECONDS)

    def remains(self) -> Remains:
        """What the ranks have left by now; of those that are gone in silence the first, as deepspeed ends the rest."""
        now = read_remains(self._attempt, self._world_size)
        self._gone_first = [rank for rank in self._gone_first if rank in now.gone] or now.gone
        return dataclasses.replace(now, gone=self._gone_first)


def _timeout_reason(attempt: Attempt, timeout_seconds: float) -> str:
    lines = attempt.metrics_file.read_text().count("\n") if attempt.metrics_file.exists() else 0
    progress = f"{lines} steps were done" if lines else "no step was done"
    return f"no result after launch.timeout_seconds={timeout_seconds:g}; {progress}"


class _Tail:
    """Prints what is added to a log, without DeepSpeed's own lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open(encoding="utf-8", errors="replace")
        self._file.seek(0, os.SEEK_END)
        self._rest = ""

    def print_new(self) -> None:
        """Print the lines completed since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            if not DEEPSPEED_LINE.match(line):
                print(line, flush=True)
