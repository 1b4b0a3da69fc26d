"""How did a run end? One judgement for runs that the harness started and for those of the user's own `deepspeed`.

It is read from what the ranks left: each writes the exception that ended it to errors/, and its heartbeat names its
process. A rank that loses another complains too, so a complaint about a connection is never the cause.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record.heartbeat import DONE, name_ranks, read_heartbeats
from harness.record.store import OUT_OF_MEMORY, Attempt, Status, read_json

LOST_PEER = re.compile(
    r"closed by (remote )?peer|connection (reset|refused|closed|was closed)|broken pipe|socket closed|remote process"
    r"|timed out waiting|failed to connect|wait timeout|heartbeat (monitor|timeout)|unhandled system error",
    re.IGNORECASE,
)
"""What a rank says that lost another."""
DEEPSPEED_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[\w+\] |\x1b\[93m \[WARNING\] ")
"""Its log, and on GPUs the operations that it can't build."""
ERROR_LINE = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    status: Status
    reason: str | None = None
    """One sentence, for every status but ok."""


@dataclass(frozen=True)
class Death:
    """A signal that ended a run."""

    signal: int
    victim: str | None = None
    """Whom it ended; None: a rank."""


@dataclass(frozen=True)
class Remains:
    """What the ranks of a run have left so far."""

    errors: list[dict[str, Any]]
    """What ranks reported, earliest first."""
    silent: list[int]
    """Ranks that neither finished nor reported anything."""
    gone: list[int]
    """Those of them whose process has ended."""
    absent: list[int]
    """Those of them that never began."""

    @property
    def telling(self) -> list[dict[str, Any]]:
        """The reports of ranks that did not just lose another."""
        return [error for error in self.errors if not LOST_PEER.search(str(error.get("message")))]

    @property
    def has_cause(self) -> bool:
        """Whether it shows why the run ended."""
        return bool(self.telling or self.gone)


def read_remains(attempt: Attempt, world_size: int) -> Remains:
    """What the ranks of an attempt have left by now."""
    heartbeats = read_heartbeats(attempt.path)  # before errors/: a rank reports before it ends
    gone = {heartbeat.rank for heartbeat in heartbeats if heartbeat.is_gone()}
    found = [read_json(path) for path in attempt.error_file(0).parent.glob("*.json")]
    errors = sorted((error for error in found if error), key=lambda error: error.get("time", 0.0))
    done = {heartbeat.rank for heartbeat in heartbeats if heartbeat.what == DONE}
    silent = set(range(world_size)) - done - {error.get("rank") for error in errors}
    absent = silent - {heartbeat.rank for heartbeat in heartbeats}
    return Remains(errors, sorted(silent), sorted(gone & silent), sorted(absent))


def judge(
    attempt: Attempt,
    remains: Remains,
    *,
    exit_status: int | None = None,
    death: Death | None = None,
    oom_killed: bool = False,
    watched: bool = False,
) -> Outcome:
    """How an attempt ended; a complete result makes it ok whatever happened later.

    Args:
        exit_status: where the harness started the run and it has ended.
        death: a signal that whoever started the run has heard of.
        oom_killed: the kernel has ended a process for want of memory meanwhile.
        watched: who asks outlives the ranks, and was not told to stop.
    """
    if attempt.keep_partial_result():
        return Outcome("ok")
    return (
        _by_report(remains)
        or _by_signal(attempt.log_file, remains, death, oom_killed)
        or _by_silence(remains, oom_killed)
        or _by_stop(remains, exit_status, watched)
        or _by_log(attempt.log_file, exit_status)
    )


def _by_report(remains: Remains) -> Outcome | None:
    """The first real error of a rank, or of them the one that ran out of memory."""
    telling = remains.telling
    if not telling or "signal" in telling[0]:  # what ranks say after they were stopped comes of that
        return None
    real = [error for error in telling if "signal" not in error]
    return Outcome("oom" if any(error.get("oom") for error in real) else "crashed", _error_reason(real))


def _by_signal(log: Path, remains: Remains, death: Death | None, oom_killed: bool) -> Outcome | None:
    """The deadly signal that whoever started the run has heard of."""
    if death is None:
        return None
    reason = f"{death.victim or _victim(remains)} was ended by {signal.Signals(death.signal).name}"
    if death.signal == signal.SIGKILL and oom_killed:
        return Outcome("oom", f"{reason}: the kernel ran out of memory")
    if death.signal == signal.SIGABRT and OUT_OF_MEMORY.search(read_end(log)):  # terminate called after std::bad_alloc
        return Outcome("oom", f"{reason}: it could not allocate memory")
    return Outcome("crashed", reason)


