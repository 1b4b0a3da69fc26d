"""Forks ranks: a process that has imported what takes seconds, and nothing of the harness.

    RANK_IMPORTS="torch deepspeed" python -m rank_server

Each line of its input is a folder with a launch.json, as `distributed.start_ranks` writes it. It answers with a line of
the ranks' process ids and, once all have ended, a line of their exit statuses. Every rank is a process of its own that
ends with its program: what a program patches, breaks or leaves behind reaches no other.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.01
FAREWELL_SECONDS = 2.0
"""After the first rank has failed: for the others, which wait for it, to say so."""


def main() -> None:
    for module in os.environ["RANK_IMPORTS"].split():
        importlib.import_module(module)
    gc.freeze()  # no collection in a rank looks at, and so copies, what all share
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed is no reply
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        launch = json.loads((folder / "launch.json").read_text())
        ranks = [fork(launch, folder, rank, replies) for rank in range(launch["world_size"])]
        print(json.dumps(ranks), file=replies)
        print(json.dumps(wait(ranks, launch["timeout"])), file=replies)


def fork(launch: dict[str, Any], folder: Path, rank: int, replies: IO[str]) -> int:
    """Start one rank; its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        replies.close()
        run(launch, folder, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # an orderly end takes seconds


def run(launch: dict[str, Any], folder: Path, rank: int) -> None:
    """In a rank: its program."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for descriptor, opened in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(opened, descriptor)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.clear()
    os.environ.update(launch["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    answer = importlib.import_module(launch["module"]).run(launch["argument"], folder)
    if rank == 0:
        (folder / "answer.json").write_text(json.dumps(answer))


def wait(ranks: list[int], timeout: float) -> list[int]:
    """Exit statuses (-n for signal n) of all ranks, which are killed at their time-out."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while waiting := [rank for rank in ranks if rank not in statuses]:
        for rank in waiting:
            if time.monotonic() > deadline:
                os.kill(rank, signal.SIGKILL)
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                if status:
                    deadline = min(deadline, time.monotonic() + FAREWELL_SECONDS)
        time.sleep(POLL_SECONDS)
    return [statuses[rank] for rank in ranks]


if __name__ == "__main__":
    main()
