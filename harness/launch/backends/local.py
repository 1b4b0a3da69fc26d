"""This host: an attempt is one tree of processes, `deepspeed`'s launcher, its ranks, and whatever they start.

All that holds on one host only is here: a free port is free for every rank, processes have numbers and environments
that can be read, devices and cores are numbered, and the kernel counts whom it ended for want of memory.

The tree is ended as a whole, because neither a signal to `deepspeed` nor its end reaches the ranks: a guard
(`harness.launch.backends.guard`) is the ancestor of all of it, and ends it also when this process is killed. Should
the guard itself be killed, its processes are found by a variable in their environment.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from harness.launch.backends.base import GRACE_SECONDS, WORKER
from harness.machine import Machine, process_started
from harness.record.diagnose import Death, count_oom_kills, read_end, read_remains
from harness.record.store import Attempt
from harness.secrets import variables
from harness.spec.config import REPOSITORY, RunConfig

POLL_SECONDS = 0.05
FAREWELL_SECONDS = 1.0
"""For ranks to end by themselves once there is a result."""
PORTS = range(20000, 32768)
"""Below those that the kernel gives to whoever connects."""
PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)

GUARD = Path(__file__).with_name("guard.py")
MARK = "SHARDWRIGHT_ATTEMPT"
"""Environment variable of every process of an attempt: its folder."""

# What would make a rank believe it belongs to another job, or hide devices.
INHERITED = re.compile(
    r"(RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES|(LOCAL|MASTER|CROSS|GROUP|ROLE|TORCHELASTIC|OMPI|PMI)_\w+)$"
)


class Local:
    """Backend that runs `deepspeed` on this host, under a guard."""

    def share_out(self, machine: Machine, count: int) -> Slots:
        """Divide this host's devices, or cores on CPU."""
        return Slots(machine, count)

    @contextlib.contextmanager
    def start(
        self, attempt: Attempt, config: RunConfig, machine: Machine, task: str, stops: Sequence[int]
    ) -> Iterator[Tree]:
        """As `Backend.start`."""
        oom_kills = count_oom_kills()
        cores = ",".join(map(str, machine.visible_devices)) if machine.device_kind == "cpu" else ""
        limits = [str(GRACE_SECONDS), str(config.launch.memory_limit_bytes or ""), cores]
        with reserve_port(config.launch.master_port) as port:
            with attempt.log_file.open("ab") as log:
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
                yield Tree(guard, oom_kills)
            finally:
                _end(guard, attempt, stops)

    def prefix(self, config: RunConfig) -> Sequence[str]:
        """The user's own `deepspeed`, which every rank of this host can be started with."""
        return ["deepspeed", "--num_gpus", str(config.parallel.world_size)]

    def can_start_again(self, attempt: Attempt, config: RunConfig) -> bool:
        """Whether somebody who does not ask `reserve_port` was the first to take its port."""
        if config.launch.master_port is not None:
            return False
        reports = " ".join(str(error.get("message")) for error in read_remains(attempt, 0).errors)
        return PORT_TAKEN.search(reports + read_end(attempt.log_file)) is not None

    def end_leftovers(self, folder: Path) -> None:
        """End the processes that bear the mark of an attempt in a folder."""
        end_marked(folder)


class Tree:
    """The processes of an attempt on this host.

    Args:
        guard: their common ancestor.
        oom_kills: `count_oom_kills` before the start.
    """

    def __init__(self, guard: subprocess.Popen[bytes], oom_kills: int) -> None:
        self._guard, self._oom_kills = guard, oom_kills

    def exit_status(self) -> int | None:
        """That of the guard, which passes on that of `deepspeed`."""
        return self._guard.poll()

    def death(self) -> Death | None:
        """As the exit status tells."""
        return death(self._guard.poll())

    def wait_for_ranks(self) -> None:
        """Ranks are the children of the child of `deepspeed`; it would take seconds to notice their end."""
        with contextlib.suppress(psutil.Error):
            runners = psutil.Process(self._guard.pid).children()
            ranks = [rank for runner in runners for node in runner.children() for rank in node.children()]
            deadline = time.monotonic() + FAREWELL_SECONDS
            while any(map(_is_alive, ranks)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def out_of_memory(self) -> bool:
        """Whether the kernel says so, of this control group."""
        return count_oom_kills() > self._oom_kills


class Slots:
    """Shares a machine out among up to `count` points at once: devices, or cores on CPU, that no two of them have."""

    def __init__(self, machine: Machine, count: int) -> None:
        self._machine, self.count = machine, count
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(machine.num_cores)
        self._all = machine.visible_devices if machine.device_kind == "cuda" else tuple(cores)[: machine.num_cores]
        self._free = list(self._all)
        self._taken = 0

    def take(self, config: RunConfig) -> Machine | None:
        """The machine with what a point gets of it as `visible_devices`; None while that is not free.

        A point that needs more than there is gets everything.
        """
        ranks = config.parallel.world_size
        need = ranks if self._machine.device_kind == "cuda" else ranks * config.launch.threads_per_rank
        need = min(need, len(self._all)) if self.count > 1 else len(self._all)
        if self._taken == self.count or len(self._free) < need:
            return None
        self._taken += 1
        share, self._free = self._free[:need], self._free[need:]
        return replace(self._machine, visible_devices=tuple(share))

    def give_back(self, share: Machine) -> None:
        """Free what `take` gave."""
        self._taken -= 1
        self._free = sorted([*self._free, *share.visible_devices])


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


def death(exit_status: int | None) -> Death | None:
    """The signal that the exit status of a guard tells of.

    It passes the death of `deepspeed` on as 128 + n, which passes that of a rank on as 256 - n.
    """
    if exit_status is None or 0 <= exit_status <= 128:
        return None
    if exit_status < 0:
        found = Death(-exit_status, "the guard")
    elif exit_status < 192:
        found = Death(exit_status - 128, "the deepspeed launcher")
    else:
        found = Death(256 - exit_status)
    return found if found.signal in set(signal.Signals) else None


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


def end_marked(folder: Path, grace_seconds: float = GRACE_SECONDS) -> None:
    """End what still runs of the attempts in a folder on this host, guards included: SIGTERM, then SIGKILL.

    For processes that lost their guard, or whose guard has not ended them yet. Gives up ten seconds after SIGKILL on
    those that hang in the kernel.
    """
    began, warned = time.monotonic(), set[psutil.Process]()
    while (alive := marked(folder)) and (elapsed := time.monotonic() - began) < grace_seconds + 10:
        for process in alive if elapsed >= grace_seconds else alive - warned:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL if elapsed >= grace_seconds else signal.SIGTERM)
        warned |= alive
        time.sleep(POLL_SECONDS)


def marked(folder: Path) -> set[psutil.Process]:
    """Living processes of the attempts in a folder."""
    beginning, found = f"{folder.resolve()}{os.sep}", set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "") + os.sep
            if mark.startswith(beginning) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def _end(guard: subprocess.Popen[bytes], attempt: Attempt, stops: Sequence[int]) -> None:
    """End an attempt's processes through their guard, or without it where it was killed."""
    assert guard.stdin is not None
    grace = 0.0 if attempt.result_file.exists() else GRACE_SECONDS
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(str(grace).encode())
        guard.stdin.close()
    deadline = time.monotonic() + grace + 15
    while guard.poll() is None and time.monotonic() < deadline:
        if len(stops) > 1:  # the impatient ask twice
            break
        time.sleep(POLL_SECONDS / 5)
    if guard.poll() is None or guard.returncode < 0:
        end_marked(attempt.path, grace_seconds=0.0)
    guard.wait(timeout=30)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
