"""Heartbeats: where each rank stands, in a file of a few bytes that it overwrites at every instruction."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = "heartbeat"
"""Inside an attempt."""
RECORD = struct.Struct("<qqqq32s")
"""Instructions so far, step, micro-batch (from 0), whether it has ended, kind of the instruction."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands."""

    rank: int
    count: int
    """Instructions begun and ended so far."""
    step: int
    """Counted from 1."""
    micro_batch: int
    """Counted from 0."""
    ended: bool
    """The instruction has ended, and the next has not begun."""
    kind: str
    """Of the instruction, as in spans/; "start" before the first."""

    def __str__(self) -> str:
        return f"{'after' if self.ended else 'in'} {self.kind} of micro-batch {self.micro_batch}, step {self.step}"


def heartbeat_file(attempt: Path, rank: int) -> Path:
    """Where a rank writes."""
    return attempt / FOLDER / f"rank{rank:05d}"


def read_heartbeats(attempt: Path) -> list[Heartbeat]:
    """Where the ranks that have begun stand, in order of their numbers."""
    found = []
    for path in sorted((attempt / FOLDER).glob("rank*")):
        try:
            count, step, micro_batch, ended, kind = RECORD.unpack(path.read_bytes())
        except (OSError, struct.error):
            continue
        name = kind.rstrip(b"\0").decode(errors="replace") or "start"
        found.append(Heartbeat(int(path.name[4:]), count, step, micro_batch, bool(ended), name))
    return found


def describe(heartbeats: Sequence[Heartbeat]) -> str:
    """`rank 0 in forward of micro-batch 1, step 3; ranks 1 and 2 in ...`."""
    standing: dict[str, list[str]] = {}
    for heartbeat in heartbeats:
        standing.setdefault(str(heartbeat), []).append(str(heartbeat.rank))
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {' and '.join(filter(None, [', '.join(ranks[:-1]), ranks[-1]]))} {where}"
        for where, ranks in standing.items()
    )
