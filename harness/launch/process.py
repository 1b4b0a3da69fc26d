"""One attempt as a process tree: the `deepspeed` launcher, its ranks, and whatever they start.

What happened is read from files, never from an exit status: `deepspeed` ends with 0 when its own child was
killed. A result stands for all ranks: rank 0 writes it after a barrier that each passes with its own files closed,
first what was measured, and then the whole, which is the end of the run.
The tree is ended as a whole, because neither a signal to `deepspeed` nor its end reaches the ranks: a guard
(`harness.launch.guard`) is the ancestor of all of it, and ends it also when this process is killed. Should the
guard itself be killed, its processes are found by a variable in their environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from harness.machine import Machine, process_started
from harness.record.diagnose import (
    DEEPSPEED_LINE,
    Outcome,
    Remains,
    count_oom_kills,
    judge,
    read_end,
    read_remains,
    record,
)
from harness.record.heartbeat import FOLDER as HEARTBEATS
from harness.record.heartbeat import Heartbeat, describe, read_heartbeats
from harness.record.store import Attempt, environment
from harness.secrets import variables
from harness.spec.config import REPOSITORY, RunConfig

WORKER = "harness.run.worker"
"""Module that a rank runs."""

POLL_SECONDS = 0.05
START_SECONDS = 60.0
"""For `deepspeed` to start the ranks, beside launch.hang_seconds: its imports leave no heartbeat."""
FAREWELL_SECONDS = 1.0
"""For ranks to end by themselves once there is a result."""
ERROR_SECONDS = 3.0
"""From the first rank's error to the end of all: for the others to report theirs."""
GRACE_SECONDS = 2.0
"""From SIGTERM to SIGKILL."""
PORTS = range(20000, 32768)
"""Below those that the kernel gives to whoever connects."""

GUARD = Path(__file__).with_name("guard.py")
MARK = "SHARDWRIGHT_ATTEMPT"
"""Environment variable of every process of an attempt: its folder."""

# What would make a rank believe it belongs to another job, or hide devices.
INHERITED = re.compile(
    r"(RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES|(LOCAL|MASTER|CROSS|GROUP|ROLE|TORCHELASTIC|OMPI|PMI)_\w+)$"
)

PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def run_attempt(
    attempt: Attempt,
    config: RunConfig,
    machine: Machine,
    echo: bool,
    task: str = "train",
    received: Sequence[int] | None = None,
) -> Outcome:
    """Start the ranks of a prepared attempt, follow them to the end, and write its status.

    Ctrl-C, SIGTERM and a closed terminal end the tree, a second one at once; the outcome is then `interrupted`. No
    process remains, neither of this attempt nor of an earlier one at the same point.

    Args:
        attempt: with its config.yaml; log.txt gets everything the processes print.
        machine: its `visible_devices` are those to use; on CPU, the cores, all when there are none.
        echo: print what ranks print, too.
        task: what the worker does, one of its TASKS.
        received: stop signals, where the caller collects them.
    """
    with contextlib.nullcontext(received) if received is not None else stop_signals() as signals:
        for earlier in attempt.point.attempts():
            if "guard" in (status := earlier.status()) and status["status"] in ("interrupted", "ok"):
                end_marked(earlier.path)
        attempt.write_status("running", environment=environment(machine))
        outcome = _run_once(attempt, config, machine, echo, signals, task)
        if config.launch.master_port is None and outcome.status == "crashed" and _port_was_taken(attempt):
            shutil.rmtree(attempt.error_file(0).parent, ignore_errors=True)
            outcome = _run_once(attempt, config, machine, echo, signals, task)
    record(attempt, outcome)
    return outcome


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


def command(attempt: Attempt, config: RunConfig, machine: Machine, port: int, task: str = "train") -> list[str]:
    """The `deepspeed` command that runs an attempt on this machine."""
    world_size = config.parallel.world_size
    if machine.device_kind == "cuda":
        devices = ",".join(str(device) for device in machine.visible_devices[:world_size])
        slots = ["--include", f"localhost:{devices}"]
    else:
        slots = ["--num_gpus", str(world_size)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--log_level", "error"]
    worker = ["--no_local_rank", "--module", WORKER, str(attempt.path.resolve()), task]
    return [*launcher, *slots, "--master_port", str(port), *worker]


def child_environment(config: RunConfig, machine: Machine) -> dict[str, str]:
    """This process's environment without another job's ranks, and with what the ranks need."""
    named = variables(config.deepspeed)
    inherited = {name: value for name, value in os.environ.items() if name in named or not INHERITED.match(name)}
    python_path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return inherited | {
        "DS_ACCELERATOR": machine.device_kind,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order of nvidia-smi
        "OMP_NUM_THREADS": str(config.launch.threads_per_rank),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),  # ninja
        "PYTHONPATH": os.pathsep.join(python_path),
        "PYTHONSAFEPATH": "1",  # modules in the user's working directory don't shadow ours
    }


