"""What one rank does: build, train, measure, and write down the result.

Started by the harness as `deepspeed ... --module harness.run.worker ATTEMPT_DIR [TASK]`, or through
`main_started_by_user` when the user starts `deepspeed launchers/train.py` himself.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import ConfigError
from harness.record.diagnose import Outcome, Remains, count_oom_kills, exit_status, judge, read_remains, record
from harness.record.heartbeat import DONE, Heart
from harness.record.store import OUT_OF_MEMORY, Attempt, write_json
from harness.run.instruments.memory import peak_memory_bytes
from harness.secrets import hide, variables

TASKS = {
    task: f"harness.run.tasks.{task}" for task in ("train", "generate", "forward", "verify", "comm_bench", "probe")
}
"""Task -> module with a function of the task's name: (attempt, config, rank) -> None."""

STOPS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
STOP_SECONDS = 0.05
"""From a signal to stop to its consequences: for the one that it came of to arrive."""
ERROR_SECONDS = 3.0
"""For others to report, when all that a rank knows is that it lost one."""


def main(argv: list[str]) -> None:
    """Run this rank on a prepared attempt."""
    attempt, task, rank = Attempt(Path(argv[0])), argv[1] if len(argv) > 1 else "train", int(os.environ["RANK"])
    _print_whole_lines()
    ending = threading.Lock()

    def fail(error: BaseException) -> NoReturn:
        ending.acquire()  # the first of two threads that come here ends the process
        try:
            _report(attempt, rank, error)
        except BaseException as problem:
            traceback.print_exception(problem, chain=False)  # what it came after may hold secrets
        finally:
            _finish(1)

    _call_when_told_to_stop(fail)
    try:
        heart = Heart(attempt.path, rank)
        heart.beat_with_imports()
        heart.phase("joining the other ranks")
        from harness.run.engines.deepspeed.join import initialize_distributed  # torch and deepspeed take seconds

        initialize_distributed()
        _run(attempt, task, rank)
    except BaseException as error:
        fail(error)
    _finish(0)


def main_started_by_user(prepare: Callable[[], Path]) -> None:
    """Run this rank when nobody prepared the attempt: rank 0 does, and tells the others.

    Args:
        prepare: composes and checks the configuration and makes the attempt's directory.
    """
    rank = int(os.environ["RANK"])
    path = None
    if rank == 0:
        try:  # before the imports that take seconds, so that a mistake is answered at once
            path = prepare()
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)  # the launcher ends the other ranks
    _print_whole_lines()
    _UnwatchedRank(rank, path).run()


def _run(attempt: Attempt, task: str, rank: int) -> None:
    """Do the task, the other ranks having joined."""
    heart = Heart(attempt.path, rank)
    heart.phase(f"importing {TASKS[task]}")
    run = getattr(importlib.import_module(TASKS[task]), task)
    config = attempt.config()
    from harness.run.engines.deepspeed.join import keep_secrets

    keep_secrets(variables(config.deepspeed))
    run(attempt, config, rank)
    heart.phase(DONE)


class _Stopped(BaseException):
    """A signal told this process to end."""


