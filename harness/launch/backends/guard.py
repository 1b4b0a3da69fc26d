"""The guard of one attempt: parent of last resort of all its processes, which outlive neither it nor its starter.

    python -I -S harness/launch/backends/guard.py GRACE_SECONDS MEMORY_LIMIT_BYTES CORES COMMAND ...

It runs COMMAND and ends with its exit status (128 + n for signal n), after every process that COMMAND left. As their
subreaper it stays the ancestor of those that leave its session or lose their parent. Standard input is a pipe:
its end, which the death of the starter causes too, or SIGTERM, ends them all, first by SIGTERM and after the
grace by SIGKILL. A number on the pipe sets the grace anew. Standard library only, and started by its path: it is
there before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SURRENDER_SECONDS = 10.0
"""After SIGKILL, for processes that hang in the kernel."""


def main(arguments: Sequence[str]) -> int:
    """Run a command under guard; its exit status."""
    grace_seconds, memory_limit_bytes, cores, *command = arguments
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    if memory_limit_bytes:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit_bytes), most))
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    wake, wakeup = os.pipe()
    for end in (wake, wakeup):
        os.set_blocking(end, False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wakeup)
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    child, status = os.posix_spawn(command[0], command, os.environ, file_actions=[nothing]), None
    while status is None:
        ready, _, _ = select.select([0, wake], [], [])
        status = reap().get(child)
        if 0 in ready or set(os.read(wake, 4096)) - {signal.SIGCHLD}:
            with contextlib.suppress(ValueError):
                grace_seconds = str(float(os.read(0, 64))) if 0 in ready else grace_seconds
            break
    end_descendants(float(grace_seconds))
    return status if status is not None else 128 + signal.SIGTERM


def reap() -> dict[int, int]:
    """Exit status (128 + n for signal n) of children that have ended since."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
            ended[found[0]] = code if code >= 0 else 128 - code
    return ended


def end_descendants(grace_seconds: float) -> None:
    """End all processes that descend from this one: SIGTERM, then SIGKILL."""
    began, warned = time.monotonic(), set[int]()
    while alive := descendants():
        elapsed = time.monotonic() - began
        if elapsed > grace_seconds + SURRENDER_SECONDS:
            break
        for pid in alive if elapsed >= grace_seconds else alive - warned:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if elapsed >= grace_seconds else signal.SIGTERM)
        warned |= alive
        time.sleep(0.01)
        reap()
    reap()


def descendants() -> set[int]:
    """Processes, zombies left out, that descend from this one."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(entry.name))
                if state in "ZX":
                    zombies.add(int(entry.name))
    found, queue = set[int](), [os.getpid()]
    while queue:
        offspring = children.get(queue.pop(), [])
        found.update(offspring)
        queue += offspring
    return found - zombies


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
