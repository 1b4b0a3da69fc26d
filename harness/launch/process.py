"""One attempt as a process tree: the `deepspeed` launcher, its ranks, and whatever they start.

What happened is read from files, never from an exit status: `deepspeed` ends with 0 when its own child was
killed. A result stands for all ranks: rank 0 writes it after a barrier that each passes with its own files closed.
The tree is ended as a whole, because neither a signal to `deepspeed` nor its end reaches the ranks: a guard
(`harness.launch.guard`) is the ancestor of all of it, and ends it also when this process is killed. Should the
guard itself be killed, its processes are found by a variable in their environment.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.config import REPOSITORY, RunConfig
from harness.machine import Machine, process_started
from harness.record.heartbeat import FOLDER as HEARTBEATS
from harness.record.heartbeat import Heartbeat, describe, read_heartbeats
from harness.record.store import OUT_OF_MEMORY, Attempt, Status, environment, read_json
from harness.secrets import variables

WORKER = "harness.run.worker"
"""Module that a rank runs."""

POLL_SECONDS = 0.05
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

# A rank that lost another: never the cause.
LOST_PEER = re.compile(
    r"closed by (remote )?peer|connection (reset|refused|closed|was closed)|broken pipe|socket closed|remote process"
    r"|timed out waiting|failed to connect|wait timeout|heartbeat|unhandled system error",
    re.IGNORECASE,
)
PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
DEEPSPEED_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[\w+\] ")
ERROR_LINE = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    status: Status
    reason: str | None = None
    """One sentence, for every status but ok."""


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
            if "guard" in (status := earlier.status()) and status["status"] == "interrupted":
                end_marked(earlier.path)
        attempt.write_status("running", environment=environment(machine))
        outcome = _run_once(attempt, config, machine, echo, signals, task)
        if config.launch.master_port is None and outcome.status == "crashed" and _port_was_taken(attempt):
            shutil.rmtree(attempt.error_file(0).parent, ignore_errors=True)
            outcome = _run_once(attempt, config, machine, echo, signals, task)
    attempt.write_status(outcome.status, outcome.reason, **_evidence(attempt, outcome))
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
    oom_kills = _oom_kills()
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
            ended_by_us = _follow(attempt, guard, config, received, tail)
            status = guard.poll()
            errors = _errors(attempt)  # before the rest dies and complains
        finally:
            _end(guard, attempt, received)
            if tail:
                tail.print_new()
    if attempt.result() is not None:
        return Outcome("ok")
    if ended_by_us is not None:
        return ended_by_us
    return _diagnose(errors, status, _oom_kills() > oom_kills, attempt.log_file, config.parallel.world_size)


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
) -> Outcome | None:
    """Wait for the end; the outcome where it is not the ranks' own doing."""
    limits, progress = config.launch, _Progress(attempt)
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
        if time.monotonic() > deadline:
            return None if failed else Outcome("timeout", _timeout_reason(attempt, limits.timeout_seconds))
        if not failed and progress.idle_seconds() > limits.hang_seconds:
            stood = describe(progress.heartbeats)
            return Outcome("hang", f"no progress for launch.hang_seconds={limits.hang_seconds:g}; {stood}"[:1000])
        time.sleep(POLL_SECONDS)
    return None


class _Progress:
    """Watches the heartbeats of an attempt's ranks."""

    def __init__(self, attempt: Attempt) -> None:
        self._folder = attempt.path
        self._looked = self._changed = time.monotonic()
        self.heartbeats: list[Heartbeat] = []

    def idle_seconds(self) -> float:
        """Time since a rank last began or ended an instruction; 0 before any did."""
        now = time.monotonic()
        if now - self._looked > 0.5:
            self._looked, found = now, read_heartbeats(self._folder)
            if found != self.heartbeats:
                self._changed, self.heartbeats = now, found
        return now - self._changed if any(heartbeat.count for heartbeat in self.heartbeats) else 0.0


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