def end_marked(folder: Path, grace_seconds: float = GRACE_SECONDS) -> None:
    """End what still runs of the attempts in a folder on this host, guards included: SIGTERM, then SIGKILL.

    For processes that lost their guard, or whose guard has not ended them yet. Gives up ten seconds after SIGKILL on
    those that hang in the kernel.
    """
    began, warned = time.monotonic(), set[psutil.Process]()
    while (alive := _marked(folder)) and (elapsed := time.monotonic() - began) < grace_seconds + 10:
        for process in alive if elapsed >= grace_seconds else alive - warned:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL if elapsed >= grace_seconds else signal.SIGTERM)
        warned |= alive
        time.sleep(POLL_SECONDS)


def _marked(folder: Path) -> set[psutil.Process]:
    beginning, found = f"{folder.resolve()}{os.sep}", set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "") + os.sep
            if mark.startswith(beginning) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


@contextlib.contextmanager
def reserve_port(fixed: int | None = None) -> Iterator[int]:
    """A port that is free, and that nobody else who asks here gets meanwhile.

    A name in the abstract socket namespace, which has the scope of ports and ends with its owner, stands for each.
    """
    for port in [fixed] if fixed else random.sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_UNIX) as reservation, socket.socket() as probe:
            if fixed is None:
                try:
                    reservation.bind(f"\0shardwright-port-{port}")
                    probe.bind(("", port))
                except OSError:
                    continue
            probe.close()
            yield port
            return
    raise OSError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")


def _run_once(
    attempt: Attempt, config: RunConfig, machine: Machine, echo: bool, received: Sequence[int], task: str
) -> Outcome:
    shutil.rmtree(attempt.path / HEARTBEATS, ignore_errors=True)
    oom_kills = count_oom_kills()
    cores = ",".join(map(str, machine.visible_devices)) if machine.device_kind == "cpu" else ""
    limits = [str(GRACE_SECONDS), str(config.launch.memory_limit_bytes or ""), cores]
    with reserve_port(config.launch.master_port) as port:
        with attempt.log_file.open("ab") as log:
            tail = _Tail(attempt.log_file) if echo else None
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", GUARD, *limits, *command(attempt, config, machine, port, task)],
                env=child_environment(config, machine) | {MARK: str(attempt.path.resolve())},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            attempt.write_status("running", guard={"pid": guard.pid, "started": process_started(guard.pid)})
            watch = _Watch(attempt, config.parallel.world_size)
            ended_by_us = _follow(attempt, guard, config, received, tail, watch)
            exit_status, remains = guard.poll(), watch.remains()  # before the rest dies and complains
        finally:
            _end(guard, attempt, received)
            if tail:
                tail.print_new()
    if ended_by_us is not None and not attempt.keep_partial_result():
        return ended_by_us
    return judge(attempt, remains, exit_status=exit_status, oom_killed=count_oom_kills() > oom_kills)


def _end(guard: subprocess.Popen[bytes], attempt: Attempt, received: Sequence[int]) -> None:
    """End an attempt's processes through their guard, or without it where it was killed."""
    assert guard.stdin is not None
    grace = 0.0 if attempt.result_file.exists() else GRACE_SECONDS
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(str(grace).encode())
        guard.stdin.close()
    deadline = time.monotonic() + grace + 15
    while guard.poll() is None and time.monotonic() < deadline:
        if len(received) > 1:  # the impatient ask twice
            break
        time.sleep(POLL_SECONDS / 5)
    if guard.poll() is None or guard.returncode < 0:
        end_marked(attempt.path, grace_seconds=0.0)
    guard.wait(timeout=30)


def _follow(
    attempt: Attempt,
    guard: subprocess.Popen[bytes],
    config: RunConfig,
    received: Sequence[int],
    tail: _Tail | None,
    watch: _Watch,
) -> Outcome | None:
    """Wait for the end; the outcome where it is not the ranks' own doing."""
    limits = config.launch
    deadline, failed = time.monotonic() + limits.timeout_seconds, False
    while guard.poll() is None:
        if received:
            return Outcome("interrupted", f"stopped by {signal.Signals(received[0]).name} before it finished")
        if tail:
            tail.print_new()
        if attempt.result_file.exists():
            _wait_for_ranks(guard.pid)
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


def _wait_for_ranks(guard: int) -> None:
    """Ranks are the children of the child of `deepspeed`; it would take seconds to notice their end."""
    with contextlib.suppress(psutil.Error):
        runners = psutil.Process(guard).children()
        ranks = [rank for runner in runners for node in runner.children() for rank in node.children()]
        deadline = time.monotonic() + FAREWELL_SECONDS
        while any(map(_is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _timeout_reason(attempt: Attempt, timeout_seconds: float) -> str:
    lines = attempt.metrics_file.read_text().count("\n") if attempt.metrics_file.exists() else 0
    progress = f"{lines} steps were done" if lines else "no step was done"
    return f"no result after launch.timeout_seconds={timeout_seconds:g}; {progress}"


def _port_was_taken(attempt: Attempt) -> bool:
    reports = " ".join(str(error.get("message")) for error in read_remains(attempt, 0).errors)
    return PORT_TAKEN.search(reports + read_end(attempt.log_file)) is not None


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