def _by_silence(remains: Remains, oom_killed: bool) -> Outcome | None:
    """A rank that ended without a word while others reported that they lost it, or that `deepspeed` stopped them."""
    stopped = remains.telling
    if not remains.errors or (stopped and not remains.gone):
        return None
    evidence = _error_reason(remains.errors)[:200]
    if stopped:
        evidence = f"deepspeed ended the others by {stopped[0]['signal']}"
    if not remains.silent:
        return Outcome("crashed", f"the ranks lost each other, and none reports another cause; {evidence}")
    if oom_killed:
        return Outcome("oom", f"{_victim(remains)} was ended by SIGKILL: the kernel ran out of memory")
    return Outcome("crashed", f"{_victim(remains)} ended without a word; {evidence}")


def _by_stop(remains: Remains, exit_status: int | None, watched: bool) -> Outcome | None:
    """Ranks that were told to stop though none is gone: from outside, or by `deepspeed` as one failed to begin."""
    if not (stopped := remains.telling):
        return None
    rank, name = stopped[0]["rank"], stopped[0]["signal"]
    if not watched and remains.absent and name == "SIGTERM":
        return Outcome("crashed", f"{name_ranks(remains.absent)} had not joined when rank {rank} was ended by {name}")
    if not watched:
        return Outcome("interrupted", f"stopped by {name} before it finished")
    if remains.absent or exit_status == 0:  # the log knows more; and after `deepspeed` itself the guard stops them
        return None
    return Outcome("crashed", f"rank {rank} was ended by {name}")


def _by_log(log: Path, exit_status: int | None) -> Outcome:
    """The log's last words, or else the exit status."""
    words = _last_words(log)
    if OUT_OF_MEMORY.search(words):
        return Outcome("oom", words)
    if ERROR_LINE.match(words):
        return Outcome("crashed", words)
    ended = f"the run ended with exit status {exit_status}" if exit_status is not None else "a rank failed"
    return Outcome("crashed", f"{ended} and without a result{f'; the log ends with {words!r}' if words else ''}")


def _victim(remains: Remains) -> str:
    """Who ended without a word, as far as that is known."""
    suspects = remains.gone or (remains.silent if remains.errors else [])
    return name_ranks(suspects) if len(suspects) == 1 else "a rank"


def _error_reason(errors: list[dict[str, Any]]) -> str:
    error = next((error for error in errors if error.get("oom")), errors[0])
    lines = [line.strip() for line in str(error.get("message")).splitlines() if line.strip()]
    # What pydantic says first is how many errors there are.
    message = " ".join(lines[: 3 if error.get("type") == "ValidationError" else 1])
    peak = error.get("peak_memory_bytes") if error.get("oom") else None
    used = f" (its peak so far: {peak / 2**20:,.0f} MiB)" if isinstance(peak, int) else ""
    return f"rank {error.get('rank')}: {error.get('type')}: {message}"[:500] + used


def _last_words(log: Path) -> str:
    """The last error line of a log, or else its last line; DeepSpeed's own lines don't count."""
    lines = [line.strip()[:500] for line in read_end(log).splitlines()]
    lines = [line for line in lines if line and not DEEPSPEED_LINE.match(line)]
    return next(filter(ERROR_LINE.match, reversed(lines)), lines[-1] if lines else "")


def read_end(path: Path, num_bytes: int = 1 << 16) -> str:
    """The last bytes of a text file; empty when there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read().decode(errors="replace")


def record(attempt: Attempt, outcome: Outcome) -> None:
    """Write an attempt's final status; with a failure go the end of the log and where each rank stood."""
    evidence: dict[str, Any] = {}
    if outcome.status != "ok":
        evidence["ranks_stood"] = {str(found.rank): str(found) for found in read_heartbeats(attempt.path)}
        evidence["log_end"] = read_end(attempt.log_file).splitlines()[-20:]
    attempt.write_status(outcome.status, outcome.reason, **evidence)


def exit_status(attempt: Attempt, outcome: Outcome) -> int:
    """0 for an outcome that is ok; otherwise 1, and the user is told."""
    if outcome.status == "ok":
        return 0
    print(f"{outcome.status}: {outcome.reason}\nlog: {attempt.log_file}", file=sys.stderr)
    return 1


def count_oom_kills(counters: Sequence[Path] = ()) -> int:
    """Processes that the kernel has ended for want of memory; 0 where it doesn't tell.

    Args:
        counters: the first that can be read; default that of this control group, or else of the whole machine.
    """
    for file in counters or [*_control_group_files(), Path("/proc/vmstat")]:
        with contextlib.suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE):
                return int(match[1])
    return 0


def _control_group_files(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Where a control group of version 2 or 1 counts, https://docs.kernel.org/admin-guide/cgroup-v2.html."""
    files = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(root / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