def _evidence(attempt: Attempt, outcome: Outcome) -> dict[str, Any]:
    """What status.json keeps of a failure: where each rank stood, and the end of the log."""
    if outcome.status == "ok":
        return {}
    heartbeats = {str(heartbeat.rank): str(heartbeat) for heartbeat in read_heartbeats(attempt.path)}
    log = _read_end(attempt.log_file).splitlines()[-20:] if attempt.log_file.exists() else []
    return {"ranks_stood": heartbeats, "log_end": log}


def _errors(attempt: Attempt) -> list[dict[str, Any]]:
    """What ranks reported, earliest first."""
    found = [read_json(path) for path in attempt.error_file(0).parent.glob("*.json")]
    return sorted((error for error in found if error), key=lambda error: error.get("time", 0.0))


def _diagnose(
    errors: list[dict[str, Any]], status: int | None, oom_killed: bool, log: Path, world_size: int
) -> Outcome:
    """The first real error; without one the deadly signal, the log's last words or the exit status.

    Args:
        status: exit status of the guard; None when it was still running.
    """
    if real := [error for error in errors if not LOST_PEER.search(str(error.get("message")))]:
        return Outcome("oom" if any(error.get("oom") for error in real) else "crashed", _error_reason(real))
    # The guard passes the death of deepspeed on as 128 + n, deepspeed that of a rank as 256 - n.
    number = -status if status and status < 0 else 0
    if status is not None and status > 128:
        number = status - 128 if status < 192 else 256 - status
    if status is not None and number in set(signal.Signals):
        victim = "the guard" if status < 0 else "the deepspeed launcher" if status < 192 else "a rank"
        silent = sorted(set(range(world_size)) - {error.get("rank") for error in errors})
        if victim == "a rank" and errors and len(silent) == 1:
            victim = f"rank {silent[0]}"
        reason = f"{victim} was ended by {signal.Signals(number).name}"
        if number == signal.SIGKILL and oom_killed:
            return Outcome("oom", f"{reason}: the kernel ran out of memory")
        return Outcome("crashed", reason)
    if errors:
        return Outcome("crashed", _error_reason(errors))
    words = _last_words(log)
    if OUT_OF_MEMORY.search(words):
        return Outcome("oom", words)
    if ERROR_LINE.match(words):
        return Outcome("crashed", words)
    ended = f"deepspeed ended with exit status {status}" if status is not None else "a rank failed"
    return Outcome("crashed", f"{ended} and without a result{f'; the log ends with {words!r}' if words else ''}")


def _error_reason(errors: list[dict[str, Any]]) -> str:
    error = next((error for error in errors if error.get("oom")), errors[0])
    message = next((line.strip() for line in str(error.get("message")).splitlines() if line.strip()), "")
    peak = error.get("peak_memory_bytes") if error.get("oom") else None
    used = f" (its peak so far: {peak / 2**20:,.0f} MiB)" if isinstance(peak, int) else ""
    return f"rank {error.get('rank')}: {error.get('type')}: {message}"[:500] + used


def _last_words(log: Path) -> str:
    """The last error line of a log, or else its last line; DeepSpeed's own lines don't count."""
    lines = [line.strip()[:500] for line in _read_end(log).splitlines()]
    lines = [line for line in lines if line and not DEEPSPEED_LINE.match(line)]
    return next(filter(ERROR_LINE.match, reversed(lines)), lines[-1] if lines else "")


def _timeout_reason(attempt: Attempt, timeout_seconds: float) -> str:
    lines = attempt.metrics_file.read_text().count("\n") if attempt.metrics_file.exists() else 0
    progress = f"{lines} steps were done" if lines else "no step was done"
    return f"no result after launch.timeout_seconds={timeout_seconds:g}; {progress}"


def _port_was_taken(attempt: Attempt) -> bool:
    reports = " ".join(str(error.get("message")) for error in _errors(attempt))
    return PORT_TAKEN.search(reports + _read_end(attempt.log_file)) is not None


def _read_end(path: Path, num_bytes: int = 1 << 16) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read().decode(errors="replace")


def _oom_kills() -> int:
    """Processes that the kernel has ended for want of memory; 0 where it doesn't tell."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(match[1])
    return 0


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
