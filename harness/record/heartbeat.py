"""Heartbeats: where each rank stands, in a small file that it overwrites from its first line to its last.

The file begins with a `MARK`; what follows it names the rank's process. A mark costs about a microsecond.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from harness.record.store import is_alive, this_process

FOLDER = "heartbeat"
"""Inside an attempt."""
MARK = struct.Struct("<qqqqq64s")
"""Monotonic nanoseconds, step (from 1; 0: not an instruction), micro-batch and chunk (from 0; or -1), place in STANDS,
what."""
MOMENT = struct.Struct("<q")
"""The beginning of a MARK."""
STANDS = ("in", "after", "enqueuing", "after enqueuing")
"""How far a rank is with it. Instructions of a GPU are enqueued; when they run, the host does not know."""
DONE = "the end"
"""The last phase of a rank that did all it had to."""

Phase = Callable[[str], None]
"""Notes what a rank begins to do."""


def no_phase(what: str) -> None:
    """The `Phase` of whoever is not watched."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands."""

    rank: int
    moment_ns: int
    """When it got there, on its host's monotonic clock."""
    step: int
    """Counted from 1; 0 outside of instructions."""
    micro_batch: int
    """Counted from 0; -1 for an instruction that belongs to none."""
    stands: str
    """One of STANDS."""
    what: str
    """An instruction, as in spans/, or a phase."""
    process: Mapping[str, Any]
    """`this_process` of the rank."""
    chunk: int = -1
    """Counted from 0; -1 where a stage has one."""

    def __str__(self) -> str:
        where = f"{self.stands} {self.what}"
        of = f" of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        of += f", chunk {self.chunk}" if of and self.chunk >= 0 else ""
        return f"{where}{of}, step {self.step}" if self.step else where

    def is_gone(self) -> bool:
        """Whether its process ended before its work did; on another host nobody knows, and it counts as running."""
        return self.what != DONE and not is_alive(self.process)


class Heart:
    """Writes the heartbeat of this process; several of them write the same file."""

    def __init__(self, attempt: Path, rank: int) -> None:
        path = _file(attempt, rank)
        if (found := _read(path)) is None or found.process != this_process():
            path.parent.mkdir(exist_ok=True)
            # On disk before it is mapped: a full disk is an error here, not a signal later.
            path.write_bytes(
                MARK.pack(time.monotonic_ns(), 0, 0, -1, 0, b"start") + json.dumps(this_process()).encode()
            )
        with path.open("r+b") as file:
            self._view = mmap.mmap(file.fileno(), MARK.size)

    def phase(self, what: str) -> None:
        """Begin something that is not an instruction, which shall take less than launch.hang_seconds."""
        self.mark(0, 0, 0, what.encode())

    def mark(self, step: int, micro_batch: int, stands: int, what: bytes, chunk: int = -1) -> None:
        """Note where the rank stands now."""
        MARK.pack_into(self._view, 0, time.monotonic_ns(), step, micro_batch, chunk, stands, what)

    def go_on(self) -> None:
        """Note progress where the rank stands."""
        MOMENT.pack_into(self._view, 0, time.monotonic_ns())

    def beat_with_imports(self) -> None:
        """Make every module that is imported from now on progress: together they take minutes from a slow disk."""
        sys.meta_path.insert(0, _ImportsBeat(self))


class _ImportsBeat(MetaPathFinder):
    """Is asked for each module first, and finds none."""

    def __init__(self, heart: Heart) -> None:
        self._heart = heart

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        self._heart.go_on()


def _file(attempt: Path, rank: int) -> Path:
    return attempt / FOLDER / f"rank{rank:05d}"


def read_heartbeats(attempt: Path) -> list[Heartbeat]:
    """Where the ranks that have begun stand, in order of their numbers."""
    return [found for path in sorted((attempt / FOLDER).glob("rank*")) if (found := _read(path)) is not None]


def _read(path: Path) -> Heartbeat | None:
    """The heartbeat in a file; None when it is missing, damaged or of another format."""
    try:
        content = path.read_bytes()
        moment_ns, step, micro_batch, chunk, stands, what = MARK.unpack_from(content)
        text, process = what.rstrip(b"\0").decode(errors="replace"), json.loads(content[MARK.size :])
        return Heartbeat(int(path.name[4:]), moment_ns, step, micro_batch, STANDS[stands], text, process, chunk)
    except (OSError, ValueError, IndexError, struct.error):
        return None


def describe(heartbeats: Sequence[Heartbeat], world_size: int) -> str:
    """`rank 0 in forward of micro-batch 1, step 3; ranks 1 and 2 in ...; rank 3 yet to begin`."""
    standing: dict[str, list[int]] = {}
    for heartbeat in heartbeats:
        standing.setdefault(str(heartbeat), []).append(heartbeat.rank)
    if missing := sorted(set(range(world_size)) - {heartbeat.rank for heartbeat in heartbeats}):
        standing["yet to begin"] = missing
    return "; ".join(f"{name_ranks(ranks)} {where}" for where, ranks in standing.items())


def name_ranks(ranks: Sequence[int], conjunction: str = "and") -> str:
    """`rank 3`, `ranks 0 and 1`, `ranks 0, 1 and 3`."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} {conjunction} {last}" if first else f"rank {last}"
