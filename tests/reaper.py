"""Ends what a run of the tests leaves behind, however it ends: ranks, launchers, whatever they started.

    python -I -S tests/reaper.py MARK

MARK is an environment variable of all processes to end. It waits for the end of its input, a pipe from pytest, which
the death of pytest causes too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SURRENDER_SECONDS = 10.0
"""For processes that hang in the kernel."""


def main(mark: str) -> None:
    sys.stdin.read()
    deadline = time.monotonic() + SURRENDER_SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """Living processes that were started with the variable; a zombie has no environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if any(variable.startswith(mark.encode() + b"=") for variable in variables):
                    found.append(int(entry.name))
    return found


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for pytest
    main(sys.argv[1])