class _UnwatchedRank:
    """A rank of a run that the user's own `deepspeed` started.

    No process of the harness watches it and outlives it. So each rank that fails judges the run by what all have left
    by then; the last one knows most. `deepspeed` notices the first rank that ends within a second, and ends the others
    by SIGTERM.

    Args:
        path: folder of the attempt; known to rank 0.
    """

    def __init__(self, rank: int, path: Path | None) -> None:
        self._rank = rank
        self._attempt = Attempt(path) if path is not None else None
        self._copies: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Lock()
        self._oom_kills = count_oom_kills()
        _call_when_told_to_stop(self._fail)

    def run(self) -> NoReturn:
        """Do what is configured, and end."""
        try:
            attempt = self._join()
            _run(attempt, attempt.config().task, self._rank)
            if self._rank == 0:
                record(attempt, Outcome("ok"))
                _finish_run(attempt)
        except BaseException as error:
            self._fail(error)
        _finish(0, self._copies)

    def _join(self) -> Attempt:
        """Meet the other ranks and learn which attempt it is; from here on it is all in log.txt."""
        if self._attempt is not None:
            Heart(self._attempt.path, self._rank).phase("joining the other ranks")
        import torch.distributed as dist

        from harness.run.engines.deepspeed.join import initialize_distributed

        initialize_distributed()
        shared = [str(self._attempt.path) if self._attempt is not None else ""]
        dist.broadcast_object_list(shared, src=0)
        attempt = Attempt(Path(shared[0]))
        self._copies = _copy_output(attempt.log_file)
        self._attempt = attempt
        return attempt

    def _fail(self, error: BaseException) -> NoReturn:
        """Report, judge the run, and end; the first of two threads that come here does."""
        self._ending.acquire()
        try:
            if self._attempt is not None:
                # A child that is started from here is not ended by deepspeed.
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
                _report(self._attempt, self._rank, error)
                self._conclude(self._attempt)
            elif not isinstance(error, _Stopped):
                traceback.print_exception(error)
        except BaseException as problem:
            traceback.print_exception(problem, chain=False)  # what it came after may hold secrets
        finally:
            _finish(1, self._copies)

    def _conclude(self, attempt: Attempt) -> None:
        """Write how the run ended, as far as it is known by now."""
        remains = self._remains(attempt)
        outcome = judge(attempt, remains, oom_killed=count_oom_kills() > self._oom_kills)
        record(attempt, outcome)
        if self._rank == 0:
            exit_status(attempt, outcome)
            if outcome.status not in ("ok", "interrupted"):
                _finish_run(attempt)

    def _remains(self, attempt: Attempt) -> Remains:
        """What all ranks left, waiting a moment while nothing shows why they lost each other."""
        deadline, world_size = time.monotonic() + ERROR_SECONDS, int(os.environ["WORLD_SIZE"])
        while not (remains := read_remains(attempt, world_size)).has_cause and remains.silent:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return remains


def _call_when_told_to_stop(act: Callable[[BaseException], object]) -> None:
    """Call `act` from a thread of its own at the first signal to stop: the main thread may be deep in C++."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number in heard:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)  # nobody waits there

    def wait() -> None:
        while (number := os.read(told, 1)[0]) not in STOPS:
            pass
        # `deepspeed` makes SIGTERM of Ctrl-C, and threads that are told of both may be so in any order.
        time.sleep(STOP_SECONDS)
        os.set_blocking(told, False)
        with contextlib.suppress(BlockingIOError):
            number = min([number, *(other for other in os.read(told, 64) if other in STOPS)])
        act(_Stopped(signal.Signals(number).name))

    threading.Thread(target=wait, daemon=True).start()


def _report(attempt: Attempt, rank: int, error: BaseException) -> None:
    """Leave what ended this rank in errors/, for whoever judges the run."""
    secrets = variables(attempt.raw_config())
    try:
        attempt.error_file(rank).parent.mkdir(exist_ok=True)
        write_json(attempt.error_file(rank), hide(describe_error(rank, error), secrets))
    except OSError as problem:  # a full disk: the run is judged without it
        print(f"rank {rank} can't report in errors/: {problem}", file=sys.stderr)
    if not isinstance(error, _Stopped):
        print(hide("".join(traceback.format_exception(error)), secrets), file=sys.stderr)


def describe_error(rank: int, error: BaseException) -> dict[str, Any]:
    """What a rank leaves behind when it fails."""
    text = str(error)
    description = {
        "rank": rank,
        "type": type(error).__name__,
        "message": text,
        "oom": isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__} {text}") is not None,
        "peak_memory_bytes": peak_memory_bytes(),
        "time": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    return description | {"signal": text} if isinstance(error, _Stopped) else description


def _print_whole_lines() -> None:
    """One write for each line, so that the lines of ranks don't mix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _copy_output(path: Path) -> list[subprocess.Popen[bytes]]:
    """Append what this process prints, in Python or not, to a log too; the children that do it outlive its crash."""
    copies = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited: they end with the last line, not before
    for descriptor in (1, 2):
        copy = subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE, stdout=descriptor)
        assert copy.stdin
        os.dup2(copy.stdin.fileno(), descriptor)
        copy.stdin.close()
        copies.append(copy)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return copies


def _finish(status: int, copies: Sequence[subprocess.Popen[bytes]] = ()) -> NoReturn:
    """End at once: the result is on disk, and an orderly interpreter shutdown takes seconds.

    Args:
        copies: children of `_copy_output`, which write out what they have.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for copy, descriptor in zip(copies, (1, 2), strict=False):
        os.dup2(nowhere, descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):
            copy.wait(timeout=5)
    os._exit(status)


def _finish_run(attempt: Attempt) -> None:
    """Draw the run's pictures and write it to wandb, from child processes under time limits."""
    from harness.analyse.finish import finish_now

    finish_now(attempt)


if __name__ == "__main__":
    main(sys.argv[1:])
